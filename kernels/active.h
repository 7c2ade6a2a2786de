// The list of columns (or of gates) that pass a cutoff: what the sparse operators share.
#pragma once
#include "simd.h"

namespace {

// Memory for the list of up to `count` indices.
struct ActiveList : Scratch {
    explicit ActiveList(int64_t count) : Scratch(sizeof(int32_t) * (count + WIDTH)) {}
    int32_t* data() const { return (int32_t*)memory; }
};

// Writes every index i with !(|values[b, i]| <= cutoff[i]) for some row b, in order, and returns how many. values
// [rows, count]; cutoff [count], or [1] for all when `shared`. A NaN passes.
template <class T>
inline int64_t find_active(int32_t* list, const T* values, const float* cutoff, bool shared, int64_t rows,
                           int64_t count) {
    int64_t found = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + WIDTH <= count; i += WIDTH) {
        const __m512 limit = shared ? _mm512_set1_ps(*cutoff) : _mm512_loadu_ps(cutoff + i);
        __mmask16 skip = 0xffff;
        for (int64_t b = 0; b < rows; b++)
            skip &= _mm512_cmp_ps_mask(_mm512_abs_ps(load(values + b * count + i)), limit, _CMP_LE_OQ);
        const __mmask16 pass = ~skip;
        const __m512i indices = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(i)));
        // Compressed in a register: to memory directly it is slow on AMD.
        _mm512_storeu_si512(list + found, _mm512_maskz_compress_epi32(pass, indices));
        found += __builtin_popcount(pass);
    }
#endif
    for (; i < count; i++) {
        bool any = false;
        for (int64_t b = 0; b < rows; b++)
            any |= !(magnitude(to_float(values[b * count + i])) <= cutoff[shared ? 0 : i]);
        list[found] = int32_t(i);
        found += any;
    }
    return found;
}

}  // namespace
