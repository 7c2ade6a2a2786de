// A product of bfloat16 matrices, summed in float, by the fastest products of the instruction set: see tiles.h,
// matrix.h.
#include "../matrix.h"
#include "../tiles.h"

namespace {

struct TileProductArguments {
    float* c;             // [M, N]
    const void *a, *b;    // [M, K], [K, N], bfloat16
    int64_t M, N, K;
    int64_t repeats;      // how often the packed matrices are multiplied
};

#if defined(HASTEN_TILES)
int multiply(const TileProductArguments& in) {
    const bf16 *a = (const bf16*)in.a, *b = (const bf16*)in.b;
    const int64_t rows = round_up(in.M, BLOCK), columns = round_up(in.N, BLOCK), deep = round_up(in.K, DEPTH);
    Scratch memory(sizeof(bf16) * (rows + columns) * deep + sizeof(float) * BLOCK * BLOCK);
    if (!memory.memory) return 2;
    memset(memory.memory, 0, sizeof(bf16) * (rows + columns) * deep);
    const Tiles left = {(Pair*)memory.memory, deep / DEPTH}, right = {left.data + rows * deep / 2, columns / TILE};
    float* const block = (float*)(right.data + columns * deep / 2);
    for (int64_t i = 0; i < in.M; i++)
        for (int64_t p = 0; p < in.K; p += DEPTH)
            memcpy(left.row(i, p / DEPTH), a + i * in.K + p, sizeof(bf16) * smaller(DEPTH, in.K - p));
    for (int64_t p = 0; p < in.K; p++)
        for (int64_t j = 0; j < in.N; j++)
            ((bf16*)(right.row(p / 2, j / TILE) + j % TILE))[p % 2] = b[p * in.N + j];
    const TileUnits units;
    BlockSums<> sums;
    for (int64_t repeat = 0; repeat < in.repeats; repeat++)
        for (int64_t i = 0; i < in.M; i += BLOCK)
            for (int64_t j = 0; j < in.N; j += BLOCK) {
                sums.clear();
                sums.add(left.from(i / TILE, 0), right.from(0, j / TILE), deep / DEPTH);
                sums.finish(block);
                for (int64_t r = 0; r < smaller(BLOCK, in.M - i); r++)
                    memcpy(in.c + (i + r) * in.N + j, block + r * BLOCK, sizeof(float) * smaller(BLOCK, in.N - j));
            }
    return 0;
}
#else
int multiply(const TileProductArguments& in) {
    const int64_t rows = round_up(in.M, TILE_ROWS), columns = round_up(in.N, WIDTH), deep = round_up(in.K, WIDTH);
    Scratch memory(sizeof(float) * (rows * (deep + columns) + deep * columns));
    if (!memory.memory) return 2;
    memset(memory.memory, 0, sizeof(float) * (rows * (deep + columns) + deep * columns));
    const Matrix left = {(float*)memory.memory, deep}, right = {left.row(rows), columns};
    const Matrix sums = {right.row(deep), columns};
    for (int64_t i = 0; i < in.M; i++)
        for (int64_t p = 0; p < in.K; p++) left.row(i)[p] = to_float(((const bf16*)in.a)[i * in.K + p]);
    for (int64_t p = 0; p < in.K; p++)
        for (int64_t j = 0; j < in.N; j++) right.row(p)[j] = to_float(((const bf16*)in.b)[p * in.N + j]);
    for (int64_t repeat = 0; repeat < in.repeats; repeat++)
        product(sums, left, right, rows, columns, false, [&](int64_t) { return in.K; });
    for (int64_t i = 0; i < in.M; i++) memcpy(in.c + i * in.N, sums.row(i), sizeof(float) * in.N);
    return 0;
}
#endif

}  // namespace

HASTEN_EXPORT(tile_product, TileProductArguments)(const TileProductArguments& in) {
    const FlushDenormals here;
    return multiply(in);
}
