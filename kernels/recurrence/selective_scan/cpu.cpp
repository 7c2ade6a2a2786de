// The selective scan: h = exp(dt A) h + dt B x and y = (C h + D x) silu(z), where every channel has N components.
//
// Lanes are channels: the sum over components then takes no sum across lanes, and a few components at a time stay in
// registers from token to token, each a chain of its own. States lie with their components together, and are transposed
// before and after; for a single token, where that would be most of the work, lanes are components. A thread takes
// blocks of channels, whose tokens it first brings into its cache as floats, whatever their dtype and layout are.
#include "../../vector_math.h"

namespace {

constexpr int64_t TOKENS = 64;    // of a chunk: what a block of channels needs of them stays in the first cache
constexpr int64_t CHANNELS = 32;  // of a block: a cache line of halves
constexpr int COMPONENTS = 4;       // whose states stay in registers

// A tensor of rows, tokens, and channels or components, with its strides in elements.
struct StridedTokens {
    const void* data;  // null: none
    int64_t dtype, row, token, component;
};

struct SelectiveScanArguments {
    int32_t dtype, threads;     // of y
    void* y;                    // [rows][T][D]
    const float *A, *D, *bias;  // [D][N]; [D] or null
    const float* initial;       // null: zeros
    float* state;               // the final ones, [D][N] each
    const int64_t* bounds;      // null: sequence n is row n of the batch; else tokens bounds[n] to bounds[n + 1]
    int32_t* grows;             // null, or where to write 1, and compute nothing, if an A is positive
    int64_t sequences, T, channels, N, initial_stride, state_stride;  // of a sequence
    int32_t softplus, unused;
    StridedTokens x, dt, B, C, z;
};

#if defined(__clang__)
#define HASTEN_PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HASTEN_PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif
// a0 b0 a1 b1 ... of the lower halves of a and b, and of the upper ones
#if defined(__AVX512F__)
inline Vec low(Vec a, Vec b) { return HASTEN_PICK(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
inline Vec high(Vec a, Vec b) {
    return HASTEN_PICK(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
inline Vec low(Vec a, Vec b) { return HASTEN_PICK(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline Vec high(Vec a, Vec b) { return HASTEN_PICK(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline Vec low(Vec a, Vec b) { return HASTEN_PICK(a, b, 0, 4, 1, 5); }
inline Vec high(Vec a, Vec b) { return HASTEN_PICK(a, b, 2, 6, 3, 7); }
#endif
#undef HASTEN_PICK

// Each stage interleaves the first half of the rows with the second.
inline void transpose_square(Vec* rows) {
#pragma GCC unroll 4
    for (int stage = 1; stage < WIDTH; stage *= 2) {
        Vec mixed[WIDTH];
#pragma GCC unroll 8
        for (int i = 0; i < WIDTH / 2; i++) {
            mixed[2 * i] = low(rows[i], rows[i + WIDTH / 2]);
            mixed[2 * i + 1] = high(rows[i], rows[i + WIDTH / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) rows[i] = mixed[i];
    }
}

// to[i][j] = from[j][i] for WIDTH rows and columns
template <class T> inline void transpose_square(float* to, int64_t to_stride, const T* from, int64_t from_stride) {
    Vec rows[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) rows[i] = load(from + i * from_stride);
    transpose_square(rows);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) store(to + i * to_stride, rows[i]);
}

// The same for fewer, with zeros up to WIDTH columns
template <class T>
inline void transpose_part(float* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows,
                           int64_t columns) {
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++) to[i * to_stride + j] = to_float(from[j * from_stride + i]);
        for (int64_t j = columns; j < WIDTH; j++) to[i * to_stride + j] = 0;
    }
}

template <class T> inline Vec load_up_to(const T* from, int64_t count) {
    return count >= WIDTH ? load(from) : load_part(from, count);
}
template <class T> inline void store_up_to(T* to, Vec v, int64_t count) {
    if (count >= WIDTH) store(to, v);
    else store_part(to, v, count);
}

// to[t][c] of `tokens` rows `pitch` floats apart, with zeros up to a multiple of WIDTH columns. There are as many rows.
template <class T>
void unpack(float* to, int64_t pitch, const T* from, int64_t token, int64_t component, int64_t tokens, int64_t count) {
    if (component == 1) {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = 0; c < count; c += WIDTH)
                store(to + t * pitch + c, load_up_to(from + t * token + c, count - c));
    } else if (token == 1) {
        for (int64_t c = 0; c < count; c += WIDTH)
            for (int64_t t = 0; t < tokens; t += WIDTH) {
                const int64_t rows = smaller(WIDTH, tokens - t), columns = smaller(WIDTH, count - c);
                const T* corner = from + c * component + t;
                float* square = to + t * pitch + c;
                if (rows == WIDTH && columns == WIDTH) transpose_square(square, pitch, corner, component);
                else transpose_part(square, pitch, corner, component, rows, columns);
            }
    } else {
        for (int64_t t = 0; t < tokens; t++) {
            for (int64_t c = 0; c < count; c++) to[t * pitch + c] = to_float(from[t * token + c * component]);
            for (int64_t c = count; c < round_up(count, WIDTH); c++) to[t * pitch + c] = 0;
        }
    }
}

// The same of `in` from a row, a token and a component on.
inline void unpack(float* to, int64_t pitch, const StridedTokens& in, int64_t row, int64_t t, int64_t c, int64_t tokens,
                   int64_t count) {
    const int64_t offset = row * in.row + t * in.token + c * in.component;
    with_dtype(int(in.dtype), [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        unpack(to, pitch, (const T*)in.data + offset, in.token, in.component, tokens, count);
        return 0;
    });
}

// to[c][n] = from[n][c], rows of from CHANNELS floats apart
inline void store_transposed(float* to, const float* from, int64_t N, int64_t count) {
    for (int64_t c = 0; c < count; c += WIDTH)
        for (int64_t n = 0; n < N; n += WIDTH) {
            const int64_t rows = smaller(WIDTH, count - c), columns = smaller(WIDTH, N - n);
            const float* corner = from + n * CHANNELS + c;
            float* square = to + c * N + n;
            if (rows == WIDTH && columns == WIDTH) transpose_square(square, N, corner, CHANNELS);
            else
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t j = 0; j < columns; j++) square[i * N + j] = corner[j * CHANNELS + i];
        }
}

// h 2^exponent + added, for an exponent of at most 0. No bit of h is lost to a factor that is nearly 1 and rounded:
// 2^exponent = 2^whole (1 + rest), the polynomial's rest has a relative error below 3e-7, and 2^whole is exact.
inline Vec decayed(Vec h, Vec exponent, Vec added) {
    // Adding `magic`, 1.5 * 2^23 + 127, rounds to an integer, whose bits then are the exponent's of a float.
    const float magic = 12583039.f;
    const Vec clamped = larger(Vec{} - 127.f, exponent), shifted = clamped + magic;
    const Vec f = clamped - (shifted - magic);
    Vec p = Vec{} + 0.001326472731307149f;
    p = p * f + 0.009671512991189957f;
    p = p * f + 0.05550733581185341f;
    p = p * f + 0.24022242426872253f;
    p = p * f + 0.6931470036506653f;
    const Vec rest = p * f, power = bit_cast<Vec>(bit_cast<Bits>(shifted) << 23);
    return (h * rest + h) * power + added;
}

// What a block of channels needs of a chunk of tokens: rows of CHANNELS floats, and of N for B and C.
struct ScanTokens {
    const float *exponents, *added, *B, *C;  // dt / log(2), dt x
    float* y;
    int64_t tokens, pitch;
};

// y += C h for WIDTH channels and COUNT components, whose A and h are CHANNELS floats apart
template <int COUNT> inline void scan(const ScanTokens chunk, int64_t n, const float* A, float* h) {
    Vec state[COUNT];
    for (int i = 0; i < COUNT; i++) state[i] = load(h + i * CHANNELS);
    for (int64_t t = 0; t < chunk.tokens; t++) {
        const Vec exponent = load(chunk.exponents + t * CHANNELS), added = load(chunk.added + t * CHANNELS);
        const float *B = chunk.B + t * chunk.pitch + n, *C = chunk.C + t * chunk.pitch + n;
        Vec y = load(chunk.y + t * CHANNELS);
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++) {
            state[i] = decayed(state[i], exponent * load(A + i * CHANNELS), added * B[i]);
            y += state[i] * C[i];
        }
        store(chunk.y + t * CHANNELS, y);
    }
    for (int i = 0; i < COUNT; i++) store(h + i * CHANNELS, state[i]);
}

// The components from n on, COUNT at a time, then the rest by half as many
template <int COUNT> inline void scan_from(const ScanTokens& chunk, int64_t n, int64_t N, const float* A, float* h) {
    for (; n + COUNT <= N; n += COUNT) scan<COUNT>(chunk, n, A + n * CHANNELS, h + n * CHANNELS);
    if constexpr (COUNT > 1) scan_from<COUNT / 2>(chunk, n, N, A, h);
}

// Lane i: the sum of row i.
inline Vec row_sums(Vec* rows) {
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) rows[i] = low(rows[i], rows[i + half]) + high(rows[i], rows[i + half]);
    return rows[0];
}

// One token: y += C h for WIDTH channels, of which there are `count`, and N components, a multiple of WIDTH, FIXED if
// that is not 0. A, h and `state`, where h is written, are N floats apart.
template <int64_t FIXED>
inline void step(const ScanTokens chunk, int64_t count, int64_t size, const float* A, const float* h, float* state) {
    const int64_t N = FIXED ? FIXED : size;
    Vec sums[WIDTH];
#pragma GCC unroll 16
    for (int64_t i = 0; i < WIDTH; i++) {
        sums[i] = Vec{};
        if (i >= count) continue;
        for (int64_t n = 0; n < N; n += WIDTH) {
            const Vec exponent = load(A + i * N + n) * chunk.exponents[i], added = load(chunk.B + n) * chunk.added[i];
            const Vec next = decayed(load(h + i * N + n), exponent, added);
            store(state + i * N + n, next);
            sums[i] += next * load(chunk.C + n);
        }
    }
    store(chunk.y, load(chunk.y) + row_sums(sums));
}

// The work of one thread.
template <class T> struct SelectiveScan {
    const SelectiveScanArguments& in;
    const int64_t pitch, slots;
    Scratch memory;
    float *const exponents, *const added, *const y, *const B, *const C, *const blocks;

    // slots: of A and h of a block of channels, transposed
    SelectiveScan(const SelectiveScanArguments& in, int64_t slots)
        : in(in), pitch(round_up(in.N, WIDTH)), slots(slots),
          memory(sizeof(float) * (3 * TOKENS * CHANNELS + 2 * TOKENS * pitch + slots * 2 * in.N * CHANNELS)),
          exponents((float*)memory.memory), added(exponents + TOKENS * CHANNELS), y(added + TOKENS * CHANNELS),
          B(y + TOKENS * CHANNELS), C(B + TOKENS * pitch), blocks(C + TOKENS * pitch) {}

    // Blocks `first` to `last` of channels of a sequence. Chunk by chunk: what their tokens share stays in the cache.
    void run(int64_t sequence, int64_t first, int64_t last) {
        const int64_t row = in.bounds ? 0 : sequence, N = in.N;
        const int64_t begin = in.bounds ? in.bounds[sequence] : 0, end = in.bounds ? in.bounds[sequence + 1] : in.T;
        const float* initial = in.initial ? in.initial + sequence * in.initial_stride : nullptr;
        float* final = in.state + sequence * in.state_stride;
        for (int64_t t = begin; t < end; t += TOKENS) {
            const int64_t tokens = smaller(TOKENS, end - t);
            unpack(B, pitch, in.B, row, t, 0, tokens, N);
            unpack(C, pitch, in.C, row, t, 0, tokens, N);
            for (int64_t block = first; block < last; block++) {
                const int64_t c = block * CHANNELS, count = smaller(CHANNELS, in.channels - c);
                read_block(row, t, tokens, c, count);
                if (end - begin == 1 && N % WIDTH == 0) {
                    if (!initial) memset(final + c * N, 0, sizeof(float) * N * count);
                    for (int64_t i = 0; i < count; i += WIDTH) {
                        const int64_t at = (c + i) * N;
                        const float* h = (initial ? initial : final) + at;
                        if (N == 16) step<16>(chunk(i, 1), count - i, N, in.A + at, h, final + at);
                        else step<0>(chunk(i, 1), count - i, N, in.A + at, h, final + at);
                    }
                    write_block(row, t, 1, c, count);
                    continue;
                }
                float* A = blocks + (block - first) % slots * 2 * N * CHANNELS;
                float* h = A + N * CHANNELS;
                if (t == begin) {
                    unpack(A, CHANNELS, in.A + c * N, 1, N, N, count);
                    if (initial) unpack(h, CHANNELS, initial + c * N, 1, N, N, count);
                    else memset(h, 0, sizeof(float) * N * CHANNELS);
                }
                for (int64_t i = 0; i < count; i += WIDTH)
                    scan_from<COMPONENTS>(chunk(i, tokens), 0, N, A + i, h + i);
                write_block(row, t, tokens, c, count);
                if (t + tokens == end) store_transposed(final + c * N, h, N, count);
            }
        }
    }

    ScanTokens chunk(int64_t channel, int64_t tokens) const {
        return {exponents + channel, added + channel, B, C, y + channel, tokens, pitch};
    }

    // exponents, added, and y = D x of channels c to c + count
    void read_block(int64_t row, int64_t t, int64_t tokens, int64_t c, int64_t count) {
        unpack(exponents, CHANNELS, in.dt, row, t, c, tokens, count);
        unpack(y, CHANNELS, in.x, row, t, c, tokens, count);
        for (int64_t i = 0; i < count; i += WIDTH) {
            const Vec bias = in.bias ? load_up_to(in.bias + c + i, count - i) : Vec{};
            const Vec skip = in.D ? load_up_to(in.D + c + i, count - i) : Vec{};
            for (int64_t at = i; at < tokens * CHANNELS; at += CHANNELS) {
                Vec dt = load(exponents + at) + bias;
                if (in.softplus) dt = softplus(dt);
                const Vec x = load(y + at);
                store(exponents + at, dt * 1.44269504f);
                store(added + at, dt * x);
                store(y + at, in.D ? skip * x : Vec{});
            }
        }
    }

    void write_block(int64_t row, int64_t t, int64_t tokens, int64_t c, int64_t count) {
        float* z = exponents;
        if (in.z.data) unpack(z, CHANNELS, in.z, row, t, c, tokens, count);
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t i = 0; i < count; i += WIDTH) {
                Vec out = load(y + token * CHANNELS + i);
                if (in.z.data) out *= silu(load(z + token * CHANNELS + i));
                store_up_to((T*)in.y + (row * in.T + t + token) * in.channels + c + i, out, count - i);
            }
    }
};

inline bool any_positive(const float* from, int64_t count) {
    Ints found = {};
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) found |= load(from + i) > Vec{};
    if (i < count) found |= load_part(from + i, count - i) > Vec{};
    int32_t any = 0;
    for (int lane = 0; lane < WIDTH; lane++) any |= found[lane];
    return any;
}

}  // namespace

HASTEN_EXPORT(selective_scan, SelectiveScanArguments)(const SelectiveScanArguments& in) {
    const int64_t blocks = (in.channels + CHANNELS - 1) / CHANNELS;
    if (in.grows) {
        int32_t grows = 0;
        const int64_t count = in.channels * in.N;
        parallel(count, 4096, threads_for(count * sizeof(float), in.threads), [&](int64_t from, int64_t to) {
            if (any_positive(in.A + from, to - from)) __atomic_store_n(&grows, 1, __ATOMIC_RELAXED);
        });
        *in.grows = grows;
        if (grows) return 0;
    }
    return with_dtype(in.dtype, [&](auto stored) {
        using T = typename Pointed<decltype(stored)>::type;
        int failed = 0;
        const int64_t work = in.sequences * in.channels * in.N * sizeof(float) * smaller(in.T, 64);
        parallel(in.sequences * blocks, 1, threads_for(work, in.threads), [&](int64_t from, int64_t to) {
            const int64_t kept = in.T > TOKENS ? smaller(blocks, to - from) : 1;
            SelectiveScan<T> scan(in, kept);
            if (!scan.memory.memory) {
                failed = 2;
                return;
            }
            while (from < to) {
                const int64_t sequence = from / blocks, end = smaller(to, (sequence + 1) * blocks);
                scan.run(sequence, from % blocks, end - sequence * blocks);
                from = end;
            }
        });
        return failed;
    });
}
