// What a thread that works in tiles of bfloat16 keeps: of several heads from chunk to chunk, and of one chunk.
#pragma once
#include "step.h"
#include "../tiles.h"

#if defined(HASTEN_TILES)
namespace {

constexpr int64_t BLOCK_SUMS = BLOCK * BLOCK;

// Of a head from chunk to chunk.
struct TiledHead {
    float* S;       // [K, V] in blocks of BLOCK x BLOCK
    Tiles read;     // the same, rounded, as a right operand
    float* powers;  // of a constant decay: exp(g d) at [C - d], zeros for d < 0
};

// Tokens of a chunk. Longer ones move less state, and matrix units make their larger triangles cheap.
#if defined(__AMX_BF16__)
constexpr int64_t LONG = 128, SHORT = 64;
#else
constexpr int64_t LONG = 64, SHORT = 64;
#endif

struct TiledMemory {
    static constexpr int64_t MOST_HEADS = 8, CACHE = 768 << 10;  // of the states that are worked on in turn

    const Shape& shape;
    const bool delta, vector;      // the delta rule; decays that are vectors
    const int64_t C;               // tokens of a chunk
    const int64_t wide_k, wide_v;  // of the state, in whole blocks
    const int64_t deep, across;    // the same in blocks
    const int64_t row_stride;      // of q, k and A
    const int64_t heads;           // that are worked on in turn
    Scratch memory;
    TiledHead held[MOST_HEADS];
    // Of q and k: as left operands; k as a right one; the triangles of q k^T and k k^T, blocks of BLOCK x BLOCK. Where
    // decays are vectors: the rows in float, and triangles that hold the decays.
    Tiles Q, K, KT;
    float *q, *k, *scores, *overlaps;
    // Left operands: q and k times the decay since the chunk began, q and k of one level of halving, weights of the
    // chunk's tokens, what blocks of them correct in later ones, k transposed (where decays are vectors, times the
    // decay until the chunk ends).
    Tiles since_q, since_k, halves, weights, corrections, keys_left;
    Tiles values, aged;  // v, or what the delta rule writes, as a right operand; the same when the chunk ends
    float *U, *inner;  // of the delta rule: what it writes [C, V]; what tokens of one block correct in each other
    float *A;         // decays [C, K], where they are vectors
    float *block, *line, *plane;       // sums, four blocks in turn; part of a row; the state in rows
    float *between, *strength, *until_end, *kept;  // [C], [C], [K]
    bf16 *padded, *gathered_q, *gathered_k, *gathered_v;  // a row; rows of tokens, where those of components are given

    static int64_t wide(int64_t size) { return round_up(size, BLOCK); }
    int64_t fitting_heads() const {
        const int64_t fit = CACHE / (6 * wide_k * wide_v + 4 * (2 * C + BLOCK));
        return fit < 1 ? 1 : smaller(fit, MOST_HEADS);
    }

    TiledMemory(const Shape& shape, int64_t ones, bool delta, bool vector)
        : shape(shape), delta(delta), vector(vector), C(delta || vector ? SHORT : LONG), wide_k(wide(shape.K)),
          wide_v(wide(shape.V + ones)), deep(wide_k / BLOCK), across(wide_v / BLOCK), row_stride(odd_lines(wide_k)),
          heads(fitting_heads()), memory(lay_out(0)) {
        if (!memory.memory) return;
        memset(memory.memory, 0, lay_out(0));
        lay_out((uintptr_t)memory.memory);
    }

    // Points all of the above to the memory at the address `from`; how many bytes they take.
    int64_t lay_out(uintptr_t from) {
        uintptr_t unused = from;
        const auto take = [&](int64_t count) {
            const uintptr_t taken = unused;
            unused += round_up(4 * count, 64);
            return (float*)taken;
        };
        const auto tiles = [&](int64_t rows, int64_t columns) {
            return Tiles{(Pair*)take(rows * columns * TILE_PAIRS), columns};
        };
        const int64_t rows = C / TILE, blocks = C / BLOCK;
        for (int64_t i = 0; i < heads; i++)
            held[i] = {take(wide_k * wide_v), tiles(deep, 2 * across), take(2 * C + BLOCK)};
        Q = tiles(rows, deep), K = tiles(rows, deep), KT = tiles(deep, rows);
        keys_left = tiles(2 * deep, blocks), aged = tiles(blocks, 2 * across), until_end = take(C);
        weights = tiles(rows, blocks), values = tiles(blocks, 2 * across);
        scores = take(C * C), block = take(4 * BLOCK_SUMS), plane = take(wide_k * wide_v);
        line = take(3 * (wide_k + wide_v)), padded = (bf16*)take(wide_k + wide_v);
        const auto rows_of = [&](const TokenStrides& strides, int64_t width) {
            return (bf16*)take(strides.component == 1 ? 0 : C * width / 2);
        };
        gathered_q = rows_of(shape.q, wide_k), gathered_k = rows_of(shape.k, wide_k);
        gathered_v = rows_of(shape.v, wide(shape.V));
        between = take(C + BLOCK), strength = take(C), kept = take(wide_k);
        if (delta) {
            corrections = tiles(rows, blocks);
            overlaps = take(C * C), U = take(C * odd_lines(wide_v)), inner = take(C * BLOCK);
        }
        if (vector) {
            since_q = tiles(rows, deep), since_k = tiles(rows, deep);
            halves = tiles(2 * rows, deep);
            q = take(C * row_stride), k = take(C * row_stride), A = take(C * row_stride);
        }
        return unused - from;
    }

    float* block_of(float* blocks, int64_t row, int64_t column) const {
        return blocks + (row * (C / BLOCK) + column) * BLOCK_SUMS;
    }
    float* state_row(const TiledHead& head, int64_t c, int64_t column) const {
        return head.S + (c / BLOCK * across + column) * BLOCK_SUMS + c % BLOCK * BLOCK;
    }

    // The state from and to rows of `stride` floats, of which the first `width` are its own
    void set_state(const TiledHead& head, const float* from, int64_t rows, int64_t stride, int64_t width) {
        for (int64_t c = 0; c < rows; c++)
            for (int64_t j = 0; j < across; j++)
                memcpy(state_row(head, c, j), from + c * stride + j * BLOCK,
                       sizeof(float) * smaller(BLOCK, width - j * BLOCK));
        for (int64_t c = 0; c < wide_k; c += 2)
            for (int64_t j = 0; j < across; j++) round_state(head, c, j);
    }
    void get_state(const TiledHead& head, float* to, int64_t rows, int64_t stride, int64_t width) const {
        for (int64_t c = 0; c < rows; c++)
            for (int64_t j = 0; j < across; j++)
                memcpy(to + c * stride + j * BLOCK, state_row(head, c, j),
                       sizeof(float) * smaller(BLOCK, width - j * BLOCK));
    }
    void round_state(const TiledHead& head, int64_t c, int64_t column) const {  // rows c and c + 1 of a block
        const float* s = state_row(head, c, column);
        for (int64_t half = 0; half < 2; half++)
            put_pairs(head.read.row(c / 2 % TILE + c / BLOCK * TILE, 2 * column + half), lanes(s + half * TILE),
                      lanes(s + BLOCK + half * TILE));
    }
};

}  // namespace
#endif
