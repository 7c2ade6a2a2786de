// The recurrence in chunks of matrix products in float.
#pragma once
#include "step.h"

namespace {

// The work of one thread: one chunk of one head at a time, padded with zeros to 16, 32 or 64 tokens.
template <class T, bool DELTA> struct Chunks {
    const Shape& shape;
    const Inputs<T>& in;
    const bool vector;  // a decay per component
    const int64_t wide_k, wide_v, heads = 1;
    Scratch memory;
    Steps<T, DELTA> steps;
    float* unused;
    Matrix S, Q, K, U, O, P, L, X, Y, A;
    float* kept;  // what the chunk leaves of each row of the state, less 1
    bool finite, grows = false;  // grows: a decay is positive
    float a[CHUNK], beta[CHUNK];
    alignas(64) float between[CHUNK];

    static int64_t bytes(const Shape& shape, bool vector, int64_t ones) {
        const int64_t k = odd_lines(shape.K), v = odd_lines(shape.V + ones), c = odd_lines(CHUNK),
                      rows = round_up(shape.K, 16);
        const int64_t halves = vector ? 3 * CHUNK * k : rows * c;
        return sizeof(float) * ((rows + 2 * CHUNK) * v + 2 * CHUNK * (k + c) + halves + rows);
    }
    Chunks(const Shape& shape, const Inputs<T>& in)
        : shape(shape), in(in), vector(shape.decay.component != 0), wide_k(round_up(shape.K, 16)),
          wide_v(round_up(shape.V + in.ones, 16)), memory(bytes(shape, vector, in.ones)), steps(shape, in),
          unused((float*)memory.memory) {
        if (!unused) return;
        S = matrix(wide_k, wide_v);
        U = matrix(CHUNK, wide_v);
        O = matrix(CHUNK, wide_v);
        Q = matrix(CHUNK, wide_k);
        K = matrix(CHUNK, wide_k);
        P = matrix(CHUNK, CHUNK);
        L = matrix(CHUNK, CHUNK);
        X = vector ? matrix(CHUNK, wide_k) : matrix(wide_k, CHUNK);
        if (vector) Y = matrix(CHUNK, wide_k), A = matrix(CHUNK, wide_k);
        kept = unused;
    }
    Matrix matrix(int64_t rows, int64_t columns) {
        const Matrix made = {unused, odd_lines(columns)};
        unused += rows * made.stride;
        return made;
    }

    // Head `head` of the tokens from `begin` to `end` of batch row `row`
    void run(void* o, const float* initial, float* final, int64_t row, int64_t head, int64_t, int64_t begin,
             int64_t end) {
        const int64_t width = shape.V + in.ones;
        for (int64_t c = 0; c < wide_k; c++)
            unpack(S.row(c), initial + c * width, initial && c < shape.K ? width : 0, wide_v);
        for (int64_t token = begin; token < end; token += CHUNK) {
            const int64_t count = smaller(CHUNK, end - token), rows = count <= 16 ? 16 : count <= 32 ? 32 : CHUNK;
            load_chunk(row, head, token, count, rows);
            if (!finite) {
                one_by_one(o, row, head, token, count);
                continue;
            }
            const int64_t next = token + CHUNK, ahead = smaller(CHUNK, end - next);
            expect(in.q_at(shape, row, head, next), shape.q, ahead, shape.K);
            if (vector) vector_decays(rows);
            else scalar_decays(rows);
            if (DELTA && !correct(rows)) {
                one_by_one(o, row, head, token, count);
                continue;
            }
            product(O, Q, S, rows, wide_v, false, [&](int64_t) { return wide_k; });
            expect(in.k_at(shape, row, head, next), shape.k, ahead, shape.K);
            product(O, P, U, rows, wide_v, true, [](int64_t r) { return r + TILE_ROWS; });
            for (int64_t c = 0; c < wide_k; c++)
                for (int64_t j = 0; j < wide_v; j += WIDTH)
                    store(S.row(c) + j, load(S.row(c) + j) + load(S.row(c) + j) * kept[c]);
            expect(in.v_at(shape, row, head, next), shape.v, ahead, shape.V);
            product(S, vector ? Y.transposed() : X, U, wide_k, wide_v, true, [&](int64_t) { return rows; });
            for (int64_t i = 0; i < count; i++) in.write(o, shape, row, head, token + i, O.row(i));
        }
        for (int64_t c = 0; c < shape.K; c++) pack(final + c * width, S.row(c), 1.f, width);
    }

    void load_chunk(int64_t row, int64_t head, int64_t token, int64_t count, int64_t rows) {
        gather(Q, in.q_at(shape, row, head, token), shape.q, count, rows, shape.K, wide_k);
        gather(K, in.k_at(shape, row, head, token), shape.k, count, rows, shape.K, wide_k);
        gather(U, in.v_at(shape, row, head, token), shape.v, count, rows, shape.V, wide_v);
        const float* b = in.beta_at(shape, row, head, token);
        const float* g = in.decay_at(shape, row, head, token);
        Vec found = {};  // zeros, unless something is not finite
        double all = 0;
        for (int64_t i = 0; i < rows; i++) {
            const bool there = i < count;
            if (in.ones && there) U.row(i)[shape.V] = 1;
            for (int64_t j = 0; j < wide_v; j += WIDTH) found += load(U.row(i) + j) * 0.f;
            for (int64_t c = 0; DELTA && c < wide_k; c += WIDTH) found += load(K.row(i) + c) * 0.f;
            if (in.unit) make_unit(Q.row(i), wide_k), make_unit(K.row(i), wide_k);
            beta[i] = in.beta && there ? b[i * shape.beta.token] : DELTA ? 0.f : 1.f;
            found += Vec{} + beta[i] * 0.f;
            if (!DELTA && in.beta) multiply(U.row(i), beta[i], wide_v);
            if (vector) continue;
            const float log_decay = in.decay && there ? g[i * shape.decay.token] : 0.f;
            a[i] = __builtin_expf(log_decay);
            all += log_decay;
            grows |= log_decay > 0;
        }
        finite = sum(found) == 0;
        for (int64_t c = 0; c < wide_k; c += WIDTH) store(kept + c, Vec{} + float(__builtin_expm1(all)));
        if (!vector) return;
        Vec highest = {};
        for (int64_t c = 0; c < wide_k; c += WIDTH) store(kept + c, Vec{});
        for (int64_t i = 0; i < rows; i++) {
            unpack(A.row(i), g + i * shape.decay.token, i < count ? shape.K : 0, wide_k);
            for (int64_t c = 0; c < wide_k; c += WIDTH) {
                const Vec log_decay = load(A.row(i) + c);
                highest = log_decay > highest ? log_decay : highest;
                store(kept + c, load(kept + c) + log_decay);
                store(A.row(i) + c, exp(log_decay));
            }
        }
        for (int64_t c = 0; c < wide_k; c += WIDTH) store(kept + c, expm1(load(kept + c)));
        grows |= sum(highest) > 0;
    }

    // P = Q K^T and L = -beta K K^T (strictly) under the decays, as lower triangles. Then Q, and K for the delta rule,
    // times the decay since the chunk began; X, the transpose of K, times the decay until it ends.
    void scalar_decays(int64_t rows) {
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = 0; c < wide_k; c++) X.row(c)[i] = K.row(i)[c];
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
            product_rows(P.rows(i), Q.rows(i), X, wide_k, round_up(i + TILE_ROWS, WIDTH), false);
            if (DELTA) product_rows(L.rows(i), K.rows(i), X, wide_k, round_up(i + TILE_ROWS, WIDTH), false);
        }
        memset(between, 0, sizeof(between));
        float all = 1;
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < rows; j += WIDTH) store(between + j, load(between + j) * a[i]);
            between[i] = 1;
            for (int64_t j = 0; j < rows; j += WIDTH) {
                const Vec factor = load(between + j), zero = {};
                store(P.row(i) + j, factor == zero ? zero : load(P.row(i) + j) * factor);
                if (DELTA) store(L.row(i) + j, factor == zero ? zero : load(L.row(i) + j) * factor * -beta[i]);
            }
            L.row(i)[i] = 0;
            all *= a[i];
            multiply(Q.row(i), all, wide_k);
            if (DELTA) multiply(K.row(i), all, wide_k);
        }
        for (int64_t c = 0; c < wide_k; c++)
            for (int64_t j = 0; j < rows; j += WIDTH) store(X.row(c) + j, load(X.row(c) + j) * load(between + j));
    }

    // The same where every component decays by itself, with K times the decay until the chunk's end in Y. Halving: what
    // the second half of a block sees of the first passes its middle, and factors there; the halves are blocks of their
    // own.
    void vector_decays(int64_t rows) {
        for (int64_t i = 0; i < rows; i++) {
            memset(P.row(i), 0, sizeof(float) * rows);
            memset(L.row(i), 0, sizeof(float) * rows);
            dots_tile<1>({P.row(i) + i, 1}, Q.rows(i), K.rows(i), wide_k);
        }
        for (int64_t half = 1; half < rows; half *= 2)
            for (int64_t begin = 0; begin < rows; begin += 2 * half) {
                const int64_t middle = begin + half;
                for (int64_t c = 0; c < wide_k; c += WIDTH) {
                    Vec since = Vec{} + 1.f, until = since;
                    for (int64_t i = middle; i < middle + half; i++) {
                        since *= load(A.row(i) + c);
                        store(X.row(i) + c, load(Q.row(i) + c) * since);
                        if (DELTA) store(Y.row(i) + c, load(K.row(i) + c) * since);
                    }
                    for (int64_t j = middle - 1; j >= begin; j--) {
                        store(Y.row(j) + c, load(K.row(j) + c) * until);
                        until *= load(A.row(j) + c);
                    }
                }
                dots({P.row(middle) + begin, P.stride}, X.rows(middle), Y.rows(begin), half, wide_k);
                if (DELTA) dots({L.row(middle) + begin, L.stride}, Y.rows(middle), Y.rows(begin), half, wide_k);
            }
        for (int64_t i = 0; DELTA && i < rows; i++) multiply(L.row(i), -beta[i], rows);
        for (int64_t c = 0; c < wide_k; c += WIDTH) {
            Vec since = Vec{} + 1.f, until = since;
            for (int64_t j = rows - 1; j >= 0; j--) {
                store(Y.row(j) + c, load(K.row(j) + c) * until);
                until *= load(A.row(j) + c);
            }
            for (int64_t i = 0; i < rows; i++) {
                since *= load(A.row(i) + c);
                store(Q.row(i) + c, load(Q.row(i) + c) * since);
                if (DELTA) store(K.row(i) + c, load(K.row(i) + c) * since);
            }
        }
    }

    // U = beta (U - K S) and what its own chunk's tokens wrote before: (I - L) U = ... by forward substitution
    // Whether all of it is finite: products may overflow, and a decay may be NaN.
    bool correct(int64_t rows) {
        for (int64_t i = 0; i < rows; i++) {
            multiply(K.row(i), -beta[i], wide_k);
            multiply(U.row(i), beta[i], wide_v);
        }
        product(U, K, S, rows, wide_v, true, [&](int64_t) { return wide_k; });
        substitute(U, L, rows, wide_v);
        Vec found = {};
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < wide_v; j += WIDTH) found += load(U.row(i) + j) * 0.f;
        return sum(found) == 0;
    }

    // Where something is not finite, zeros that stand for no weight would spread it to tokens before.
    void one_by_one(void* o, int64_t row, int64_t head, int64_t token, int64_t count) {
        for (int64_t i = 0; i < count; i++) steps.run(o, S.data, S.stride, 1, row, head, token + i);
    }
};

}  // namespace
