// Linear attention: the recurrence without a correction.
#include "../recurrence.h"

HASTEN_EXPORT(hasten_linear_attention)
(int dtype, void* o, const void* q, const void* k, const void* v, const float* decay, const float* initial, float* final,
 const int64_t* bounds, const Shape* shape, float scale, int threads) {
    return with_dtype(dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        const Inputs<T> in = {(const T*)q, (const T*)k, (const T*)v, decay, nullptr, bounds, scale, false};
        return run_chunks<T, false>((T*)o, initial, final, *shape, in, threads);
    });
}

HASTEN_EXPORT(hasten_linear_attention_step)
(int dtype, void* o, const void* q, const void* k, const void* v, const float* decay, float* state, const Shape* shape,
 float scale, int threads) {
    return with_dtype(dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        const Inputs<T> in = {(const T*)q, (const T*)k, (const T*)v, decay, nullptr, nullptr, scale, false};
        return run_step<T, false>((T*)o, state, *shape, in, threads);
    });
}
