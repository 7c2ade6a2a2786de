// Vectors of floats for the instruction set that this file is compiled for, and the one place that loads a stored
// weight.
//
// Every source is compiled once per instruction set and all of them are linked into one library. Hence everything here
// sits in an anonymous namespace and nothing of std:: is instantiated: a shared inline function would let AVX-512 code
// run on an AVX2 machine.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define HASTEN_JOIN_(name, isa) name##_##isa
#define HASTEN_JOIN(name, isa) HASTEN_JOIN_(name, isa)
#define HASTEN_PUBLIC extern "C" __attribute__((visibility("default")))
// int hasten_<name>_<isa>(const Arguments&): 0, or 1 for a dtype that it does not know, 2 when there is no memory, 3
// for a value that is out of its range. Beside it the size of the struct, for the test that holds it equal to its twin
// in Python (see cpu.py).
#define HASTEN_EXPORT(name, Arguments)                                                                    \
    HASTEN_PUBLIC int64_t HASTEN_JOIN(hasten_##name##_size, HASTEN_ISA)() { return sizeof(Arguments); }   \
    HASTEN_PUBLIC int HASTEN_JOIN(hasten_##name, HASTEN_ISA)

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, REGISTERS = 32;
#else
constexpr int WIDTH = 4, REGISTERS = 16;
#endif

typedef float Vec __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint16_t Shorts __attribute__((vector_size(WIDTH * sizeof(uint16_t))));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From> inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

template <class V, class T> inline V load_bits(const T* from) {
    V to;
    memcpy(&to, from, sizeof(V));
    return to;
}

// Scalars. Halves are written round to nearest even, and NaN stays NaN.

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
inline float to_float(f16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    const float magnitude = rest >= 0x7c00  ? bit_cast<float>(0x7f800000 | rest << 13)  // infinity and NaN
                            : rest < 0x400 ? float(int32_t(rest)) * 0x1p-24f           // subnormal
                                           : bit_cast<float>((rest << 13) + (112 << 23));
    return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
}

inline void from_float(float value, float& to) { to = value; }
inline void from_float(float value, bf16& to) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to.bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}
inline void from_float(float value, f16& to) {
    const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    uint32_t half;
    if (rest > 0x7f800000) half = 0x7e00;       // NaN
    else if (rest >= 0x477ff000) half = 0x7c00;  // 65520 and more round to infinity
    else if (rest < 0x38800000) half = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000;  // subnormal
    else half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    to.bits = uint16_t(sign | half);
}

// Vectors.

inline Vec load(const float* from) { return load_bits<Vec>(from); }
inline Vec load(const bf16* from) {
    return bit_cast<Vec>(__builtin_convertvector(load_bits<Shorts>(from), Bits) << 16);
}
inline Vec load(const f16* from) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(load_bits<__m256i>(from));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(load_bits<__m128i>(from));
#elif defined(__aarch64__)
    return vcvt_f32_f16(load_bits<float16x4_t>(from));
#else
    Vec to;
    for (int i = 0; i < WIDTH; i++) to[i] = to_float(from[i]);
    return to;
#endif
}

// The first `count` of a vector, the rest zero.
template <class T> inline Vec load_part(const T* from, int64_t count) {
    T values[WIDTH] = {};
    memcpy(values, from, sizeof(T) * count);
    return load(values);
}

inline void store(float* to, Vec v) { memcpy(to, &v, sizeof(v)); }
inline void store(bf16* to, Vec v) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    const bfloat16x4_t halves = vcvt_bf16_f32(v);
#else
    const Bits bits = bit_cast<Bits>(v), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Shorts halves =
        __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? (Bits{} + 0x7fc0) : rounded, Shorts);
#endif
    memcpy(to, &halves, sizeof(halves));
}
inline void store(f16* to, Vec v) {
#if defined(__AVX512F__)
    const __m256i halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &halves, sizeof(halves));
#elif defined(__AVX2__)
    const __m128i halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    memcpy(to, &halves, sizeof(halves));
#elif defined(__aarch64__)
    const float16x4_t halves = vcvt_f16_f32(v);
    memcpy(to, &halves, sizeof(halves));
#else
    for (int i = 0; i < WIDTH; i++) from_float(v[i], to[i]);
#endif
}
template <class T> inline void store_part(T* to, Vec v, int64_t count) {
    T values[WIDTH];
    store(values, v);
    memcpy(to, values, sizeof(T) * count);
}

inline float sum(Vec v) {  // always the same tree
    float parts[WIDTH];
    memcpy(parts, &v, sizeof(v));
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) parts[i] += parts[i + half];
    return parts[0];
}

// The same by halves of the register.
inline float quick_sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#elif defined(__aarch64__)
    return vaddvq_f32(v);
#else
    return sum(v);
#endif
}

// Weights are read a cache line at a time.
template <class T> constexpr int LINE = 64 / sizeof(T);
template <class T> constexpr int VECTORS = LINE<T> / WIDTH;
template <class T> struct Line {
    Vec v[VECTORS<T>];
    explicit Line(const T* from) {
        for (int i = 0; i < VECTORS<T>; i++) v[i] = load(from + i * WIDTH);
    }
};

// Dot products along a row: a line of weights at a time, with x packed as X.
template <class T> struct Dot {
    using X = float;
    using Weights = Line<T>;
    static X pack(T x) { return to_float(x); }
    static Vec add(Vec sum, const Weights& w, const X* x) {
        for (int i = 0; i < VECTORS<T>; i++) sum += w.v[i] * load(x + i * WIDTH);
        return sum;
    }
};

// Sums of columns: a line of outputs of two columns at a time, each times its x, packed as for Dot. The sums of a line
// of outputs are VECTORS vectors, in an order of their own until in_order().
template <class T> struct Columns {
    struct Weights {
        Line<T> first, second;
        Weights(const T* a, const T* b) : first(a), second(b) {}
    };
    static void add(Vec* sums, const Weights& w, const float* x) {
        for (int i = 0; i < VECTORS<T>; i++) sums[i] += w.first.v[i] * x[0];
        for (int i = 0; i < VECTORS<T>; i++) sums[i] += w.second.v[i] * x[1];
    }
    static void in_order(Vec*) {}
};

// Two products and sums per lane, without converting to float. (CPUs with matrix units take longer for it than for
// that.)
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
template <> struct Dot<bf16> {
    using X = bf16;
    struct Weights {
        __m512bh v;
        explicit Weights(const bf16* from) : v(load_bits<__m512bh>(from)) {}
    };
    static X pack(bf16 x) { return x; }
    static Vec add(Vec sum, const Weights& w, const X* x) { return _mm512_dpbf16_ps(sum, w.v, load_bits<__m512bh>(x)); }
};

template <> struct Columns<bf16> {
    struct Weights {
        __m512i a, b;
        Weights(const bf16* first, const bf16* second) : a(load_bits<__m512i>(first)), b(load_bits<__m512i>(second)) {}
    };
    static void add(Vec* sums, const Weights& w, const bf16* x) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(load_bits<int>(x));
        sums[0] = _mm512_dpbf16_ps(sums[0], (__m512bh)_mm512_unpacklo_epi16(w.a, w.b), both);
        sums[1] = _mm512_dpbf16_ps(sums[1], (__m512bh)_mm512_unpackhi_epi16(w.a, w.b), both);
    }
    // unpack works within 128-bit lanes: 0-3 8-11 16-19 24-27 | 4-7 12-15 20-23 28-31
    static void in_order(Vec* sums) {
        const __m512 lo = sums[0], hi = sums[1];
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        sums[0] = _mm512_permutex2var_ps(lo, first, hi);
        sums[1] = _mm512_permutex2var_ps(lo, second, hi);
    }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <> struct Dot<bf16> {
    using X = bf16;
    struct Weights {
        bfloat16x8_t v[VECTORS<float>];
        explicit Weights(const bf16* from) { memcpy(v, from, sizeof(v)); }
    };
    static X pack(bf16 x) { return x; }
    static Vec add(Vec sum, const Weights& w, const X* x) {
        const Weights with(x);
        for (int i = 0; i < VECTORS<float>; i++) sum = vbfdotq_f32(sum, w.v[i], with.v[i]);
        return sum;
    }
};

template <> struct Columns<bf16> {
    struct Weights {
        uint16x8_t a[VECTORS<float>], b[VECTORS<float>];
        Weights(const bf16* first, const bf16* second) { memcpy(a, first, sizeof(a)), memcpy(b, second, sizeof(b)); }
    };
    static void add(Vec* sums, const Weights& w, const bf16* x) {
        const bfloat16x8_t both = vreinterpretq_bf16_u32(vdupq_n_u32(load_bits<uint32_t>(x)));
        for (int i = 0; i < VECTORS<float>; i++) {
            const bfloat16x8_t low = vreinterpretq_bf16_u16(vzip1q_u16(w.a[i], w.b[i])),
                               high = vreinterpretq_bf16_u16(vzip2q_u16(w.a[i], w.b[i]));
            sums[2 * i] = vbfdotq_f32(sums[2 * i], low, both);
            sums[2 * i + 1] = vbfdotq_f32(sums[2 * i + 1], high, both);
        }
    }
    static void in_order(Vec*) {}
};
#endif

inline void prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }  // into the L2 cache

// Memory of one call, aligned to cache lines.
struct Scratch {
    void* memory;
    explicit Scratch(size_t bytes) : memory(aligned_alloc(64, (bytes + 127) / 64 * 64)) {}
    ~Scratch() { free(memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

template <class P> struct Pointed;
template <class T> struct Pointed<T*> { using type = T; };

inline float magnitude(float value) { return __builtin_fabsf(value); }
constexpr int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A thread is worth starting for 64 KB.
inline int threads_for(int64_t bytes, int threads) {
    const int64_t useful = 1 + bytes / 65536;
    return useful < threads ? int(useful) : threads;
}

// Where a thread works, numbers below the smallest normal one are read and written as 0: a state under a decay soon
// holds many of them, and each costs the CPU over a hundred cycles. What the thread had set before is restored.
struct FlushDenormals {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }  // results, operands
    ~FlushDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | 1 << 24) : "memory");  // operands and results
    }
    ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(before) : "memory"); }
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

// body(begin, end) over [0, count) on at most `threads` threads, in pieces that are multiples of `grain`. What body
// computes for an index may not depend on the piece that it comes in: results are then the same for every number of
// threads.
template <class Body> inline void parallel(int64_t count, int64_t grain, int threads, const Body& body) {
    if (count == 0) return;
    const int64_t piece = round_up((count + threads - 1) / threads, grain);
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < count; begin += piece) {
        const FlushDenormals here;
        body(begin, smaller(begin + piece, count));
    }
}

// body(job) for every job on at most `threads` threads, each taking the next one when it is done: for jobs of unequal
// size.
template <class Body> inline void parallel_jobs(int64_t jobs, int threads, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t job = 0; job < jobs; job++) {
        const FlushDenormals here;
        body(job);
    }
}

// Calls body with a null pointer to the stored type of a dtype code (see storage.py).
template <class Body> inline int with_dtype(int dtype, const Body& body) {
    switch (dtype) {
        case 0: return body((float*)nullptr);
        case 1: return body((f16*)nullptr);
        case 2: return body((bf16*)nullptr);
    }
    return 1;
}

// Calls body with the number of rows as a compile-time constant: 1, 2, 4 or 8; the rows beyond B are computed and not
// stored.
template <int B> struct Rows { static constexpr int value = B; };
template <class Body> inline int with_rows(int64_t rows, const Body& body) {
    if (rows <= 1) return body(Rows<1>());
    if (rows <= 2) return body(Rows<2>());
    if (rows <= 4) return body(Rows<4>());
    return body(Rows<8>());
}

}  // namespace
