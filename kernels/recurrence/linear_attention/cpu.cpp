// Linear attention: the recurrence without a correction.
#include "../bf16.h"

namespace {

template <class T>
int attend(T* o, const float* initial, float* final, const Shape& shape, const Inputs<T>& in, int threads) {
    return run_chunks<Chunks<T, false>>(o, initial, final, shape, in, threads);
}

#if defined(__AVX512BF16__)
template <>
int attend(bf16* o, const float* initial, float* final, const Shape& shape, const Inputs<bf16>& in, int threads) {
    if (shape.decay.component) return run_chunks<Chunks<bf16, false>>(o, initial, final, shape, in, threads);
    return run_chunks<Bf16Chunks>(o, initial, final, shape, in, threads);
}
#endif

}  // namespace

HASTEN_EXPORT(linear_attention, RecurrenceArguments)(const RecurrenceArguments& in) {
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        return attend<T>((T*)in.o, in.initial, in.state, in.shape, Inputs<T>(in), in.threads);
    });
}

HASTEN_EXPORT(linear_attention_step, RecurrenceArguments)(const RecurrenceArguments& in) {
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        return run_step<T, false>((T*)in.o, in.state, in.shape, Inputs<T>(in), in.threads);
    });
}
