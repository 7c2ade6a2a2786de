// The recurrence's chunks with products of bfloat16 tiles, summed in float.
//
// q, k and v are bfloat16 already. What is computed from them and multiplied again is rounded once: q and k under norms
// and decays, weights within the chunk, what the delta rule writes, the state that a chunk reads. The state itself stays
// float, so that no rounding is carried from chunk to chunk, and what the tokens of a block correct in each other is
// solved in float.
//
// A thread takes the same chunk of several heads in turn: their rows are neighbours in memory, and heads that share q
// and k share what is made of them.
#pragma once
#include "tiled_memory.h"

#if defined(HASTEN_TILES)
namespace {

constexpr PairLanes PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Rows that will be read soon, and are prefetched a few lines at a time between other work: no hardware prefetcher
// foresees pieces of one head of one token, and a thread waits for more than about a dozen at a time.
struct Expected {
    const char* row;
    int64_t stride, size, rows, done;
    template <class T> void set(const T* from, int64_t token_stride, int64_t count, int64_t components) {
        row = (const char*)from, stride = sizeof(T) * token_stride, size = sizeof(T) * components, rows = count, done = 0;
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

template <bool DELTA, bool VECTOR> struct TiledChunks : TiledMemory<DELTA, VECTOR> {
    using Memory = TiledMemory<DELTA, VECTOR>;
    using Memory::C, Memory::shape, Memory::wide_k, Memory::wide_v, Memory::deep, Memory::across, Memory::held;
    using Memory::Q, Memory::K, Memory::KT, Memory::q, Memory::k, Memory::scores, Memory::overlaps;
    using Memory::since_q, Memory::since_k, Memory::halves, Memory::weights, Memory::corrections;
    using Memory::keys_left, Memory::aged, Memory::until_end, Memory::values, Memory::U, Memory::inner, Memory::A, Memory::block, Memory::line;
    using Memory::row_stride, Memory::plane, Memory::between, Memory::strength, Memory::kept, Memory::padded, Memory::block_of;

    const Inputs<bf16>& in;
    Steps<bf16, DELTA> steps;
    const bool constant;  // one decay for all tokens of a head, or none
    const TileUnits units;
    BlockSums<> sums;
    int64_t loaded;  // the head of q and k that is in Q, K, ...
    bool finite_k, finite, grows = false;  // grows: a decay is positive
    float beta[C], norm_q[C], norm_k[C], of_q[C], of_k[C];
    Expected expected[4];  // what the next chunk reads
    int64_t next_expected = 0;

    // A chunk of a head: `count` tokens from `token` on of batch row `row`
    struct Place { int64_t row, head, token, count; };

    TiledChunks(const Shape& shape, const Inputs<bf16>& in)
        : Memory(shape, in.ones), in(in), steps(shape, in), constant(!VECTOR && (!in.decay || shape.decay.token == 0)) {}

    // `count` heads from `head` on, of the tokens from `begin` to `end` of batch row `row`
    void run(void* o, const float* initial, float* final, int64_t row, int64_t head, int64_t count, int64_t begin,
             int64_t end) {
        const int64_t width = shape.V + in.ones, size = shape.K * width;
        for (int64_t i = 0; i < count; i++) {
            memset(held[i].S, 0, sizeof(float) * wide_k * wide_v);
            Memory::set_state(held[i], initial ? initial + i * size : nullptr, initial ? shape.K : 0, width, width);
            if (constant) set_powers(held[i].powers, in.decay ? in.decay[(head + i) * shape.decay.head] : 0);
        }
        for (int64_t token = begin; token < end; token += C) {
            loaded = -1;
            for (int64_t i = 0; i < count; i++) {
                const int64_t next = i + 1 < count ? token : token + C;
                chunk(o, held[i], {row, head + i, token, smaller(C, end - token)},
                      {row, i + 1 < count ? head + i + 1 : head, next, smaller(C, end - next)});
            }
        }
        for (int64_t i = 0; i < count; i++) Memory::get_state(held[i], final + i * size, shape.K, width, width);
#if defined(__x86_64__)
        _mm_sfence();  // after what write_row streamed
#endif
    }
    static void set_powers(float* powers, double g) {
        memset(powers, 0, sizeof(float) * (2 * C + BLOCK));
        for (int64_t d = 0; d <= C; d++) powers[C - d] = float(__builtin_exp(d ? g * d : 0.));
    }

    const bf16* q_of(const Place& at) const { return in.q_at(shape, at.row, at.head, at.token); }
    const bf16* k_of(const Place& at) const { return in.k_at(shape, at.row, at.head, at.token); }
    const bf16* v_of(const Place& at) const { return in.v_at(shape, at.row, at.head, at.token); }
    const float* decay_of(const Place& at) const { return in.decay_at(shape, at.row, at.head, at.token); }

    void chunk(void* o, const TiledHead& head, const Place& at, const Place& next) {
        const int64_t rows = round_up(at.count, BLOCK);
        load_keys(at, rows);
        load_values(at, rows);
        load_strengths(at, rows);
        if (!finite) return one_by_one(o, head, at);
        expect_next(at, next);
        if constexpr (VECTOR) vector_decays(at, rows);
        else scalar_decays(head, at, rows);
        if constexpr (DELTA) correct(head, at, rows);
        write_outputs(o, head, at);
        update_state(head, rows);
    }

    void expect_next(const Place& at, const Place& next) {
        const bool other = next.token != at.token || next.head * shape.H / shape.Hv != loaded;
        next_expected = 0;
        expected[0].set(q_of(next), shape.q.token, other ? next.count : 0, shape.K);
        expected[1].set(k_of(next), shape.k.token, other ? next.count : 0, shape.K);
        expected[2].set(v_of(next), shape.v.token, next.count, shape.V);
        expected[3].set(decay_of(next), shape.decay.token, VECTOR ? next.count : 0, shape.K);
    }
    void expect_lines(int64_t count) {
        for (; next_expected < 4 && count > 0; next_expected += count > 0) count = expected[next_expected].prefetch_lines(count);
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
    // use(n) for `count` blocks of products that begin(n) adds up: while the units work on block n + 1 and block n is on
    // its way to memory, block n - 1 is used, which stands at sums_of(n - 1), as the one before it does at its own.
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
        finite_k = true;
        for (int64_t i = 0; i < rows; i++) {
            const bool there = i < at.count;
            load_row(Q, q, norm_q[i], q_of(at) + i * shape.q.token, i, there);
            finite_k &= load_row(K, k, norm_k[i], k_of(at) + i * shape.k.token, i, there);
        }
        if (VECTOR) return;
        transpose_keys(K, rows);
        for (int64_t i = 0; i < rows / BLOCK; i++)
            for (int64_t j = 0; j <= i; j++) {
                products(block_of(scores, i, j), Q.from(2 * i, 0), KT.from(0, 2 * j), deep);
                if (DELTA) products(block_of(overlaps, i, j), K.from(2 * i, 0), KT.from(0, 2 * j), deep);
            }
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
    // Row i of q or k, or zeros; whether all of it is finite. Where decays are scalars its norm is left to the factors of
    // its products, which are in float.
    bool load_row(const Tiles& to, float* floats, float& norm, const bf16* from, int64_t i, bool there) {
        norm = 1;
        if (!there) {
            for (int64_t c = 0; c < deep; c++) memset(to.row(i, c), 0, sizeof(bf16) * DEPTH);
            if (VECTOR) memset(floats + i * row_stride, 0, sizeof(float) * wide_k);
            return true;
        }
        from = whole(from, shape.K, wide_k);
        Largest largest;
        for (int64_t c = 0; c < deep; c++) {
            largest.take(from + c * DEPTH);
            if (!VECTOR) memcpy(to.row(i, c), from + c * DEPTH, sizeof(bf16) * DEPTH);
        }
        if (!in.unit && !VECTOR) return largest.is_finite();
        Lanes squares = {};
        for (int64_t c = 0; c < wide_k; c += TILE) {
            const Lanes x = lanes(from + c);
            squares += x * x;
            if (VECTOR) put(floats + i * row_stride + c, x);
        }
        if (in.unit) norm = 1.f / __builtin_sqrtf(total(squares) + 1e-6f);
        if (VECTOR && in.unit) multiply(floats + i * row_stride, norm, wide_k);
        return largest.is_finite();
    }

    // v as a right operand (the delta rule's follows in correct()); whether all is finite
    void load_values(const Place& at, int64_t rows) {
        Largest largest;
        for (int64_t i = 0; i < rows; i += 2) {
            const bf16* from[2];
            for (int64_t r = 0; r < 2; r++) {
                from[r] = value_row(at, i + r, padded + r * wide_v);
                for (int64_t j = 0; j < across; j++) largest.take(from[r] + j * DEPTH);
            }
            for (int64_t j = 0; !DELTA && j < wide_v; j += TILE)
                put_pairs(values.row(i / DEPTH * TILE + i % DEPTH / 2, j / TILE), from[0] + j, from[1] + j);
        }
        finite = largest.is_finite() && finite_k;
    }
    const bf16* value_row(const Place& at, int64_t i, bf16* copy) const {
        const bf16* from = v_of(at) + i * shape.v.token;
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
            strength[i] = (DELTA ? 1.f : beta[i]) * (VECTOR ? 1.f : norm_k[i]);
            if (DELTA) finite &= beta[i] * 0.f == 0;
        }
    }

    // The weights of row i, which `factors` multiply, and for the delta rule what its token corrects
    void weigh(int64_t i, const float* factors) {
        const Lanes zero = {};
        const float by_q = VECTOR ? 1.f : norm_q[i], by_k = -beta[i] * (VECTOR ? 1.f : norm_k[i]);
        expect_lines(4);
        for (int64_t j = 0; j <= i / BLOCK; j++) {
            const int64_t at = i % BLOCK * BLOCK;
            Lanes w[2], l[2];
            for (int64_t half = 0; half < 2; half++) {
                const Lanes factor = factors ? lanes(factors + j * BLOCK + half * TILE) : zero + 1.f;
                const Lanes by = factor * lanes(strength + j * BLOCK + half * TILE);
                w[half] = factor == zero ? zero : lanes(block_of(scores, i / BLOCK, j) + at + half * TILE) * by * by_q;
                if constexpr (DELTA)
                    l[half] = factor == zero ? zero : lanes(block_of(overlaps, i / BLOCK, j) + at + half * TILE) * by * by_k;
            }
            put_row(weights.row(i, j), w[0], w[1]);
            if constexpr (DELTA) {
                if (j < i / BLOCK) {
                    put_row(corrections.row(i, j), l[0], l[1]);
                    continue;
                }
                put(inner + i * BLOCK, l[0]), put(inner + i * BLOCK + TILE, l[1]);
                inner[i * BLOCK + i % BLOCK] = 0;
            }
        }
    }

    // One decay for all components: it multiplies the triangles of products.
    void scalar_decays(const TiledHead& head, const Place& at, int64_t rows) {
        const float* until;
        if (constant) {
            for (int64_t i = 0; i < rows; i++) {
                weigh(i, head.powers + C - i);
                set_factors(i, head.powers[C - i - 1]);
            }
            until = head.powers + C - at.count + 1;
            const double g = in.decay ? in.decay[at.head * shape.decay.head] : 0;
            kept[0] = float(__builtin_expm1(g * at.count));
        } else {
            const float* g = decay_of(at);
            double all = 0;
            float since = 1;
            memset(between, 0, sizeof(float) * C);
            for (int64_t i = 0; i < rows; i++) {
                const float log_decay = i < at.count ? g[i * shape.decay.token] : 0.f, factor = __builtin_expf(log_decay);
                for (int64_t j = 0; j < rows; j += TILE) put(between + j, lanes(between + j) * factor);
                between[i] = 1;
                all += log_decay;
                grows |= log_decay > 0;
                weigh(i, between);
                set_factors(i, since *= factor);
            }
            until = between;
            kept[0] = float(__builtin_expm1(all));
        }
        for (int64_t c = 1; c < wide_k; c++) kept[c] = kept[0];
        for (int64_t j = 0; j < rows; j += TILE) put(until_end + j, lanes(until + j) * lanes(strength + j));
    }
    // What is left of the values when the chunk ends, as a right operand
    void age_values(int64_t rows) {
        const PairLanes upper = PairLanes{} + 0xffff0000;
        for (int64_t i = 0; i < rows; i += 2)
            for (int64_t j = 0; j < 2 * across; j++) {
                Lanes even, odd;
                if constexpr (DELTA) {
                    const float* u = U + i * odd_lines(wide_v) + j * TILE;
                    even = lanes(u), odd = lanes(u + odd_lines(wide_v));
                } else {
                    const PairLanes both = load_bits<PairLanes>(values.row(i / DEPTH * TILE + i % DEPTH / 2, j));
                    even = bit_cast<Lanes>(both << 16), odd = bit_cast<Lanes>(both & upper);
                }
                put_pairs(aged.row(i / DEPTH * TILE + i % DEPTH / 2, j), even * until_end[i], odd * until_end[i + 1]);
            }
    }

    // What row i of Q S, and of K S for the delta rule, is multiplied by: the decay since the chunk began is one of them.
    void set_factors(int64_t i, float since) {
        of_q[i] = since * norm_q[i];
        of_k[i] = since * norm_k[i] * -beta[i];
    }

    // Every component decays by itself. Halving: what the second half of a block sees of the first passes its middle,
    // and factors there; the halves are blocks of their own.
    void vector_decays(const Place& at, int64_t rows) {
        load_decays(at, rows);
        memset(scores, 0, sizeof(float) * C * C);
        if (DELTA) memset(overlaps, 0, sizeof(float) * C * C);
        for (int64_t i = 0; i < rows; i++) {
            Lanes dot = {};
            for (int64_t c = 0; c < wide_k; c += TILE) dot += lanes(q + i * row_stride + c) * lanes(k + i * row_stride + c);
            block_of(scores, i / BLOCK, i / BLOCK)[i % BLOCK * (BLOCK + 1)] = total(dot);
        }
 for (int64_t tile = 0; tile < rows / TILE; tile++) {
            halve_tile<1>(tile);
            halve_tile<2>(tile);
            halve_tile<4>(tile);
            halve_tile<8>(tile);
        }
        for (int64_t tile = 0; tile < rows / TILE; tile += 2) halve_tiles<1>(tile);
        if (rows > BLOCK) halve_tiles<2>(0);
        for (int64_t i = 0; i < rows; i++) {
            weigh(i, nullptr);
            of_q[i] = 1, of_k[i] = -beta[i];
        }
        since_and_until(rows);
    }
    void load_decays(const Place& at, int64_t rows) {
        const float* g = decay_of(at);
        Vec highest = {};
        memset(kept, 0, sizeof(float) * wide_k);
        for (int64_t i = 0; i < rows; i++) {
            float* const row = A + i * row_stride;
            unpack(row, g + i * shape.decay.token, i < at.count ? shape.K : 0, wide_k);
            for (int64_t c = 0; c < wide_k; c += WIDTH) {
                const Vec log_decay = load(row + c);
                highest = log_decay > highest ? log_decay : highest;
                store(kept + c, load(kept + c) + log_decay);
                store(row + c, exp(log_decay));
            }
        }
        for (int64_t c = 0; c < wide_k; c += WIDTH) store(kept + c, expm1(load(kept + c)));
        grows |= sum(highest) > 0;
    }
    // Halves within tile `tile` of tokens. Its q and k under decays are a tile of `halves` each, one below the other.
    template <int HALF> void halve_tile(int64_t tile) {
        const int64_t begin = tile * TILE * row_stride;
        for (int64_t c = 0; c < deep; c++) {
            Pair *const of_q = halves.at(2 * tile, c), *const of_k = halves.at(2 * tile + 1, c);
            for (int64_t r = 0; r < TILE; r += 2 * HALF) {
                const int64_t at = begin + r * row_stride + c * DEPTH;
                until<HALF>(of_k + r * TILE, at);
                since<HALF>(of_q + (r + HALF) * TILE, of_k + (r + HALF) * TILE, at + HALF * row_stride);
            }
            transpose(KT.at(c, tile), of_k);
        }
        one_column(block, halves.from(2 * tile, 0), KT.from(0, tile), deep);
        const int64_t side = tile % 2 * TILE, blocks = tile / 2;
        for (int64_t r = HALF; r < TILE; r++) {
            if (!(r / HALF & 1)) continue;
            const PairLanes place = PLACES - uint32_t(r / (2 * HALF) * (2 * HALF));  // from the first half on
            const auto seen = place < uint32_t(HALF);
            float* to = block_of(scores, blocks, blocks) + (side + r) * BLOCK + side;
            put(to, seen ? lanes(block + r * BLOCK) : lanes(to));
            if (!DELTA) continue;
            to = block_of(overlaps, blocks, blocks) + (side + r) * BLOCK + side;
            put(to, seen ? lanes(block + (TILE + r) * BLOCK) : lanes(to));
        }
    }
    // Of `count` rows from `at` on: k times the decay until they end; q and k times the decay since they began
    template <int COUNT> void until(Pair* of_k, int64_t at) const {
        Lanes first = Lanes{} + 1.f, second = first;
        for (int64_t r = COUNT - 1; r >= 0; r--) {
            const float *key = k + at + r * row_stride, *decay = A + at + r * row_stride;
            put_row(of_k + r * TILE, lanes(key) * first, lanes(key + TILE) * second);
            first *= lanes(decay), second *= lanes(decay + TILE);
        }
    }
    template <int COUNT> void since(Pair* of_q, Pair* of_k, int64_t at) const {
        Lanes first = Lanes{} + 1.f, second = first;
        for (int64_t r = 0; r < COUNT; r++) {
            const int64_t from = at + r * row_stride;
            first *= lanes(A + from), second *= lanes(A + from + TILE);
            put_row(of_q + r * TILE, lanes(q + from) * first, lanes(q + from + TILE) * second);
            if (DELTA) put_row(of_k + r * TILE, lanes(k + from) * first, lanes(k + from + TILE) * second);
        }
    }
    // Halves of TILES tiles of tokens each
    template <int TILES> void halve_tiles(int64_t begin) {
        const int64_t middle = begin + TILES;
        for (int64_t c = 0; c < deep; c++) {
            Lanes first = Lanes{} + 1.f, second = first;
            for (int64_t r = middle * TILE - 1; r >= begin * TILE; r--) {
                const int64_t from = r * row_stride + c * DEPTH;
                put_row(halves.at(2 * (r / TILE) + 1, c) + r % TILE * TILE, lanes(k + from) * first,
                        lanes(k + from + TILE) * second);
                first *= lanes(A + from), second *= lanes(A + from + TILE);
            }
            for (int64_t tile = begin; tile < middle; tile++) transpose(KT.at(c, tile), halves.at(2 * tile + 1, c));
            first = second = Lanes{} + 1.f;
            for (int64_t r = middle * TILE; r < (middle + TILES) * TILE; r++) {
                const int64_t from = r * row_stride + c * DEPTH, at = r % TILE * TILE;
                first *= lanes(A + from), second *= lanes(A + from + TILE);
                put_row(halves.at(2 * (r / TILE), c) + at, lanes(q + from) * first, lanes(q + from + TILE) * second);
                if (DELTA)
                    put_row(halves.at(2 * (r / TILE) + 1, c) + at, lanes(k + from) * first,
                            lanes(k + from + TILE) * second);
            }
        }
        for (int64_t tile = middle; tile < middle + TILES; tile++)
            for (int64_t column = begin; column < middle; column += 2) {
                const int64_t width = TILES == 1 ? TILE : BLOCK;
                if (TILES == 1) one_column(block, halves.from(2 * tile, 0), KT.from(0, column), deep);
                else products(block, halves.from(2 * tile, 0), KT.from(0, column), deep);
                for (int64_t r = 0; r < TILE; r++) {
                    const int64_t to = (tile % 2 * TILE + r) * BLOCK + column % 2 * TILE;
                    memcpy(block_of(scores, tile / 2, column / 2) + to, block + r * BLOCK, sizeof(float) * width);
                    if (!DELTA) continue;
                    memcpy(block_of(overlaps, tile / 2, column / 2) + to, block + (TILE + r) * BLOCK,
                           sizeof(float) * width);
                }
            }
    }
    void since_and_until(int64_t rows) {
        for (int64_t c = 0; c < deep; c++) {
            Lanes first = Lanes{} + 1.f, second = first;
            for (int64_t j = rows - 1; j >= 0; j--) {
                const float *key = k + j * row_stride + c * DEPTH, *decay = A + j * row_stride + c * DEPTH;
                put_row(halves.row(j, c), lanes(key) * first * strength[j], lanes(key + TILE) * second * strength[j]);
                first *= lanes(decay), second *= lanes(decay + TILE);
            }
            first = second = Lanes{} + 1.f;
            for (int64_t i = 0; i < rows; i++) {
                const int64_t from = i * row_stride + c * DEPTH;
                first *= lanes(A + from), second *= lanes(A + from + TILE);
                put_row(since_q.row(i, c), lanes(q + from) * first, lanes(q + from + TILE) * second);
                if (!DELTA) continue;
                put_row(since_k.row(i, c), lanes(k + from) * first, lanes(k + from + TILE) * second);
            }
        }
        transpose_keys(halves, rows);
    }

    // U = beta (V - K S) and what its own chunk's tokens wrote before, block after block: (I - L) U = ...
    void correct(const TiledHead& head, const Place& at, int64_t rows) {
        const Matrix all = {U, odd_lines(wide_v)};
        for (int64_t i = 0; i < rows; i += BLOCK) {
            for (int64_t r = i; r < i + BLOCK; r++) {
                const bf16* v = value_row(at, r, padded);
                for (int64_t j = 0; j < wide_v; j += TILE) put(all.row(r) + j, lanes(v + j) * beta[r]);
            }
            const int64_t products = i ? 2 : 1;
            const auto begin = [&](int64_t n) {
                const int64_t j = 2 * (n / products);
                if (n % products == 0) sums.add(rows_from(VECTOR ? since_k : K, i), head.read.from(0, j), deep);
                else sums.add(rows_from(corrections, i), values.from(0, j), i / BLOCK);
            };
            overlapped(products * across, begin, [&](int64_t n) {
                const float* from = sums_of(n);
                for (int64_t r = 0; r < BLOCK; r++)
                    for (int64_t h = 0; h < BLOCK; h += TILE) {
                        float* const u = all.row(i + r) + n / products * BLOCK + h;
                        const float factor = n % products ? 1.f : of_k[i + r];
                        put(u, lanes(u) + lanes(from + r * BLOCK + h) * factor);
                    }
            });
            substitute(all.rows(i), {inner + i * BLOCK, BLOCK}, BLOCK, wide_v);
            for (int64_t r = 0; r < BLOCK; r += 2)
                for (int64_t j = 0; j < wide_v; j += TILE)
                    put_pairs(values.row(i / DEPTH * TILE + r / 2, j / TILE), lanes(all.row(i + r) + j),
                              lanes(all.row(i + r + 1) + j));
        }
    }
    static Tiles rows_from(const Tiles& left, int64_t row) { return left.from(row / TILE, 0); }

    // o = scale (Q S + weights U), divided by its last column where that is the normaliser
    void write_outputs(void* o, const TiledHead& head, const Place& at) {
        float factors[BLOCK];
        const int64_t blocks = (at.count + BLOCK - 1) / BLOCK * across;
        // Column after column of a row of blocks, the last one first: it may hold the normaliser.
        const auto row = [&](int64_t n) { return n / 2 / across * BLOCK; };
        const auto column = [&](int64_t n) { return across - 1 - n / 2 % across; };
        const auto begin = [&](int64_t n) {
            if (n % 2) sums.add(rows_from(weights, row(n)), values.from(0, 2 * column(n)), row(n) / BLOCK + 1);
            else sums.add(rows_from(VECTOR ? since_q : Q, row(n)), head.read.from(0, 2 * column(n)), deep);
        };
        overlapped(2 * blocks, begin, [&](int64_t n) {
            if (n % 2 == 0) return;
            const int64_t i = row(n), j = column(n), count = smaller(BLOCK, at.count - i),
                          width = smaller(BLOCK, shape.V - j * BLOCK);
            for (int64_t r = 0; r < count; r++) {
                const float *read = sums_of(n - 1) + r * BLOCK, *own = sums_of(n) + r * BLOCK;
                const Lanes first = lanes(read) * of_q[i + r] + lanes(own),
                            second = lanes(read + TILE) * of_q[i + r] + lanes(own + TILE);
                if (j + 1 == across) {
                    put(line, first), put(line + TILE, second);
                    factors[r] = in.ones ? in.scale / (line[shape.V % BLOCK] + EPSILON) : in.scale;
                }
                if (width <= 0) continue;
                expect_lines(1);
                write(o, ((at.row * shape.T + at.token + i + r) * shape.Hv + at.head) * shape.V + j * BLOCK,
                      first * factors[r], second * factors[r], width);
            }
        });
    }
    // `width` of BLOCK components of o
    void write(void* o, int64_t to, Lanes first, Lanes second, int64_t width) {
        if (in.wide || width < BLOCK || (uintptr_t)((bf16*)o + to) % 64) {
            put(line, first), put(line + TILE, second);
            if (in.wide) memcpy((float*)o + to, line, sizeof(float) * width);
            else pack((bf16*)o + to, line, 1.f, width);
            return;
        }
#if defined(__x86_64__)
        // Past the caches: nothing reads it soon.
        _mm512_stream_si512((__m512i*)((bf16*)o + to), (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
        put_row((Pair*)((bf16*)o + to), first, second);
#endif
    }

    // S += (decay of the chunk - 1) S + K U
    void update_state(const TiledHead& head, int64_t rows) {
        if constexpr (!VECTOR) age_values(rows);
        const auto begin = [&](int64_t n) {
            sums.add(keys_left.from(2 * (n / across), 0), (VECTOR ? values : aged).from(0, 2 * (n % across)), rows / BLOCK);
        };
        overlapped(deep * across, begin, [&](int64_t n) {
            const int64_t c = n / across * BLOCK, j = n % across;
            for (int64_t r = 0; r < BLOCK; r++) {
                float* const s = Memory::state_row(head, c + r, j);
                const float* added = sums_of(n) + r * BLOCK;
                expect_lines(1);
                for (int64_t h = 0; h < BLOCK; h += TILE)
                    put(s + h, lanes(s + h) + lanes(s + h) * kept[c + r] + lanes(added + h));
                if (r % 2) Memory::round_state(head, c + r - 1, j);
            }
        });
    }

    // Where something is not finite, zeros that stand for no weight would spread it to tokens before.
    void one_by_one(void* o, const TiledHead& head, const Place& at) {
        for (int64_t i = 0; in.decay && !constant && i < at.count; i++)
            for (int64_t c = 0; c < (VECTOR ? shape.K : 1); c++) grows |= decay_of(at)[i * shape.decay.token + c] > 0;
        Memory::get_state(head, plane, wide_k, wide_v, wide_v);
        for (int64_t i = 0; i < at.count; i++) steps.run(o, plane, wide_v, 1, at.row, at.head, at.token + i);
        Memory::set_state(head, plane, wide_k, wide_v, wide_v);
    }
};

}  // namespace
#endif
