// Short depthwise causal convolution: y[t] = act(bias + sum_w weight[w] x[t - (W - 1) + w]), channel by channel.
#include "../vector_math.h"

namespace {

constexpr int MAX_WIDTH = 8;
constexpr int64_t CHANNELS = 512;  // whose weights stay in the first cache while tokens pass
constexpr int64_t TOKENS = 64;

// One token: `channels` of y from the inputs at from[w], null where there are none
template <class T>
void convolve(T* y, const T* const* from, const float* weight, int64_t stride, const float* bias, int64_t W,
              int64_t channels, bool activate) {
    for (int64_t d = 0; d < channels; d += WIDTH) {
        const int64_t count = smaller(WIDTH, channels - d);
        const bool whole = count == WIDTH;
        Vec sum = !bias ? Vec{} : whole ? load(bias + d) : load_part(bias + d, count);
        for (int64_t w = 0; w < W; w++) {
            if (!from[w]) continue;
            const float* factor = weight + w * stride + d;
            if (whole) sum += load(from[w] + d) * load(factor);
            else sum += load_part(from[w] + d, count) * load_part(factor, count);
        }
        if (activate) sum = silu(sum);
        if (whole) store(y + d, sum);
        else store_part(y + d, sum, count);
    }
}

// The tokens of one channel, contiguous: y from x, with the W - 1 inputs before them, or null for zeros
template <class T>
void convolve_channel(T* y, const T* x, const T* before, const float* weight, float bias, int64_t W, int64_t tokens,
                      bool activate) {
    for (int64_t t = 0; t < tokens; t += WIDTH) {
        const int64_t count = smaller(WIDTH, tokens - t);
        T edge[WIDTH + MAX_WIDTH] = {};
        const T* from = x + t - (W - 1);
        if (t < W - 1 || count < WIDTH) {
            for (int64_t i = 0; i < count + W - 1; i++) {
                const int64_t at = t - (W - 1) + i;
                if (at >= 0) edge[i] = x[at];
                else if (before) edge[i] = before[at + W - 1];
            }
            from = edge;
        }
        Vec sum = Vec{} + bias;
        for (int64_t w = 0; w < W; w++) sum += load(from + w) * weight[w];
        if (activate) sum = silu(sum);
        if (count == WIDTH) store(y + t, sum);
        else store_part(y + t, sum, count);
    }
}

// x, y of B rows, T tokens, D channels, x with strides in elements; initial and bounds null or of N sequences.
struct CausalConv1dArguments {
    int32_t dtype, threads, silu, unused;
    void* y;
    const void* x;
    const float *weight, *bias;
    const void* initial;
    const int64_t* bounds;
    int64_t N, B, T, D, W, row_stride, token_stride, channel_stride;
};

// x, y [B][D][T], state [B][D][S] shifted in place, weight [D][W]
struct CausalConv1dUpdateArguments {
    int32_t dtype, threads, silu, unused;
    void* y;
    const void* x;
    void* state;
    const float *weight, *bias;
    int64_t B, D, T, S, W;
};

}  // namespace

// x with contiguous channels, y [B][T][D]; weight [W][D], initial [N][W - 1][D]
HASTEN_EXPORT(causal_conv1d, CausalConv1dArguments)(const CausalConv1dArguments& in) {
    const int64_t N = in.N, D = in.D, W = in.W, tokens = in.B * in.T;
    const int64_t* const bounds = in.bounds;
    const float *const weight = in.weight, *const bias = in.bias;
    if (W > MAX_WIDTH) return 1;
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        const T *x = (const T*)in.x, *initial = (const T*)in.initial;
        parallel(tokens, TOKENS, threads_for(tokens * D * sizeof(T), in.threads), [&](int64_t from, int64_t to) {
            for (int64_t block = from; block < to; block += TOKENS)
                for (int64_t d = 0; d < D; d += CHANNELS) {
                    int64_t n = 0;
                    for (int64_t token = block; token < smaller(to, block + TOKENS); token++) {
                        int64_t row = 0, t = token, begin = 0;
                        if (bounds) {
                            while (n + 1 < N && bounds[n + 1] <= token) n++;
                            begin = bounds[n];
                        } else {
                            row = n = token / in.T;
                            t = token % in.T;
                        }
                        const T* inputs[MAX_WIDTH];
                        for (int64_t w = 0; w < W; w++) {
                            const int64_t at = t - (W - 1) + w;
                            if (at >= begin) inputs[w] = x + row * in.row_stride + at * in.token_stride + d;
                            else inputs[w] = initial ? initial + (n * (W - 1) + at - begin + W - 1) * D + d : nullptr;
                        }
                        convolve((T*)in.y + token * D + d, inputs, weight + d, D, bias ? bias + d : nullptr, W,
                                 smaller(CHANNELS, D - d), in.silu);
                    }
                }
        });
        return 0;
    });
}

// x with contiguous tokens, y [B][D][T]; weight [D][W], initial [N][D][W - 1]
HASTEN_EXPORT(causal_conv1d_by_channel, CausalConv1dArguments)(const CausalConv1dArguments& in) {
    const int64_t N = in.N, D = in.D, W = in.W;
    const int64_t* const bounds = in.bounds;
    if (W > MAX_WIDTH) return 1;
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        parallel(in.B * D, 1, threads_for(in.B * D * in.T * sizeof(T), in.threads), [&](int64_t from, int64_t to) {
            for (int64_t channel = from; channel < to; channel++) {
                const int64_t b = channel / D, d = channel % D;
                const T* inputs = (const T*)in.x + b * in.row_stride + d * in.channel_stride;
                for (int64_t n = bounds ? 0 : b; n < (bounds ? N : b + 1); n++) {
                    const int64_t begin = bounds ? bounds[n] : 0, end = bounds ? bounds[n + 1] : in.T;
                    const T* before = in.initial ? (const T*)in.initial + (n * D + d) * (W - 1) : nullptr;
                    convolve_channel((T*)in.y + channel * in.T + begin, inputs + begin, before, in.weight + d * W,
                                     in.bias ? in.bias[d] : 0, W, end - begin, in.silu);
                }
            }
        });
        return 0;
    });
}

HASTEN_EXPORT(causal_conv1d_update, CausalConv1dUpdateArguments)(const CausalConv1dUpdateArguments& in) {
    const int64_t D = in.D, T_new = in.T, S = in.S, W = in.W;
    const float *const weight = in.weight, *const bias = in.bias;
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        T *state = (T*)in.state, *y = (T*)in.y;
        parallel(in.B * D, WIDTH, threads_for(in.B * D * (S + T_new) * sizeof(T), in.threads),
                 [&](int64_t from, int64_t to) {
            for (int64_t first = from; first < to; first += WIDTH) {
                const int64_t count = smaller(WIDTH, to - first);
                T* states = state + first * S;
                const T* inputs = (const T*)in.x + first * T_new;
                for (int64_t t = 0; t < T_new; t++) {
                    alignas(64) float sums[WIDTH] = {};
                    for (int64_t c = 0; c < count; c++) {
                        const float* factor = weight + (first + c) % D * W;
                        float sum = bias ? bias[(first + c) % D] : 0;
                        for (int64_t w = 0; w < W; w++) {
                            const int64_t at = t - (W - 1) + w;
                            sum += factor[w] * to_float(at < 0 ? states[c * S + S + at] : inputs[c * T_new + at]);
                        }
                        sums[c] = sum;
                    }
                    Vec out = load(sums);
                    if (in.silu) out = silu(out);
                    for (int64_t c = 0; c < count; c++) from_float(out[c], y[(first + c) * T_new + t]);
                }
                for (int64_t c = 0; S && c < count; c++) {  // a state of no inputs has no address
                    const int64_t kept = T_new < S ? S - T_new : 0, added = S - kept;
                    memmove(states + c * S, states + c * S + S - kept, sizeof(T) * kept);
                    memcpy(states + c * S + kept, inputs + c * T_new + T_new - added, sizeof(T) * added);
                }
            }
        });
        return 0;
    });
}
