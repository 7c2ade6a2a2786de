// RWKV-4's recurrence: lanes are channels, one token after the other.
#include "../../vector_math.h"

namespace {

constexpr int64_t CHANNELS = 64;  // of a block: two cache lines of halves

// key and value with contiguous channels and strides in elements; y [B][T][D]
struct WkvArguments {
    int32_t dtype, threads;
    void* y;
    const void *key, *value;
    const float *time_decay, *time_first;            // [D]
    const float *numerator, *denominator, *maximum;  // [B][D] each, or null: nothing, and the lowest maximum
    float *last_numerator, *last_denominator, *last_maximum;
    int64_t B, T, D, key_row, key_token, value_row, value_token;
};

// A weighted mean's sums over exp(maximum).
struct Sums {
    Vec numerator, denominator, maximum;
};

// With a value whose weight is exp(k). Of the two factors one is exp(0).
inline Sums with(const Sums& sums, Vec k, Vec v) {
    const Vec one = Vec{} + 1.f, ahead = sums.maximum - k, factor = exp(ahead > Vec{} ? -ahead : ahead);
    const Vec past = ahead > Vec{} ? one : factor, present = ahead > Vec{} ? factor : one;
    return {past * sums.numerator + present * v, past * sums.denominator + present, larger(sums.maximum, k)};
}

template <class T> inline Vec load_up_to(const T* from, int64_t count) {
    return count >= WIDTH ? load(from) : load_part(from, count);
}
template <class T> inline void store_up_to(T* to, Vec v, int64_t count) {
    if (count >= WIDTH) store(to, v);
    else store_part(to, v, count);
}

// `count` channels of a row from channel c on
template <class T> void run(const WkvArguments& in, int64_t row, int64_t c, int64_t count) {
    constexpr int VECTORS = CHANNELS / WIDTH;
    const int64_t at = row * in.D + c;
    Vec decay[VECTORS], first[VECTORS];
    Sums sums[VECTORS];
    for (int64_t i = 0, j = 0; i < count; i += WIDTH, j++) {
        decay[j] = exp(load_up_to(in.time_decay + c + i, count - i));
        first[j] = load_up_to(in.time_first + c + i, count - i);
        if (in.maximum)
            sums[j] = {load_up_to(in.numerator + at + i, count - i), load_up_to(in.denominator + at + i, count - i),
                       load_up_to(in.maximum + at + i, count - i)};
        else sums[j] = {Vec{}, Vec{}, Vec{} - 1e38f};
    }
    const T* key = (const T*)in.key + row * in.key_row + c;
    const T* value = (const T*)in.value + row * in.value_row + c;
    T* y = (T*)in.y + row * in.T * in.D + c;
    for (int64_t t = 0; t < in.T; t++) {
        for (int64_t i = 0, j = 0; i < count; i += WIDTH, j++) {
            const Vec k = load_up_to(key + i, count - i), v = load_up_to(value + i, count - i);
            const Sums now = with(sums[j], k + first[j], v);
            store_up_to(y + i, now.numerator / now.denominator, count - i);
            sums[j].maximum -= decay[j];
            sums[j] = with(sums[j], k, v);
        }
        key += in.key_token;
        value += in.value_token;
        y += in.D;
    }
    for (int64_t i = 0, j = 0; i < count; i += WIDTH, j++) {
        store_up_to(in.last_numerator + at + i, sums[j].numerator, count - i);
        store_up_to(in.last_denominator + at + i, sums[j].denominator, count - i);
        store_up_to(in.last_maximum + at + i, sums[j].maximum, count - i);
    }
}

}  // namespace

HASTEN_EXPORT(wkv, WkvArguments)(const WkvArguments& in) {
    const int64_t blocks = (in.D + CHANNELS - 1) / CHANNELS;
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        const int threads = threads_for(in.B * in.T * in.D * 16, in.threads);
        parallel(in.B * blocks, 1, threads, [&](int64_t from, int64_t to) {
            for (int64_t item = from; item < to; item++) {
                const int64_t c = item % blocks * CHANNELS;
                run<T>(in, item / blocks, c, smaller(CHANNELS, in.D - c));
            }
        });
        return 0;
    });
}
