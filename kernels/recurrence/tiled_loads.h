// What a chunk reads, in tiles: rows of q and k with their norms, and v.
#pragma once
#include "tiled_memory.h"

#if defined(HASTEN_TILES)
namespace {

// Rows that will be read soon, and are prefetched a few lines at a time between other work: no hardware prefetcher
// foresees pieces of one head of one token, and a thread waits for more than about a dozen at a time.
struct Expected {
    const char* row;
    int64_t stride, size, rows, done;
    template <class T> void set(const T* from, const TokenStrides& strides, int64_t tokens, int64_t components) {
        const bool in_rows = strides.component <= 1;
        row = (const char*)from, stride = sizeof(T) * (in_rows ? strides.token : strides.component);
        rows = in_rows ? tokens : tokens ? components : 0, size = sizeof(T) * (in_rows ? components : tokens), done = 0;
    }
    int64_t prefetch_lines(int64_t count) {  // how many are left
        for (; count > 0 && rows > 0; count--) {
            prefetch(row + done);
            done += 64;
            if (done >= size) row += stride, rows--, done = 0;
        }
        return count;
    }
};

struct Source {
    const bf16* first;
    int64_t stride;
    const bf16* row(int64_t i) const { return first + i * stride; }
};

// A chunk of a head: `count` tokens from `token` on of batch row `row`
struct Place { int64_t row, head, token, count; };

struct TiledLoads : TiledMemory {
    const Inputs<bf16>& in;
    const bool constant;  // one decay for all tokens of a head, or none
    const TileUnits units;
    BlockSums<> sums;
    int64_t loaded;  // the head of q and k that is in Q, K, ...
    bool finite_k, finite, grows = false;  // grows: a decay is positive
    float beta[LONG], norm_q[LONG], norm_k[LONG], of_q[LONG], of_k[LONG];
    Source of_values;
    Expected expected[4];  // what the next chunk reads
    int64_t next_expected = 0;

    TiledLoads(const Shape& shape, const Inputs<bf16>& in, bool delta, bool vector)
        : TiledMemory(shape, in.ones, delta, vector), in(in),
          constant(!vector && (!in.decay || shape.decay.token == 0)) {}

    const bf16* q_of(const Place& at) const { return in.q_at(shape, at.row, at.head, at.token); }
    const bf16* k_of(const Place& at) const { return in.k_at(shape, at.row, at.head, at.token); }
    const bf16* v_of(const Place& at) const { return in.v_at(shape, at.row, at.head, at.token); }
    const float* decay_of(const Place& at) const { return in.decay_at(shape, at.row, at.head, at.token); }

    void expect_next(const Place& at, const Place& next) {
        const bool other = next.token != at.token || next.head * shape.H / shape.Hv != loaded;
        next_expected = 0;
        expected[0].set(q_of(next), shape.q, other ? next.count : 0, shape.K);
        expected[1].set(k_of(next), shape.k, other ? next.count : 0, shape.K);
        expected[2].set(v_of(next), shape.v, next.count, shape.V);
        expected[3].set(decay_of(next), shape.decay, vector ? next.count : 0, shape.K);
    }
    void expect_lines(int64_t count) {
        while (next_expected < 4 && count > 0) {
            count = expected[next_expected].prefetch_lines(count);
            next_expected += count > 0;
        }
    }

    // `width` components, a multiple of BLOCK: where they lie, or a copy with zeros behind them
    const bf16* whole(const bf16* from, int64_t size, int64_t width) {
        if (size == width) return from;
        memcpy(padded, from, sizeof(bf16) * size);
        memset(padded + size, 0, sizeof(bf16) * (width - size));
        return padded;
    }
    static float total(Lanes x) {
        float parts[TILE];
        put(parts, x);
        Vec all = load(parts);
        for (int64_t i = WIDTH; i < TILE; i += WIDTH) all += load(parts + i);
        return quick_sum(all);
    }
    void products(float* to, const Tiles& left, const Tiles& right, int64_t depth) {
        sums.clear();
        sums.add(left, right, depth);
        sums.finish(to);
    }
    // use(n) for `count` blocks of products that begin(n) adds up: while the units work on block n + 1 and block n is
    // on its way to memory, block n - 1 is used, which stands at sums_of(n - 1), as the one before it does at its own.
    template <class Begin, class Use> void overlapped(int64_t count, const Begin& begin, const Use& use) {
        sums.clear(), begin(0);
        for (int64_t n = 0; n < count; n++) {
            sums.finish(sums_of(n));
            if (n + 1 < count) sums.clear(), begin(n + 1);
            if (n) use(n - 1);
        }
        use(count - 1);
    }
    float* sums_of(int64_t n) const { return block + n % 4 * BLOCK_SUMS; }
    void one_column(float* to, const Tiles& left, const Tiles& right, int64_t depth) {
        BlockSums<1> column;
        column.clear();
        column.add(left, right, depth);
        column.finish(to);
    }

    void load_keys(const Place& at, int64_t rows) {
        const int64_t number = at.head * shape.H / shape.Hv;
        if (number == loaded) return;
        loaded = number;
        const Source of_queries = source(q_of(at), shape.q, at.count, shape.K, gathered_q),
                     of_keys = source(k_of(at), shape.k, at.count, shape.K, gathered_k);
        finite_k = true;
        for (int64_t i = 0; i < rows; i++) {
            const bool there = i < at.count;
            load_row(Q, q, norm_q[i], of_queries.row(i), i, there);
            finite_k &= load_row(K, k, norm_k[i], of_keys.row(i), i, there);
        }
        if (vector) return;
        transpose_keys(K, rows);
        for (int64_t i = 0; i < rows / BLOCK; i++)
            for (int64_t j = 0; j <= i; j++) {
                products(block_of(scores, i, j), Q.from(2 * i, 0), KT.from(0, 2 * j), deep);
                if (delta) products(block_of(overlaps, i, j), K.from(2 * i, 0), KT.from(0, 2 * j), deep);
            }
    }
    // Rows of tokens: where they lie, or gathered where rows of components do
    static Source source(const bf16* from, const TokenStrides& strides, int64_t count, int64_t size, bf16* gathered) {
        if (strides.component == 1) return {from, strides.token};
        const int64_t width = wide(size);
        gather_rows(gathered, from, strides.component, count, size, width);
        return {gathered, width};
    }
    // Rows of keys transposed: KT and, as a left operand, keys_left
    void transpose_keys(const Tiles& rows_of_keys, int64_t rows) {
        for (int64_t c = 0; c < deep; c++) {
            for (int64_t r = 0; r < rows / TILE; r++) transpose(KT.at(c, r), rows_of_keys.at(r, c));
            for (int64_t p = 0; p < TILE; p++)
                for (int64_t j = 0; j < rows / BLOCK; j++) {
                    const int64_t row = c * TILE + p, component = c * DEPTH + 2 * p;
                    put_halves(keys_left.row(component, j), keys_left.row(component + 1, j),
                               load_bits<PairLanes>(KT.row(row, 2 * j)), load_bits<PairLanes>(KT.row(row, 2 * j + 1)));
                }
        }
    }
    // Row i of q or k, or zeros; whether all of it is finite. Where decays are scalars its norm is left to the factors
    // of its products, which are in float.
    bool load_row(const Tiles& to, float* floats, float& norm, const bf16* from, int64_t i, bool there) {
        norm = 1;
        if (!there) {
            for (int64_t c = 0; c < deep; c++) memset(to.row(i, c), 0, sizeof(bf16) * DEPTH);
            if (vector) memset(floats + i * row_stride, 0, sizeof(float) * wide_k);
            return true;
        }
        from = whole(from, shape.K, wide_k);
        Largest largest;
        for (int64_t c = 0; c < deep; c++) {
            largest.take(from + c * DEPTH);
            if (!vector) memcpy(to.row(i, c), from + c * DEPTH, sizeof(bf16) * DEPTH);
        }
        if (!in.unit && !vector) return largest.is_finite();
        Lanes squares = {};
        for (int64_t c = 0; c < wide_k; c += TILE) {
            const Lanes x = lanes(from + c);
            squares += x * x;
            if (vector) put(floats + i * row_stride + c, x);
        }
        if (in.unit) norm = 1.f / __builtin_sqrtf(total(squares) + 1e-6f);
        if (vector && in.unit) multiply(floats + i * row_stride, norm, wide_k);
        return largest.is_finite();
    }

    // v as a right operand (the delta rule's follows in correct()); whether all is finite
    void load_values(const Place& at, int64_t rows) {
        of_values = source(v_of(at), shape.v, at.count, shape.V, gathered_v);
        Largest largest;
        for (int64_t i = 0; i < rows; i += 2) {
            const bf16* from[2];
            for (int64_t r = 0; r < 2; r++) {
                from[r] = value_row(at, i + r, padded + r * wide_v);
                for (int64_t j = 0; j < across; j++) largest.take(from[r] + j * DEPTH);
            }
            for (int64_t j = 0; !delta && j < wide_v; j += TILE)
                put_pairs(values.row(i / DEPTH * TILE + i % DEPTH / 2, j / TILE), from[0] + j, from[1] + j);
        }
        finite = largest.is_finite() && finite_k;
    }
    const bf16* value_row(const Place& at, int64_t i, bf16* copy) const {
        const bf16* from = of_values.row(i);
        const bool there = i < at.count;
        if (there && shape.V == wide_v) return from;
        memset(copy, 0, sizeof(bf16) * wide_v);
        if (there) memcpy(copy, from, sizeof(bf16) * shape.V);
        if (there && in.ones) from_float(1.f, copy[shape.V]);
        return copy;
    }

    void load_strengths(const Place& at, int64_t rows) {
        const float* b = in.beta_at(shape, at.row, at.head, at.token);
        for (int64_t i = 0; i < rows; i++) {
            beta[i] = in.beta && i < at.count ? b[i * shape.beta.token] : 1.f;
            strength[i] = (delta ? 1.f : beta[i]) * (vector ? 1.f : norm_k[i]);
            if (delta) finite &= beta[i] * 0.f == 0;
        }
    }
};

}  // namespace
#endif
