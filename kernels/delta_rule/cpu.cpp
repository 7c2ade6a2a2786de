// The delta rule: the recurrence with its correction.
#include "../recurrence.h"

HASTEN_EXPORT(hasten_delta_rule)
(int dtype, void* o, const void* q, const void* k, const void* v, const float* beta, const float* decay, const float* initial, float* final,
 const int64_t* bounds, const Shape* shape, float scale, int unit, int threads) {
    return with_dtype(dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        const Inputs<T> in = {(const T*)q, (const T*)k, (const T*)v, decay, beta, bounds, scale, unit != 0};
        return run_chunks<Chunks<T, true>>((T*)o, initial, final, *shape, in, threads);
    });
}

HASTEN_EXPORT(hasten_delta_rule_step)
(int dtype, void* o, const void* q, const void* k, const void* v, const float* beta, const float* decay, float* state, const Shape* shape,
 float scale, int unit, int threads) {
    return with_dtype(dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        const Inputs<T> in = {(const T*)q, (const T*)k, (const T*)v, decay, beta, nullptr, scale, unit != 0};
        return run_step<T, true>((T*)o, state, *shape, in, threads);
    });
}
