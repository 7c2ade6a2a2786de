// Linear attention: the recurrence without a correction.
#include "../recurrence_bf16.h"

namespace {

template <class T> int attend(T* o, const float* initial, float* final, const Shape& shape, const Inputs<T>& in, int threads) {
    return run_chunks<Chunks<T, false>>(o, initial, final, shape, in, threads);
}

#if defined(__AVX512BF16__)
template <> int attend(bf16* o, const float* initial, float* final, const Shape& shape, const Inputs<bf16>& in, int threads) {
    if (shape.decay[3]) return run_chunks<Chunks<bf16, false>>(o, initial, final, shape, in, threads);
    return run_chunks<Bf16Chunks>(o, initial, final, shape, in, threads);
}
#endif

}  // namespace

HASTEN_EXPORT(hasten_linear_attention)
(int dtype, void* o, const void* q, const void* k, const void* v, const float* decay, const float* initial, float* final,
 const int64_t* bounds, const Shape* shape, float scale, int threads) {
    return with_dtype(dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        const Inputs<T> in = {(const T*)q, (const T*)k, (const T*)v, decay, nullptr, bounds, scale, false};
        return attend<T>((T*)o, initial, final, *shape, in, threads);
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
