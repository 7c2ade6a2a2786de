// Functions of vectors of floats.
#pragma once
#include "simd.h"

namespace {

// exp(x) = 2^n (1 + p) for the whole n, with x clamped to [lowest, highest], (Cephes' polynomial)
struct Exponential {
    Vec n, p;
};
constexpr float EXP_LOWEST = -87.33654f, EXP_HIGHEST = 88.72283f;

inline Exponential exponential(Vec x) {
    const float magic = 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
    const Vec zero = {}, clamped = x < EXP_LOWEST ? zero + EXP_LOWEST : x > EXP_HIGHEST ? zero + EXP_HIGHEST : x;
    const Vec n = clamped * 1.44269504f + magic - magic;
    const Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return {n, p * r * r + r};
}

// x 2^n for whole n in [-126, 128]
inline Vec times_power(Vec x, Vec n) {
#if defined(__AVX512F__)
    return _mm512_scalef_ps(x, n);
#else
    const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;  // two factors, since 2^128 is no float
    return x * bit_cast<Vec>((half + 127) << 23) * bit_cast<Vec>((whole - half + 127) << 23);
#endif
}

// Relative error below 2e-7; 0 below the smallest normal number, infinity above the largest, NaN for NaN.
inline Vec exp(Vec x) {
    const Vec zero = {};
    const Exponential e = exponential(x);
    const Vec result = times_power(e.p + 1.f, e.n);
    return x < EXP_LOWEST ? zero : x > EXP_HIGHEST ? zero + __builtin_inff() : result;
}

// exp(x) - 1 with a relative error below 3e-7, NaN for NaN.
inline Vec expm1(Vec x) {
    const Vec zero = {};
    const Exponential e = exponential(x);
    const Vec power = times_power(zero + 1.f, e.n), result = power * e.p + (power - 1.f);
    return x < EXP_LOWEST ? zero - 1.f : x > EXP_HIGHEST ? zero + __builtin_inff() : result;
}

// Relative error below 3e-7, NaN for NaN. (Cephes' polynomial below 0.625)
inline Vec tanh(Vec x) {
    const Vec zero = {}, size = x < zero ? -x : x, square = x * x;
    Vec p = zero - 5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const Vec near = p * square * x + x, far = 1.f - 2.f / (exp(size + size) + 1.f);
    return size < 0.625f ? near : x < zero ? -far : far;
}

// a where it is larger, else b: NaN where b is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

inline Vec silu(Vec x) { return x / (exp(-x) + 1.f); }

// log(1 + exp(x)) with a relative error below 5e-7, also where it is as small as exp(x).
inline Vec softplus(Vec x) {
    // log(1 + e) = 2 artanh(s)
    const Vec zero = {}, e = exp(x < zero ? x : -x), s = e / (e + 2.f), square = s * s;
    Vec p = zero + 0.2801201045513153f;
    p = p * square + 0.28001800179481506f;
    p = p * square + 0.4002152681350708f;
    p = p * square + 0.666664183139801f;
    return larger(zero, x) + (s * square * p + s * 2.f);
}

}  // namespace
