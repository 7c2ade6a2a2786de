// Products of bfloat16 matrices in tiles, summed in float: on the matrix units of CPUs that have them (AMX), else by
// dot products of pairs (AVX512-BF16, NEON's BF16 extension). HASTEN_TILES says whether the instruction set has any of
// them; elsewhere the float products of matrix.h are what is fastest.
//
// A tile is TILE rows of 64 bytes. Of a left operand it holds TILE rows and 32 columns, as they are; of a right operand
// 32 rows and TILE columns, where the two elements of a pair are neighbours along the sum: row p holds, column by
// column, elements 2p and 2p + 1. A product is made in blocks of BLOCK x BLOCK sums.
#pragma once
#include "simd.h"

#if defined(__AMX_BF16__) || defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HASTEN_TILES
namespace {

constexpr int64_t TILE = 16, DEPTH = 32, BLOCK = 2 * TILE;
using Pair = uint32_t;  // two bfloat16, neighbours along the sum of a product
constexpr int64_t TILE_PAIRS = TILE * TILE;

// A row of a tile, whatever the width of a register is.
typedef float Lanes __attribute__((vector_size(TILE * sizeof(float))));
typedef uint32_t PairLanes __attribute__((vector_size(TILE * sizeof(Pair))));
typedef uint16_t HalfLanes __attribute__((vector_size(TILE * sizeof(bf16))));

// A matrix in tiles, row after row of them.
struct Tiles {
    Pair* data;
    int64_t stride;  // tiles in a row
    Pair* at(int64_t row, int64_t column) const { return data + (row * stride + column) * TILE_PAIRS; }
    Tiles from(int64_t row, int64_t column) const { return {at(row, column), stride}; }
    // Row r of a left operand, its columns 32 * column and on; row 2r (and 2r + 1) of a right one.
    Pair* row(int64_t r, int64_t column) const { return at(r / TILE, column) + r % TILE * TILE; }
};

// What a thread has to have set while it multiplies tiles.
struct TileUnits {
#if defined(__AMX_BF16__)
    struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };
    TileUnits() {
        Configuration all;
        for (int i = 0; i < 8; i++) all.row_bytes[i] = 64, all.rows[i] = TILE;
        asm volatile("" : : "r"(&all) : "memory");  // all of it is to be in memory: the intrinsic names 8 bytes of it
        _tile_loadconfig(&all);
    }
    ~TileUnits() { _tile_release(); }
#else
    TileUnits() {}
#endif
    TileUnits(const TileUnits&) = delete;
    TileUnits& operator=(const TileUnits&) = delete;
};

// BLOCK x BLOCK sums of products: clear(), add() as often as needed, then finish(to). One at a time in a thread. With
// COLUMNS = 1 only the first TILE columns are made, for a right operand of one column of tiles.
template <int COLUMNS = 2> struct BlockSums {
#if defined(__AMX_BF16__)
    void clear() {
        _tile_zero(0);
        _tile_zero(2);
        if constexpr (COLUMNS == 2) {
            _tile_zero(1);
            _tile_zero(3);
        }
    }
    // += the product of two rows of tiles of a and COLUMNS columns of tiles of b, `depth` tiles deep
    void add(const Tiles& a, const Tiles& b, int64_t depth) {
        asm volatile("" ::: "memory");  // what was stored is to be in memory: the compiler does not see tiles loaded
        const Pair *upper = a.data, *lower = a.at(1, 0), *right = b.data;
        for (int64_t p = 0; p < depth; p++, upper += TILE_PAIRS, lower += TILE_PAIRS, right += b.stride * TILE_PAIRS) {
            _tile_loadd(6, right, 64);
            _tile_loadd(4, upper, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, lower, 64);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (COLUMNS == 2) {
                _tile_loadd(7, right + TILE_PAIRS, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    void finish(float* to) {  // rows of BLOCK floats
        constexpr int64_t stride = BLOCK * sizeof(float);
        _tile_stored(0, to, stride);
        _tile_stored(2, to + TILE * BLOCK, stride);
        if constexpr (COLUMNS == 2) {
            _tile_stored(1, to + TILE, stride);
            _tile_stored(3, to + TILE * BLOCK + TILE, stride);
        }
    }
#else
    static constexpr int64_t WIDE = COLUMNS * TILE;
    alignas(64) float sums[BLOCK * WIDE];
    void clear() { memset(sums, 0, sizeof(sums)); }
    void finish(float* to) {
        for (int64_t r = 0; r < BLOCK; r++) memcpy(to + r * BLOCK, sums + r * WIDE, sizeof(float) * WIDE);
    }
    void add(const Tiles& a, const Tiles& b, int64_t depth) {
        for (int64_t i = 0; i < BLOCK; i += ROWS) add_rows(sums + i * WIDE, a.row(i, 0), b, depth);
    }
#if defined(__AVX512BF16__)
    static constexpr int ROWS = 8;
    static void add_rows(float* to, const Pair* rows, const Tiles& b, int64_t depth) {
        __m512 held[ROWS][COLUMNS];
        for (int r = 0; r < ROWS; r++)
            for (int n = 0; n < COLUMNS; n++) held[r][n] = _mm512_load_ps(to + r * WIDE + n * TILE);
        for (int64_t p = 0; p < depth; p++, rows += TILE_PAIRS)
            for (int64_t pair = 0; pair < TILE; pair++) {
                __m512bh right[COLUMNS];
                for (int n = 0; n < COLUMNS; n++) right[n] = load_bits<__m512bh>(b.at(p, n) + pair * TILE);
                for (int r = 0; r < ROWS; r++) {
                    const __m512bh both = (__m512bh)_mm512_set1_epi32(rows[r * TILE + pair]);
                    for (int n = 0; n < COLUMNS; n++) held[r][n] = _mm512_dpbf16_ps(held[r][n], both, right[n]);
                }
            }
        for (int r = 0; r < ROWS; r++)
            for (int n = 0; n < COLUMNS; n++) _mm512_store_ps(to + r * WIDE + n * TILE, held[r][n]);
    }
#else
    static constexpr int ROWS = 4, QUADS = TILE / 4;
    static void add_rows(float* to, const Pair* from, const Tiles& b, int64_t depth) {
        for (int n = 0; n < COLUMNS; n++) {
            float32x4_t held[ROWS][QUADS];
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < QUADS; i++) held[r][i] = vld1q_f32(to + r * WIDE + n * TILE + 4 * i);
            const Pair* rows = from;
            for (int64_t p = 0; p < depth; p++, rows += TILE_PAIRS)
                for (int64_t pair = 0; pair < TILE; pair++) {
                    const Pair* columns = b.at(p, n) + pair * TILE;
                    bfloat16x8_t right[QUADS];
                    for (int i = 0; i < QUADS; i++) right[i] = vreinterpretq_bf16_u32(vld1q_u32(columns + 4 * i));
                    for (int r = 0; r < ROWS; r++) {
                        const bfloat16x8_t both = vreinterpretq_bf16_u32(vdupq_n_u32(rows[r * TILE + pair]));
                        for (int i = 0; i < QUADS; i++) held[r][i] = vbfdotq_f32(held[r][i], right[i], both);
                    }
                }
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < QUADS; i++) vst1q_f32(to + r * WIDE + n * TILE + 4 * i, held[r][i]);
        }
    }
#endif
#endif
};

// The largest magnitude of bfloat16 values, DEPTH at a time, by their bits: NaN and infinity are above all others.
struct Largest {
    typedef uint16_t Many __attribute__((vector_size(DEPTH * sizeof(bf16))));
    Many found = {};
    void take(const bf16* from) {
        const Many magnitudes = load_bits<Many>(from) & 0x7fff;
        found = magnitudes > found ? magnitudes : found;
    }
    bool is_finite() const {
        uint16_t all = 0;
        for (int i = 0; i < DEPTH; i++) all = found[i] > all ? found[i] : all;
        return all < 0x7f80;
    }
};

// Packing. Floats are rounded to the nearest bfloat16, ties to even.

inline Lanes lanes(const float* from) { return load_bits<Lanes>(from); }
inline Lanes lanes(const bf16* from) {
    return bit_cast<Lanes>(__builtin_convertvector(load_bits<HalfLanes>(from), PairLanes) << 16);
}
inline void put(float* to, Lanes x) { memcpy(to, &x, sizeof(x)); }

// 16 columns of two rows of a right operand
inline void put_pairs(Pair* to, const bf16* even, const bf16* odd) {
    const PairLanes both = __builtin_convertvector(load_bits<HalfLanes>(even), PairLanes) |
                           __builtin_convertvector(load_bits<HalfLanes>(odd), PairLanes) << 16;
    memcpy(to, &both, sizeof(both));
}

#if defined(__AVX512BF16__)
inline void put_row(Pair* to, Lanes first, Lanes second) {  // 32 columns of a row of a left operand
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    memcpy(to, &both, sizeof(both));
}
inline void put_pairs(Pair* to, Lanes even, Lanes odd) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                         3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, halves));
}
#else
inline void put(bf16* to, Lanes x) {
    float values[TILE];
    put(values, x);
    for (int i = 0; i < TILE; i += WIDTH) store(to + i, load(values + i));
}
inline void put_row(Pair* to, Lanes first, Lanes second) {
    put((bf16*)to, first), put((bf16*)to + TILE, second);
}
inline void put_pairs(Pair* to, Lanes even, Lanes odd) {
    bf16 first[TILE], second[TILE];
    put(first, even), put(second, odd);
    put_pairs(to, first, second);
}
#endif

// The tile of a right operand that is the transpose of a tile of a left one: 32 components of 16 rows become 16
// columns.
inline void transpose(Pair* to, const Pair* from, int64_t stride = TILE) {
#if defined(__AVX512F__)
    __m512i rows[TILE], quads[TILE];
    for (int i = 0; i < TILE; i++) rows[i] = load_bits<__m512i>(from + i * stride);
    for (int i = 0; i < TILE; i += 4) {  // columns of four rows, in the 128-bit lane that they have
        const __m512i a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]),
                      b = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
        const __m512i c = _mm512_unpackhi_epi32(rows[i], rows[i + 1]),
                      d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        quads[i] = _mm512_unpacklo_epi64(a, b), quads[i + 1] = _mm512_unpackhi_epi64(a, b);
        quads[i + 2] = _mm512_unpacklo_epi64(c, d), quads[i + 3] = _mm512_unpackhi_epi64(c, d);
    }
    for (int i = 0; i < 4; i++) {  // column 4 * lane + i: that lane of the four
        const __m512i a = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88),
                      b = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd),
                      d = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xdd);
        const __m512i found[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(c, d, 0x88),
                                  _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0xdd)};
        for (int lane = 0; lane < 4; lane++) memcpy(to + (4 * lane + i) * TILE, &found[lane], sizeof(__m512i));
    }
#else
    for (int i = 0; i < TILE; i += 4)
        for (int p = 0; p < TILE; p += 4) {
            const Pair* rows = from + i * stride + p;
            const uint32x4_t a = vld1q_u32(rows), b = vld1q_u32(rows + stride), c = vld1q_u32(rows + 2 * stride),
                             d = vld1q_u32(rows + 3 * stride);
            const uint64x2_t upper[2] = {vreinterpretq_u64_u32(vtrn1q_u32(a, b)),
                                         vreinterpretq_u64_u32(vtrn2q_u32(a, b))};
            const uint64x2_t lower[2] = {vreinterpretq_u64_u32(vtrn1q_u32(c, d)),
                                         vreinterpretq_u64_u32(vtrn2q_u32(c, d))};
            for (int n = 0; n < 2; n++) {
                vst1q_u32(to + (p + n) * TILE + i, vreinterpretq_u32_u64(vtrn1q_u64(upper[n], lower[n])));
                vst1q_u32(to + (p + n + 2) * TILE + i, vreinterpretq_u32_u64(vtrn2q_u64(upper[n], lower[n])));
            }
        }
#endif
}

// `count` tokens as rows of `width` components, a multiple of DEPTH, with zeros beyond `size`, from rows of tokens, one
// for each component.
inline void gather_rows(bf16* to, const bf16* from, int64_t stride, int64_t count, int64_t size, int64_t width) {
    alignas(64) Pair pairs[TILE_PAIRS], rows[TILE_PAIRS];
    bf16 even[TILE], odd[TILE];
    for (int64_t c = 0; c < width; c += DEPTH)
        for (int64_t t = 0; t < count; t += TILE) {
            const int64_t there = smaller(TILE, count - t);
            for (int64_t p = 0; p < TILE; p++) {
                const int64_t component = c + 2 * p;
                if (there == TILE && component + 1 < size) {
                    put_pairs(pairs + p * TILE, from + component * stride + t, from + (component + 1) * stride + t);
                    continue;
                }
                memset(even, 0, sizeof(even)), memset(odd, 0, sizeof(odd));
                if (component < size) memcpy(even, from + component * stride + t, sizeof(bf16) * there);
                if (component + 1 < size) memcpy(odd, from + (component + 1) * stride + t, sizeof(bf16) * there);
                put_pairs(pairs + p * TILE, even, odd);
            }
            transpose(rows, pairs);
            for (int64_t i = 0; i < there; i++) memcpy(to + (t + i) * width + c, rows + i * TILE, sizeof(bf16) * DEPTH);
        }
}

// Of 16 pairs each in two vectors, what stands first (low) or second in each: 32 bfloat16 in order.
inline void put_halves(Pair* low, Pair* high, PairLanes first, PairLanes second) {
#if defined(__AVX512F__)
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                          24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    _mm512_storeu_si512(low, _mm512_permutex2var_epi16((__m512i)first, even, (__m512i)second));
    _mm512_storeu_si512(high, _mm512_permutex2var_epi16((__m512i)first, odd, (__m512i)second));
#else
    const HalfLanes lows[2] = {__builtin_convertvector(first & 0xffff, HalfLanes),
                               __builtin_convertvector(second & 0xffff, HalfLanes)};
    const HalfLanes highs[2] = {__builtin_convertvector(first >> 16, HalfLanes),
                                __builtin_convertvector(second >> 16, HalfLanes)};
    memcpy(low, lows, sizeof(lows)), memcpy(high, highs, sizeof(highs));
#endif
}

}  // namespace
#endif
