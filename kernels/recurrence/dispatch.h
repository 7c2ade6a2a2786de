// Which form of the recurrence a call takes.
#pragma once
#include "chunks.h"
#include "tiled.h"

namespace {

template <bool DELTA, class T> int chunks_of(const RecurrenceArguments& in, const T*) {
    return run_chunks<Chunks<T, DELTA>>(in.o, in.initial, in.state, in.shape, Inputs<T>(in), in.threads);
}

#if defined(HASTEN_TILES)
template <bool DELTA> int chunks_of(const RecurrenceArguments& in, const bf16*) {
    const Inputs<bf16> inputs(in);
    // Keys of few components are nearly parallel: what the delta rule corrects then magnifies what was rounded.
    if (DELTA && in.shape.K < TILE)
        return run_chunks<Chunks<bf16, DELTA>>(in.o, in.initial, in.state, in.shape, inputs, in.threads);
    if (in.decay && in.shape.decay.component)
        return run_chunks<TiledChunks<DELTA, true>>(in.o, in.initial, in.state, in.shape, inputs, in.threads);
    return run_chunks<TiledChunks<DELTA, false>>(in.o, in.initial, in.state, in.shape, inputs, in.threads);
}
#endif

template <bool DELTA> int chunks(const RecurrenceArguments& in) {
    return with_dtype(in.dtype, [&](auto stored) { return chunks_of<DELTA>(in, stored); });
}

template <bool DELTA> int steps(const RecurrenceArguments& in) {
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        return run_step<T, DELTA>(in.o, in.state, in.shape, Inputs<T>(in), in.threads);
    });
}

}  // namespace
