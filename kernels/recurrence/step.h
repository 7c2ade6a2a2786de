// The recurrence token by token: decode, and chunks in which something is not finite.
#pragma once
#include "recurrence.h"

namespace {

// One token of one head, a being decays less 1. The state's rows are contiguous along V: a few columns at a time, all
// of K.
template <int VECTORS, bool DELTA>
inline void step_columns(float* S, int64_t stride, const float* a, const float* k, const float* q, float kq, float beta,
                         const float* v, float* o, int64_t K) {
    Vec values[VECTORS], seen[VECTORS] = {}, out[VECTORS] = {};
    for (int j = 0; j < VECTORS; j++) values[j] = load(v + j * WIDTH);
    if (DELTA) {
        for (int64_t c = 0; c < K; c++)
            for (int j = 0; j < VECTORS; j++) {
                const Vec before = load(S + c * stride + j * WIDTH), s = before + before * a[c];
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
            const Vec before = load(S + c * stride + j * WIDTH), s = before + before * a[c] + values[j] * k[c];
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
            const Vec before = load(S + c), s = before + before * load(a + c);
            seen += s * load(k + c);
            out += s * load(q + c);
        }
        float more = 0;
        for (int64_t c = whole; c < K; c++) more += (S[c] + S[c] * a[c]) * k[c];
        u = (v - (quick_sum(seen) + more)) * beta;
    }
    float rest = 0;
    for (int64_t c = 0; c < whole; c += WIDTH) {
        const Vec before = load(S + c), s = before + before * load(a + c) + load(k + c) * u;
        store(S + c, s);
        if (!DELTA) out += s * load(q + c);
    }
    for (int64_t c = whole; c < K; c++) {
        const float s = S[c] + S[c] * a[c];
        if (DELTA) rest += s * q[c];
        S[c] = s + k[c] * u;
        if (!DELTA) rest += S[c] * q[c];
    }
    *o = quick_sum(out) + rest + (DELTA ? kq * u : 0);
}

// Tokens of a head on a state [K, V] with strides.
template <class T, bool DELTA> struct Steps {
    const Shape& shape;
    const Inputs<T>& in;
    const int64_t wide_k, width;  // width: columns of the state
    Scratch memory;
    float *q, *k, *a, *v, *o;

    Steps(const Shape& shape, const Inputs<T>& in)
        : shape(shape), in(in), wide_k(round_up(shape.K, 16)), width(shape.V + in.ones),
          memory(sizeof(float) * (3 * wide_k + 2 * round_up(width, 16))), q((float*)memory.memory), k(q + wide_k),
          a(k + wide_k), v(a + wide_k), o(v + round_up(width, 16)) {}

    void run(void* out, float* S, int64_t stride_k, int64_t stride_v, int64_t row, int64_t head, int64_t t) {
        gather(q, in.q_at(shape, row, head, t), shape.q.component, shape.K, wide_k);
        gather(k, in.k_at(shape, row, head, t), shape.k.component, shape.K, wide_k);
        gather(v, in.v_at(shape, row, head, t), shape.v.component, shape.V, round_up(width, 16));
        if (in.ones) v[shape.V] = 1;
        if (in.unit) make_unit(q, wide_k), make_unit(k, wide_k);
        if (in.decay && shape.decay.component) {
            unpack(a, in.decay_at(shape, row, head, t), shape.K, wide_k);
            for (int64_t c = 0; c < wide_k; c += WIDTH) store(a + c, expm1(load(a + c)));
        } else {
            const Vec factor = Vec{} + (in.decay ? __builtin_expm1f(*in.decay_at(shape, row, head, t)) : 0.f);
            for (int64_t c = 0; c < wide_k; c += WIDTH) store(a + c, factor);
        }
        const float beta = in.beta ? *in.beta_at(shape, row, head, t) : 1.f;
        if (!DELTA && in.beta) multiply(v, beta, round_up(width, 16));
        Vec products = {};
        for (int64_t c = 0; c < wide_k; c += WIDTH) products += load(q + c) * load(k + c);
        token(S, stride_k, stride_v, sum(products), beta);
        in.write(out, shape, row, head, t, o);
    }

    void token(float* S, int64_t stride, int64_t stride_v, float kq, float beta) {
        if (stride_v != 1) {
            for (int64_t j = 0; j < width; j++)
                step_column<DELTA>(S + j * stride_v, a, k, q, kq, beta, v[j], o + j, shape.K);
            return;
        }
        int64_t j = 0;
        for (; j + 4 * WIDTH <= width; j += 4 * WIDTH)
            step_columns<4, DELTA>(S + j, stride, a, k, q, kq, beta, v + j, o + j, shape.K);
        for (; j + WIDTH <= width; j += WIDTH)
            step_columns<1, DELTA>(S + j, stride, a, k, q, kq, beta, v + j, o + j, shape.K);
        for (; j < width; j++) {
            float seen = 0, out = 0, u = v[j];
            for (int64_t c = 0; DELTA && c < shape.K; c++) {
                const float s = S[c * stride + j];
                seen += (s + s * a[c]) * k[c];
            }
            if (DELTA) u = (u - seen) * beta;
            for (int64_t c = 0; c < shape.K; c++) {
                float& s = S[c * stride + j];
                s = s + s * a[c] + k[c] * u;
                out += s * q[c];
            }
            o[j] = out;
        }
    }
};

template <class T, bool DELTA>
int run_step(void* o, float* state, const Shape& shape, const Inputs<T>& in, int threads) {
    int failed = 0;
    const int64_t items = shape.N * shape.Hv;
    parallel(items, 1, threads_for(items * shape.K * shape.V * 8, threads), [&](int64_t from, int64_t to) {
        Steps<T, DELTA> steps(shape, in);
        if (!steps.memory.memory) {
            failed = 2;
            return;
        }
        for (int64_t item = from; item < to; item++) {
            const int64_t row = item / shape.Hv, head = item % shape.Hv;
            float* const S = state + row * shape.state.row + head * shape.state.head;
            for (int64_t t = 0; t < shape.T; t++) steps.run(o, S, shape.state.k, shape.state.v, row, head, t);
        }
    });
    return failed;
}

}  // namespace
