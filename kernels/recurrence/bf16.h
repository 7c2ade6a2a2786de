// Linear attention's chunks with matrix products of bfloat16 operands, summed in float: AVX512-BF16 multiplies twice as
// many of them at a time.
//
// q, k and v are bfloat16 already. What is computed from them and multiplied again (weights within the chunk, keys
// under the decay until its end, the state that the queries read) is rounded once, as the output is. The state itself
// stays float, so that no rounding is carried from chunk to chunk.
#pragma once
#include "recurrence.h"

#if defined(__AVX512BF16__)
namespace {

constexpr int64_t PANEL = 2 * WIDTH;  // columns of a tile
using Pair = uint32_t;                // two bfloat16, neighbours along the sum of a product

// sums += a . b for TILE_ROWS rows of a and PANEL columns of b: a in rows of pairs, b a row of PANEL pairs (or more)
// for every pair of the sum
using Tile = Vec[TILE_ROWS][2];
inline void add_products(Tile& sums, const Pair* a, int64_t a_stride, const Pair* b, int64_t b_stride, int64_t pairs) {
    for (int64_t p = 0; p < pairs; p++) {
        const __m512bh left = load_bits<__m512bh>(b + p * b_stride),
                       right = load_bits<__m512bh>(b + p * b_stride + WIDTH);
        for (int r = 0; r < TILE_ROWS; r++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(a[r * a_stride + p]);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], both, left);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], both, right);
        }
    }
}

// Lanes of pairs from two vectors of bfloat16, or of floats to be rounded
inline Bits paired(Shorts first, Shorts second) {
    return __builtin_convertvector(first, Bits) | __builtin_convertvector(second, Bits) << 16;
}
inline Bits paired(Vec first, Vec second) {
    return paired((Shorts)_mm512_cvtneps_pbh(first), (Shorts)_mm512_cvtneps_pbh(second));
}

// to[c][i] = from[i][c] for WIDTH rows and columns
inline void transpose(Pair* to, int64_t to_stride, const Pair* from, int64_t from_stride) {
    __m512i rows[WIDTH], quads[WIDTH];
    for (int i = 0; i < WIDTH; i++) rows[i] = load_bits<__m512i>(from + i * from_stride);
    for (int i = 0; i < WIDTH; i += 4) {  // columns of four rows, in the 128-bit lane that they have
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
        const __m512i lanes[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(c, d, 0x88),
                                  _mm512_shuffle_i32x4(a, b, 0xdd), _mm512_shuffle_i32x4(c, d, 0xdd)};
        for (int lane = 0; lane < 4; lane++) memcpy(to + (4 * lane + i) * to_stride, &lanes[lane], sizeof(__m512i));
    }
}

struct Bf16Chunks {
    const Shape& shape;
    const Inputs<bf16>& in;
    const int64_t wide_k, wide_v, stride_k, stride_v;
    Scratch memory;
    char* unused;
    float* S;                 // [K, V]
    float* P;                 // [CHUNK, CHUNK]
    Pair *Q, *K, *KT;         // q and k [CHUNK, K/2]; k transposed [K/2, CHUNK]
    Pair *U, *read;           // v [CHUNK/2, V]; the rounded state [K/2, V]
    Pair *weights, *X;        // P rounded [CHUNK, CHUNK/2]; k transposed under the decays [K, CHUNK/2]
    float a[CHUNK], since[CHUNK];
    alignas(64) float between[CHUNK];
    // Of rows of CHUNK floats or pairs, and of CHUNK bfloat16.
    static constexpr int64_t STRIDE = CHUNK + 16, HALF = CHUNK / 2 + 16;

    static int64_t bytes(const Shape& shape) {
        const int64_t k = round_up(shape.K, PANEL), v = odd_lines(round_up(shape.V, PANEL));
        return 4 * (k * v + CHUNK * STRIDE + 2 * CHUNK * odd_lines(k / 2) + k / 2 * STRIDE + CHUNK / 2 * v + k / 2 * v +
                    CHUNK * HALF + k * HALF);
    }
    Bf16Chunks(const Shape& shape, const Inputs<bf16>& in)
        : shape(shape), in(in), wide_k(round_up(shape.K, PANEL)), wide_v(round_up(shape.V, PANEL)),
          stride_k(odd_lines(wide_k / 2)), stride_v(odd_lines(wide_v)), memory(bytes(shape)),
          unused((char*)memory.memory) {
        if (!unused) return;
        memset(unused, 0, bytes(shape));
        S = take<float>(wide_k * stride_v);
        P = take<float>(CHUNK * STRIDE);
        Q = take<Pair>(CHUNK * stride_k);
        K = take<Pair>(CHUNK * stride_k);
        KT = take<Pair>(wide_k / 2 * STRIDE);
        U = take<Pair>(CHUNK / 2 * stride_v);
        read = take<Pair>(wide_k / 2 * stride_v);
        weights = take<Pair>(CHUNK * HALF);
        X = take<Pair>(wide_k * HALF);
    }
    template <class T> T* take(int64_t count) {
        T* const taken = (T*)unused;
        unused += sizeof(T) * count;
        return taken;
    }

    // Head `head` of the tokens from `begin` to `end` of batch row `row`
    void run(bf16* o, const float* initial, float* final, int64_t row, int64_t head, int64_t begin, int64_t end) {
        for (int64_t c = 0; c < wide_k; c++)
            unpack(S + c * stride_v, initial + c * shape.V, initial && c < shape.K ? shape.V : 0, wide_v);
        const int64_t shared = head * shape.H / shape.Hv;
        const bf16* q = in.q + row * shape.q.row + shared * shape.q.head;
        const bf16* k = in.k + row * shape.k.row + shared * shape.k.head;
        const bf16* v = in.v + row * shape.v.row + head * shape.v.head;
        const float* g = in.decay + row * shape.decay.row + head * shape.decay.head;
        for (int64_t token = begin; token < end; token += CHUNK) {
            const int64_t count = smaller(CHUNK, end - token), rows = count <= PANEL ? PANEL : CHUNK;
            const int64_t next = token + CHUNK, ahead = smaller(CHUNK, end - next);
            load_chunk(q + token * shape.q.token, k + token * shape.k.token, v + token * shape.v.token,
                       g + token * shape.decay.token, count, rows);
            expect(q + next * shape.q.token, shape.q.token, ahead, shape.K);
            weigh(rows);
            expect(k + next * shape.k.token, shape.k.token, ahead, shape.K);
            write_outputs(o + ((row * shape.T + token) * shape.Hv + head) * shape.V, count);
            expect(v + next * shape.v.token, shape.v.token, ahead, shape.V);
            update_state(rows);
        }
        for (int64_t c = 0; c < shape.K; c++) pack(final + c * shape.V, S + c * stride_v, 1.f, shape.V);
    }

    void load_chunk(const bf16* q, const bf16* k, const bf16* v, const float* g, int64_t count, int64_t rows) {
        for (int64_t i = 0; i < rows; i++) {
            copy(Q + i * stride_k, q + i * shape.q.token, i < count ? shape.K : 0, wide_k);
            copy(K + i * stride_k, k + i * shape.k.token, i < count ? shape.K : 0, wide_k);
            a[i] = in.decay && i < count ? __builtin_expf(g[i * shape.decay.token]) : 1.f;
        }
        for (int64_t i = 0; i < rows; i += WIDTH)
            for (int64_t c = 0; c < wide_k / 2; c += WIDTH)
                transpose(KT + c * STRIDE + i, STRIDE, K + i * stride_k + c, stride_k);
        for (int64_t i = 0; i < rows; i += 2)
            for (int64_t c = 0; c < wide_v; c += WIDTH) {
                const Bits both = paired(part(v + i * shape.v.token, c, i < count),
                                         part(v + (i + 1) * shape.v.token, c, i + 1 < count));
                memcpy(U + i / 2 * stride_v + c, &both, sizeof(both));
            }
        for (int64_t c = 0; c < wide_k; c += 2)
            for (int64_t j = 0; j < wide_v; j += WIDTH) {
                const Bits both = paired(load(S + c * stride_v + j), load(S + (c + 1) * stride_v + j));
                memcpy(read + c / 2 * stride_v + j, &both, sizeof(both));
            }
    }
    static void copy(Pair* to, const bf16* from, int64_t count, int64_t width) {
        memcpy(to, from, sizeof(bf16) * count);
        memset((bf16*)to + count, 0, sizeof(bf16) * (width - count));
    }
    Shorts part(const bf16* v, int64_t c, bool there) const {  // components c to c + WIDTH of v
        Shorts found = {};
        const int64_t count = there ? shape.V - c : 0;
        if (count >= WIDTH) return load_bits<Shorts>(v + c);
        if (count > 0) memcpy(&found, v + c, sizeof(bf16) * count);
        return found;
    }

    // The weights Q K^T under the decays, rounded; `since`, the decays since the chunk began; keys under the decay
    // until it ends
    void weigh(int64_t rows) {
        for (int64_t i = 0; i < rows; i += TILE_ROWS)
            for (int64_t j = 0; j < i + TILE_ROWS; j += PANEL) {
                Tile sums = {};
                add_products(sums, Q + i * stride_k, stride_k, KT + j, STRIDE, wide_k / 2);
                for (int r = 0; r < TILE_ROWS; r++)
                    store(P + (i + r) * STRIDE + j, sums[r][0]), store(P + (i + r) * STRIDE + j + WIDTH, sums[r][1]);
            }
        memset(between, 0, sizeof(between));
        float all = 1;
        for (int64_t i = 0; i < rows; i++) {
            for (int64_t j = 0; j < rows; j += WIDTH) store(between + j, load(between + j) * a[i]);
            between[i] = 1;
            for (int64_t j = 0; j <= i; j += WIDTH) {
                const Vec factor = load(between + j), zero = {};
                round((bf16*)(weights + i * HALF) + j, factor == zero ? zero : load(P + i * STRIDE + j) * factor);
            }
            since[i] = all *= a[i];
        }
        for (int64_t c = 0; c < wide_k; c += 2)
            for (int64_t j = 0; j < rows; j += WIDTH) {
                const Bits both = load_bits<Bits>(KT + c / 2 * STRIDE + j);
                round((bf16*)(X + c * HALF) + j, bit_cast<Vec>(both << 16) * load(between + j));
                round((bf16*)(X + (c + 1) * HALF) + j, bit_cast<Vec>(both & 0xffff0000) * load(between + j));
            }
    }
    static void round(bf16* to, Vec x) {
        const __m256bh rounded = _mm512_cvtneps_pbh(x);
        memcpy(to, &rounded, sizeof(rounded));
    }

    // o = scale (since Q S + weights U) for `count` tokens
    void write_outputs(bf16* o, int64_t count) {
        for (int64_t c = 0; c < shape.V; c += PANEL)
            for (int64_t i = 0; i < count; i += TILE_ROWS) {
                Tile sums = {};
                add_products(sums, Q + i * stride_k, stride_k, read + c, stride_v, wide_k / 2);
                for (int r = 0; r < TILE_ROWS; r++) sums[r][0] *= since[i + r], sums[r][1] *= since[i + r];
                add_products(sums, weights + i * HALF, HALF, U + c, stride_v, (i + TILE_ROWS) / 2);
                for (int r = 0; r < TILE_ROWS && i + r < count; r++) {
                    float both[PANEL];
                    store(both, sums[r][0]), store(both + WIDTH, sums[r][1]);
                    pack(o + (i + r) * shape.Hv * shape.V + c, both, in.scale, smaller(PANEL, shape.V - c));
                }
            }
    }

    // S = kept S + X U
    void update_state(int64_t rows) {
        const float kept = between[0] * a[0];
        for (int64_t j = 0; j < wide_v; j += PANEL)
            for (int64_t c = 0; c < wide_k; c += TILE_ROWS) {
                Tile sums;
                for (int r = 0; r < TILE_ROWS; r++) {
                    const float* from = S + (c + r) * stride_v + j;
                    sums[r][0] = load(from) * kept, sums[r][1] = load(from + WIDTH) * kept;
                }
                add_products(sums, X + c * HALF, HALF, U + j, stride_v, rows / 2);
                for (int r = 0; r < TILE_ROWS; r++) {
                    float* to = S + (c + r) * stride_v + j;
                    store(to, sums[r][0]), store(to + WIDTH, sums[r][1]);
                }
            }
    }
};

}  // namespace
#endif
