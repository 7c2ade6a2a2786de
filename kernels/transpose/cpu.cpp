// y[c, r] = x[r, c] for matrices one after the other, tile by tile, so that both sides stay in cache.
#include "../simd.h"

namespace {

constexpr int64_t TILE = 64;

// x [count, R, C], y [count, C, R] of elements of `size` bytes
struct TransposeArguments {
    int32_t size, threads;
    void* y;
    const void* x;
    int64_t count, R, C;
};

template <typename T>
void transpose(const TransposeArguments& in) {
    const int64_t R = in.R, C = in.C, down = (R + TILE - 1) / TILE;
    parallel(in.count * down, 1, threads_for(in.count * R * C * sizeof(T), in.threads),
             [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            const T* x = (const T*)in.x + i / down * R * C;
            T* y = (T*)in.y + i / down * R * C;
            const int64_t first = i % down * TILE, past = first + TILE < R ? first + TILE : R;
            for (int64_t left = 0; left < C; left += TILE) {
                const int64_t right = left + TILE < C ? left + TILE : C;
                for (int64_t c = left; c < right; c++)
                    for (int64_t r = first; r < past; r++) y[c * R + r] = x[r * C + c];
            }
        }
    });
}

}  // namespace

HASTEN_EXPORT(transpose, TransposeArguments)(const TransposeArguments& in) {
    if (in.size == 2)
        transpose<uint16_t>(in);
    else if (in.size == 4)
        transpose<uint32_t>(in);
    else
        return 1;
    return 0;
}
