// The recurrence of linear attention and of the delta rule, in chunks and in steps: S = Diag(a) S + k u^T, o = scale
// S^T q, where u is v, or for the delta rule beta (v - (Diag(a) S)^T k).
//
// A thread takes one head of one sequence and goes through its chunks in order; all that a chunk needs lies in the
// thread's cache, in float. Decays enter as products of the factors a themselves, never as differences of summed
// logarithms: no factor exceeds 1, zeros need no care, and nothing cancels.
#pragma once
#include "matrix.h"
#include "../vector_math.h"

namespace {

constexpr int64_t CHUNK = 64;

// Strides in elements.
struct TokenStrides { int64_t row, token, head, component; };
struct StateStrides { int64_t row, head, k, v; };

struct Shape {
    int64_t N, T, H, Hv, K, V;
    TokenStrides q, k, v;      // components are contiguous
    TokenStrides beta, decay;  // 0 where a decay does not depend on it
    StateStrides state;
};

struct RecurrenceArguments {
    int32_t dtype, threads;
    void* o;
    const void *q, *k, *v;
    const float *beta, *decay;  // null: none
    const float* initial;       // null: zeros
    float* state;               // of whole sequences the final ones, contiguous; of steps what they continue and change
    const int64_t* bounds;      // null: sequence n is row n of the batch; else tokens bounds[n] to bounds[n + 1]
    float scale;
    int32_t unit;               // make q and k unit vectors
    Shape shape;
};

template <class T> struct Inputs {
    const T *q, *k, *v;
    const float *decay, *beta;
    const int64_t* bounds;
    float scale;
    bool unit;
    explicit Inputs(const RecurrenceArguments& in)
        : q((const T*)in.q), k((const T*)in.k), v((const T*)in.v), decay(in.decay), beta(in.beta), bounds(in.bounds),
          scale(in.scale), unit(in.unit != 0) {}
};

// A row stride that spreads over the cache's sets.
inline int64_t odd_lines(int64_t floats) { return (round_up(floats, 16) / 16 | 1) * 16; }

// to[0 .. count) = from, padded with zeros to `width`, a multiple of WIDTH
template <class T> inline void unpack(float* to, const T* from, int64_t count, int64_t width) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
    if (i < count) store(to + i, load_part(from + i, count - i)), i += WIDTH;
    for (; i < width; i += WIDTH) store(to + i, Vec{});
}

template <class T> inline void pack(T* to, const float* from, float scale, int64_t count) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i) * scale);
    if (i < count) store_part(to + i, load(from + i) * scale, count - i);
}

inline void multiply(float* row, float factor, int64_t width) {
    for (int64_t i = 0; i < width; i += WIDTH) store(row + i, load(row + i) * factor);
}

inline void make_unit(float* row, int64_t width) {
    Vec squares = {};
    for (int64_t i = 0; i < width; i += WIDTH) squares += load(row + i) * load(row + i);
    multiply(row, 1.f / __builtin_sqrtf(sum(squares) + 1e-6f), width);
}

// Prefetches `rows` rows: memory is read in pieces of one head of one token, which no hardware prefetcher foresees
template <class T> inline void expect(const T* from, int64_t stride, int64_t rows, int64_t size) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < size; c += LINE<T>) prefetch(from + i * stride + c);
}

// The work of one thread: one chunk of one head at a time, padded with zeros to 16, 32 or 64 tokens.
template <class T, bool DELTA> struct Chunks {
    const Shape& shape;
    const Inputs<T>& in;
    const bool vector;  // a decay per component
    const int64_t wide_k, wide_v;
    Scratch memory;
    float* unused;
    Matrix S, Q, K, U, O, P, L, X, Y, A;
    float a[CHUNK], beta[CHUNK];
    alignas(64) float between[CHUNK];

    static int64_t bytes(const Shape& shape, bool vector) {
        const int64_t k = odd_lines(shape.K), v = odd_lines(shape.V), c = odd_lines(CHUNK),
                      rows = round_up(shape.K, 16);
        return sizeof(float) * ((rows + 2 * CHUNK) * v + 2 * CHUNK * (k + c) + (vector ? 3 * CHUNK * k : rows * c));
    }
    Chunks(const Shape& shape, const Inputs<T>& in)
        : shape(shape), in(in), vector(shape.decay.component != 0), wide_k(round_up(shape.K, 16)),
          wide_v(round_up(shape.V, 16)), memory(bytes(shape, vector)), unused((float*)memory.memory) {
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
    }
    Matrix matrix(int64_t rows, int64_t columns) {
        const Matrix made = {unused, odd_lines(columns)};
        unused += rows * made.stride;
        return made;
    }

    // Head `head` of the tokens from `begin` to `end` of batch row `row`
    void run(T* o, const float* initial, float* final, int64_t row, int64_t head, int64_t begin, int64_t end) {
        for (int64_t c = 0; c < wide_k; c++)
            unpack(S.row(c), initial + c * shape.V, initial && c < shape.K ? shape.V : 0, wide_v);
        for (int64_t token = begin; token < end; token += CHUNK) {
            const int64_t count = smaller(CHUNK, end - token), rows = count <= 16 ? 16 : count <= 32 ? 32 : CHUNK;
            load_chunk(row, head, token, count, rows);
            const int64_t next = token + CHUNK, ahead = smaller(CHUNK, end - next);
            expect(in.q + row * shape.q.row + next * shape.q.token + head * shape.H / shape.Hv * shape.q.head,
                   shape.q.token, ahead, shape.K);
            if (vector) vector_decays(rows);
            else scalar_decays(rows);
            if (DELTA) correct(rows);
            product(O, Q, S, rows, wide_v, false, [&](int64_t) { return wide_k; });
            expect(in.k + row * shape.k.row + next * shape.k.token + head * shape.H / shape.Hv * shape.k.head,
                   shape.k.token, ahead, shape.K);
            product(O, P, U, rows, wide_v, true, [](int64_t r) { return r + TILE_ROWS; });
            for (int64_t c = 0; c < wide_k; c++) multiply(S.row(c), vector ? kept(c) : between[0] * a[0], wide_v);
            expect(in.v + row * shape.v.row + next * shape.v.token + head * shape.v.head, shape.v.token, ahead,
                   shape.V);
            product(S, vector ? Y.transposed() : X, U, wide_k, wide_v, true, [&](int64_t) { return rows; });
            for (int64_t i = 0; i < count; i++)
                pack(o + ((row * shape.T + token + i) * shape.Hv + head) * shape.V, O.row(i), in.scale, shape.V);
        }
        for (int64_t c = 0; c < shape.K; c++) pack(final + c * shape.V, S.row(c), 1.f, shape.V);
    }

    void load_chunk(int64_t row, int64_t head, int64_t token, int64_t count, int64_t rows) {
        const int64_t shared = head * shape.H / shape.Hv;
        const T* q = in.q + row * shape.q.row + token * shape.q.token + shared * shape.q.head;
        const T* k = in.k + row * shape.k.row + token * shape.k.token + shared * shape.k.head;
        const T* v = in.v + row * shape.v.row + token * shape.v.token + head * shape.v.head;
        const float* b = in.beta + row * shape.beta.row + token * shape.beta.token + head * shape.beta.head;
        const float* g = in.decay + row * shape.decay.row + token * shape.decay.token + head * shape.decay.head;
        for (int64_t i = 0; i < rows; i++) {
            const bool there = i < count;
            unpack(Q.row(i), q + i * shape.q.token, there ? shape.K : 0, wide_k);
            unpack(K.row(i), k + i * shape.k.token, there ? shape.K : 0, wide_k);
            unpack(U.row(i), v + i * shape.v.token, there ? shape.V : 0, wide_v);
            if (in.unit) make_unit(Q.row(i), wide_k), make_unit(K.row(i), wide_k);
            beta[i] = DELTA && there ? b[i * shape.beta.token] : 0;
            if (!vector) {
                a[i] = in.decay && there ? __builtin_expf(g[i * shape.decay.token]) : 1.f;
                continue;
            }
            unpack(A.row(i), g + i * shape.decay.token, there ? shape.K : 0, wide_k);
            for (int64_t c = 0; c < wide_k; c += WIDTH) store(A.row(i) + c, exp(load(A.row(i) + c)));
        }
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
            store(A.row(0) + c, since);  // of the whole chunk
        }
    }
    float kept(int64_t c) const { return A.row(0)[c]; }

    // U = beta (U - K S) and what its own chunk's tokens wrote before: (I - L) U = ... by forward substitution
    void correct(int64_t rows) {
        for (int64_t i = 0; i < rows; i++) {
            multiply(K.row(i), -beta[i], wide_k);
            multiply(U.row(i), beta[i], wide_v);
        }
        product(U, K, S, rows, wide_v, true, [&](int64_t) { return wide_k; });
        for (int64_t first = 0; first < rows; first += TILE_ROWS) {
            if (first) product_rows(U.rows(first), L.rows(first), U, first, wide_v, true);
            const Matrix own = U.rows(first), by = {L.row(first) + first, L.stride};
            for (int64_t c = 0; c < wide_v; c += WIDTH)
                for (int i = 1; i < TILE_ROWS; i++) {
                    Vec u = load(own.row(i) + c);
                    for (int j = 0; j < i; j++) u += load(own.row(j) + c) * by.row(i)[j];
                    store(own.row(i) + c, u);
                }
        }
    }
};

// Whole sequences by Work, which is made once per thread.
template <class Work, class T>
int run_chunks(T* o, const float* initial, float* final, const Shape& shape, const Inputs<T>& in, int threads) {
    int failed = 0;
    const int64_t size = shape.K * shape.V;
    parallel(shape.N * shape.Hv, 1, threads, [&](int64_t from, int64_t to) {
        Work chunks(shape, in);
        if (!chunks.memory.memory) {
            failed = 2;
            return;
        }
        for (int64_t item = from; item < to; item++) {
            const int64_t n = item / shape.Hv, row = in.bounds ? 0 : n;
            const int64_t begin = in.bounds ? in.bounds[n] : 0, end = in.bounds ? in.bounds[n + 1] : shape.T;
            chunks.run(o, initial ? initial + item * size : nullptr, final + item * size, row, item % shape.Hv, begin,
                       end);
        }
    });
    return failed;
}

// One token of one head. The state's rows are contiguous along V: a few columns at a time, all of K.
template <int VECTORS, bool DELTA>
inline void step_columns(float* S, int64_t stride, const float* a, const float* k, const float* q, float kq, float beta,
                         const float* v, float* o, int64_t K) {
    Vec values[VECTORS], seen[VECTORS] = {}, out[VECTORS] = {};
    for (int j = 0; j < VECTORS; j++) values[j] = load(v + j * WIDTH);
    if (DELTA) {
        for (int64_t c = 0; c < K; c++)
            for (int j = 0; j < VECTORS; j++) {
                const Vec s = load(S + c * stride + j * WIDTH) * a[c];
                seen[j] += s * k[c];
                out[j] += s * q[c];
            }
        for (int j = 0; j < VECTORS; j++) {
            values[j] = (values[j] - seen[j]) * beta;
            out[j] += values[j] * kq;
        }
    }
    for (int64_t c = 0; c < K; c++)
        for (int j = 0; j < VECTORS; j++) {
            const Vec s = load(S + c * stride + j * WIDTH) * a[c] + values[j] * k[c];
            store(S + c * stride + j * WIDTH, s);
            if (!DELTA) out[j] += s * q[c];
        }
    for (int j = 0; j < VECTORS; j++) store(o + j * WIDTH, out[j]);
}

// The same for a state whose columns are contiguous along K: one column after the other.
template <bool DELTA>
inline void step_column(float* S, const float* a, const float* k, const float* q, float kq, float beta, float v,
                        float* o, int64_t K) {
    const int64_t whole = K / WIDTH * WIDTH;
    Vec seen = {}, out = {};
    float u = v;
    if (DELTA) {
        for (int64_t c = 0; c < whole; c += WIDTH) {
            const Vec s = load(S + c) * load(a + c);
            seen += s * load(k + c);
            out += s * load(q + c);
        }
        float more = 0;
        for (int64_t c = whole; c < K; c++) more += S[c] * a[c] * k[c];
        u = (v - (quick_sum(seen) + more)) * beta;
    }
    float rest = 0;
    for (int64_t c = 0; c < whole; c += WIDTH) {
        const Vec s = load(S + c) * load(a + c) + load(k + c) * u;
        store(S + c, s);
        if (!DELTA) out += s * load(q + c);
    }
    for (int64_t c = whole; c < K; c++) {
        if (DELTA) rest += S[c] * a[c] * q[c];
        S[c] = S[c] * a[c] + k[c] * u;
        if (!DELTA) rest += S[c] * q[c];
    }
    *o = quick_sum(out) + rest + (DELTA ? kq * u : 0);
}

template <class T, bool DELTA> struct Step {
    const Shape& shape;
    const Inputs<T>& in;
    const int64_t wide_k, wide_v;
    Scratch memory;
    float *q, *k, *a, *v, *o;

    Step(const Shape& shape, const Inputs<T>& in)
        : shape(shape), in(in), wide_k(round_up(shape.K, 16)), wide_v(round_up(shape.V, 16)),
          memory(sizeof(float) * (3 * wide_k + 2 * wide_v)), q((float*)memory.memory), k(q + wide_k), a(k + wide_k),
          v(a + wide_k), o(v + wide_v) {}

    void run(T* out, float* S, int64_t row, int64_t head) {
        const int64_t shared = head * shape.H / shape.Hv;
        for (int64_t t = 0; t < shape.T; t++) {
            unpack(q, in.q + row * shape.q.row + t * shape.q.token + shared * shape.q.head, shape.K, wide_k);
            unpack(k, in.k + row * shape.k.row + t * shape.k.token + shared * shape.k.head, shape.K, wide_k);
            unpack(v, in.v + row * shape.v.row + t * shape.v.token + head * shape.v.head, shape.V, wide_v);
            if (in.unit) make_unit(q, wide_k), make_unit(k, wide_k);
            const float* g = in.decay + row * shape.decay.row + t * shape.decay.token + head * shape.decay.head;
            if (in.decay && shape.decay.component) {
                unpack(a, g, shape.K, wide_k);
                for (int64_t c = 0; c < wide_k; c += WIDTH) store(a + c, exp(load(a + c)));
            } else {
                const Vec factor = Vec{} + (in.decay ? __builtin_expf(*g) : 1.f);
                for (int64_t c = 0; c < wide_k; c += WIDTH) store(a + c, factor);
            }
            const float beta =
                DELTA ? in.beta[row * shape.beta.row + t * shape.beta.token + head * shape.beta.head] : 1.f;
            Vec products = {};
            for (int64_t c = 0; c < wide_k; c += WIDTH) products += load(q + c) * load(k + c);
            token(S, sum(products), beta);
            pack(out + ((row * shape.T + t) * shape.Hv + head) * shape.V, o, in.scale, shape.V);
        }
    }

    void token(float* S, float kq, float beta) {
        const int64_t stride = shape.state.k;
        if (shape.state.v != 1) {
            for (int64_t j = 0; j < shape.V; j++)
                step_column<DELTA>(S + j * shape.state.v, a, k, q, kq, beta, v[j], o + j, shape.K);
            return;
        }
        int64_t j = 0;
        for (; j + 4 * WIDTH <= shape.V; j += 4 * WIDTH)
            step_columns<4, DELTA>(S + j, stride, a, k, q, kq, beta, v + j, o + j, shape.K);
        for (; j + WIDTH <= shape.V; j += WIDTH)
            step_columns<1, DELTA>(S + j, stride, a, k, q, kq, beta, v + j, o + j, shape.K);
        for (; j < shape.V; j++) {
            float seen = 0, out = 0, u = v[j];
            for (int64_t c = 0; DELTA && c < shape.K; c++) seen += S[c * stride + j] * a[c] * k[c];
            if (DELTA) u = (u - seen) * beta;
            for (int64_t c = 0; c < shape.K; c++) {
                float& s = S[c * stride + j];
                s = s * a[c] + k[c] * u;
                out += s * q[c];
            }
            o[j] = out;
        }
    }
};

template <class T, bool DELTA> int run_step(T* o, float* state, const Shape& shape, const Inputs<T>& in, int threads) {
    int failed = 0;
    const int64_t items = shape.N * shape.Hv;
    parallel(items, 1, threads_for(items * shape.K * shape.V * 8, threads), [&](int64_t from, int64_t to) {
        Step<T, DELTA> step(shape, in);
        if (!step.memory.memory) {
            failed = 2;
            return;
        }
        for (int64_t item = from; item < to; item++) {
            const int64_t row = item / shape.Hv, head = item % shape.Hv;
            step.run(o, state + row * shape.state.row + head * shape.state.head, row, head);
        }
    });
    return failed;
}

}  // namespace
