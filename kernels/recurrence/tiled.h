// The recurrence's chunks with products of bfloat16 tiles, summed in float.
//
// q, k and v are bfloat16 already. What is computed from them and multiplied again is rounded once: q and k under
// decays of components, weights within the chunk, values that age until it ends, what the delta rule writes, the state
// that a chunk reads. The state itself stays float, so that no rounding is carried from chunk to chunk, and what the
// tokens of a block correct in each other is solved in float.
//
// A thread takes the same chunk of several heads in turn: their rows are neighbours in memory, and heads that share q
// and k share what is made of them.
#pragma once
#include "tiled_decays.h"

#if defined(HASTEN_TILES)
namespace {

template <bool DELTA, bool VECTOR> struct TiledChunks : TiledDecays {
    Steps<bf16, DELTA> steps;

    TiledChunks(const Shape& shape, const Inputs<bf16>& in)
        : TiledDecays(shape, in, DELTA, VECTOR), steps(shape, in) {}

    // `count` heads from `head` on, of the tokens from `begin` to `end` of batch row `row`
    void run(void* o, const float* initial, float* final, int64_t row, int64_t head, int64_t count, int64_t begin,
             int64_t end) {
        const int64_t width = shape.V + in.ones, size = shape.K * width;
        for (int64_t i = 0; i < count; i++) {
            memset(held[i].S, 0, sizeof(float) * wide_k * wide_v);
            set_state(held[i], initial ? initial + i * size : nullptr, initial ? shape.K : 0, width, width);
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
        for (int64_t i = 0; i < count; i++) get_state(held[i], final + i * size, shape.K, width, width);
#if defined(__x86_64__)
        _mm_sfence();  // after what write() streamed
#endif
    }

    void chunk(void* o, const TiledHead& head, const Place& at, const Place& next) {
        const int64_t rows = round_up(at.count, BLOCK);
        load_keys(at, rows);
        load_values(at, rows);
        load_strengths(at, rows);
        if (!finite) return one_by_one(o, head, at);
        expect_next(at, next);
        if (vector) vector_decays(at, rows);
        else scalar_decays(head, at, rows);
        if (delta && !correct(head, at, rows)) return one_by_one(o, head, at);
        write_outputs(o, head, at);
        update_state(head, rows);
    }

    // U = beta (V - K S) and what its own chunk's tokens wrote before, block after block: (I - L) U = ...
    // Whether all of it is finite: products may overflow, and a decay may be NaN.
    bool correct(const TiledHead& head, const Place& at, int64_t rows) {
        Lanes found = {};
        const Matrix all = {U, odd_lines(wide_v)};
        for (int64_t i = 0; i < rows; i += BLOCK) {
            for (int64_t r = i; r < i + BLOCK; r++) {
                const bf16* v = value_row(at, r, padded);
                for (int64_t j = 0; j < wide_v; j += TILE) put(all.row(r) + j, lanes(v + j) * beta[r]);
            }
            const int64_t products = i ? 2 : 1;
            const auto begin = [&](int64_t n) {
                const int64_t j = 2 * (n / products);
                if (n % products == 0) sums.add(rows_from(vector ? since_k : K, i), head.read.from(0, j), deep);
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
                for (int64_t j = 0; j < wide_v; j += TILE) {
                    const Lanes even = lanes(all.row(i + r) + j), odd = lanes(all.row(i + r + 1) + j);
                    put_pairs(values.row(i / DEPTH * TILE + r / 2, j / TILE), even, odd);
                    found += (even + odd) * 0.f;
                }
        }
        return total(found) == 0;
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
            else sums.add(rows_from(vector ? since_q : Q, row(n)), head.read.from(0, 2 * column(n)), deep);
        };
        overlapped(2 * blocks, begin, [&](int64_t n) {
            if (n % 2 == 0) return;
            const int64_t i = row(n), j = column(n), count = smaller(BLOCK, at.count - i),
                          width = smaller(BLOCK, shape.V - j * BLOCK);
            for (int64_t r = 0; r < count; r++) {
                const float *read = sums_of(n - 1) + r * BLOCK, *own = sums_of(n) + r * BLOCK;
                Lanes first = lanes(read) * of_q[i + r] + lanes(own),
                      second = lanes(read + TILE) * of_q[i + r] + lanes(own + TILE);
                if (j + 1 == across) {
                    put(line, first), put(line + TILE, second);
                    factors[r] = in.ones ? in.scale / (line[shape.V % BLOCK] + EPSILON) : in.scale;
                }
                if (width <= 0) continue;
                expect_lines(1);
                const int64_t to = ((at.row * shape.T + at.token + i + r) * shape.Hv + at.head) * shape.V + j * BLOCK;
                first *= factors[r], second *= factors[r];
                if (in.skip) {
                    const bf16* v = value_row(at, i + r, padded) + j * BLOCK;
                    first += lanes(v) * in.skip[at.head], second += lanes(v + TILE) * in.skip[at.head];
                }
                write(o, to, first, second, width);
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
        if (!vector) age_values(rows);
        const auto begin = [&](int64_t n) {
            const Tiles& added = vector ? values : aged;
            sums.add(keys_left.from(2 * (n / across), 0), added.from(0, 2 * (n % across)), rows / BLOCK);
        };
        overlapped(deep * across, begin, [&](int64_t n) {
            const int64_t c = n / across * BLOCK, j = n % across;
            for (int64_t r = 0; r < BLOCK; r++) {
                float* const s = state_row(head, c + r, j);
                const float* added = sums_of(n) + r * BLOCK;
                expect_lines(1);
                for (int64_t h = 0; h < BLOCK; h += TILE)
                    put(s + h, lanes(s + h) + lanes(s + h) * kept[c + r] + lanes(added + h));
                if (r % 2) round_state(head, c + r - 1, j);
            }
        });
    }

    // Where something is not finite, zeros that stand for no weight would spread it to tokens before.
    void one_by_one(void* o, const TiledHead& head, const Place& at) {
        for (int64_t i = 0; in.decay && !constant && i < at.count; i++)
            for (int64_t c = 0; c < (vector ? shape.K : 1); c++) grows |= decay_of(at)[i * shape.decay.token + c] > 0;
        get_state(head, plane, wide_k, wide_v, wide_v);
        for (int64_t i = 0; i < at.count; i++) steps.run(o, plane, wide_v, 1, at.row, at.head, at.token + i);
        set_state(head, plane, wide_k, wide_v, wide_v);
    }
};

}  // namespace
#endif
