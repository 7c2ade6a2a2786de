// y[c, r] = x[r, c] for matrices one after the other.
//
// A tile of x is copied together first, since rows of x that lie a power of two apart share few lines of the cache,
// then transposed in registers, and written past the cache, which would read what it writes.
#include "../simd.h"

namespace {

constexpr int64_t ROWS = 64;        // of x in a tile: pieces of a row of y
constexpr int64_t ROW_BYTES = 512;  // of a row of x in a tile
constexpr int64_t VECTOR = 16;      // bytes

// x [count, R, C], y [count, C, R] of elements of `size` bytes
struct TransposeArguments {
    int32_t size, threads;
    void* y;
    const void* x;
    int64_t count, R, C;
};

template <class T> using Lanes __attribute__((vector_size(VECTOR))) = T;

// a0 b0 a1 b1 ... of the lower halves of a and b, and of the upper ones.
#if defined(__clang__)
#define HASTEN_PICK(a, b, V, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HASTEN_PICK(a, b, V, ...) __builtin_shuffle(a, b, V{__VA_ARGS__})
#endif
typedef Lanes<uint16_t> Lanes2;
typedef Lanes<uint32_t> Lanes4;
inline Lanes2 low(Lanes2 a, Lanes2 b) { return HASTEN_PICK(a, b, Lanes2, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Lanes2 high(Lanes2 a, Lanes2 b) { return HASTEN_PICK(a, b, Lanes2, 4, 12, 5, 13, 6, 14, 7, 15); }
inline Lanes4 low(Lanes4 a, Lanes4 b) { return HASTEN_PICK(a, b, Lanes4, 0, 4, 1, 5); }
inline Lanes4 high(Lanes4 a, Lanes4 b) { return HASTEN_PICK(a, b, Lanes4, 2, 6, 3, 7); }
#undef HASTEN_PICK

// A square of as many rows as a vector has elements: each stage interleaves the first half of the rows with the second.
template <class T> inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
    constexpr int N = VECTOR / sizeof(T);
    Lanes<T> rows[N], mixed[N];
    for (int i = 0; i < N; i++) rows[i] = load_bits<Lanes<T>>(from + i * from_stride);
    for (int stage = 1; stage < N; stage *= 2) {
        for (int i = 0; i < N / 2; i++) {
            mixed[2 * i] = low(rows[i], rows[i + N / 2]);
            mixed[2 * i + 1] = high(rows[i], rows[i + N / 2]);
        }
        memcpy(rows, mixed, sizeof(rows));
    }
    for (int i = 0; i < N; i++) memcpy(to + i * to_stride, &rows[i], VECTOR);
}

// `from` is aligned to VECTOR.
template <class T> inline void write(T* to, const T* from, int64_t count) {
#if defined(__x86_64__)
    if (!((uintptr_t)to % VECTOR || sizeof(T) * count % VECTOR)) {
        for (int64_t i = 0; i < count; i += VECTOR / sizeof(T))
            _mm_stream_si128((__m128i*)(to + i), _mm_load_si128((const __m128i*)(from + i)));
        return;
    }
#endif
    memcpy(to, from, sizeof(T) * count);
}

template <class T> void transpose(const TransposeArguments& in) {
    constexpr int64_t N = VECTOR / sizeof(T), COLUMNS = ROW_BYTES / sizeof(T);
    const int64_t R = in.R, C = in.C, strips = (R + ROWS - 1) / ROWS;
    const int threads = threads_for(in.count * R * C * sizeof(T), in.threads);
    parallel(in.count * strips, 1, threads, [&](int64_t job, int64_t end) {
        alignas(64) T tile[ROWS * COLUMNS] = {}, turned[COLUMNS * ROWS];
        for (; job < end; job++) {
            const int64_t first = job % strips * ROWS, rows = smaller(ROWS, R - first);
            const T* x = (const T*)in.x + (job / strips * R + first) * C;
            T* y = (T*)in.y + job / strips * R * C + first;
            for (int64_t left = 0; left < C; left += COLUMNS) {
                const int64_t columns = smaller(COLUMNS, C - left);
                for (int64_t r = 0; r < rows; r++) memcpy(tile + r * COLUMNS, x + r * C + left, sizeof(T) * columns);
                for (int64_t r = 0; r < rows; r += N)
                    for (int64_t c = 0; c < columns; c += N)
                        transpose_square(tile + r * COLUMNS + c, COLUMNS, turned + c * ROWS + r, ROWS);
                for (int64_t c = 0; c < columns; c++) write(y + (left + c) * R, turned + c * ROWS, rows);
            }
        }
#if defined(__x86_64__)
        _mm_sfence();  // what was written past the cache is seen by whoever waits for this thread
#endif
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
