// The delta rule: the recurrence with its correction.
#include "../recurrence.h"

HASTEN_EXPORT(delta_rule, RecurrenceArguments)(const RecurrenceArguments& in) {
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        return run_chunks<Chunks<T, true>>((T*)in.o, in.initial, in.state, in.shape, Inputs<T>(in), in.threads);
    });
}

HASTEN_EXPORT(delta_rule_step, RecurrenceArguments)(const RecurrenceArguments& in) {
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        return run_step<T, true>((T*)in.o, in.state, in.shape, Inputs<T>(in), in.threads);
    });
}
