// Products of small float matrices that lie in the cache, in tiles of registers.
#pragma once
#include "simd.h"

namespace {

constexpr int TILE_ROWS = REGISTERS == 32 ? 8 : 4, TILE_VECTORS = 2;

// A matrix in rows of `stride` floats, or (step != 1) its transpose: element (r, c) is at data[r * stride + c * step].
struct Matrix {
    float* data;
    int64_t stride, step = 1;
    Matrix rows(int64_t first) const { return {data + first * stride, stride, step}; }
    float* row(int64_t r) const { return data + r * stride; }
    Matrix transposed() const { return {data, step, stride}; }
};

// c (+)= a . b for ROWS rows and VECTORS vectors of columns; a may be transposed, b and c not.
template <int ROWS, int VECTORS>
inline void product_tile(const Matrix& c, const Matrix& a, const Matrix& b, int64_t inner, int64_t column, bool add) {
    Vec sums[ROWS][VECTORS] = {};
    const float* from = a.data;
    const float* with = b.data + column;
    for (int64_t p = 0; p < inner; p++, from += a.step, with += b.stride) {
        Vec columns[VECTORS];
        for (int j = 0; j < VECTORS; j++) columns[j] = load(with + j * WIDTH);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < VECTORS; j++) sums[r][j] += from[r * a.stride] * columns[j];
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < VECTORS; j++) {
            float* to = c.row(r) + column + j * WIDTH;
            store(to, add ? load(to) + sums[r][j] : sums[r][j]);
        }
}

// TILE_ROWS rows of c (+)= a . b, `columns` wide, a multiple of WIDTH.
inline void product_rows(const Matrix& c, const Matrix& a, const Matrix& b, int64_t inner, int64_t columns, bool add) {
    int64_t column = 0;
    for (; column + TILE_VECTORS * WIDTH <= columns; column += TILE_VECTORS * WIDTH)
        product_tile<TILE_ROWS, TILE_VECTORS>(c, a, b, inner, column, add);
    for (; column < columns; column += WIDTH) product_tile<TILE_ROWS, 1>(c, a, b, inner, column, add);
}

// c (+)= a . b for `rows` rows, a multiple of TILE_ROWS. `inner_of(r)` is how many columns of a count for the tile of
// rows that begins at r.
template <class Inner>
inline void product(const Matrix& c, const Matrix& a, const Matrix& b, int64_t rows, int64_t columns, bool add,
                    const Inner& inner_of) {
    constexpr int64_t PANEL = TILE_VECTORS * WIDTH;  // columns of b that stay in the first cache for all rows
    for (int64_t column = 0; column < columns; column += PANEL) {
        const Matrix panel = {b.data + column, b.stride}, target = {c.data + column, c.stride};
        const int64_t wide = smaller(PANEL, columns - column);
        for (int64_t r = 0; r < rows; r += TILE_ROWS)
            product_rows(target.rows(r), a.rows(r), panel, inner_of(r), wide, add);
    }
}

// c[i][j] = a[i] . b[j] for i, j < SIZE: rows of `width` floats, a multiple of WIDTH
template <int SIZE> inline void dots_tile(const Matrix& c, const Matrix& a, const Matrix& b, int64_t width) {
    Vec sums[SIZE][SIZE] = {};
    for (int64_t p = 0; p < width; p += WIDTH) {
        Vec right[SIZE];
        for (int j = 0; j < SIZE; j++) right[j] = load(b.row(j) + p);
        for (int i = 0; i < SIZE; i++) {
            const Vec left = load(a.row(i) + p);
            for (int j = 0; j < SIZE; j++) sums[i][j] += left * right[j];
        }
    }
    for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) c.row(i)[j] = quick_sum(sums[i][j]);
}

// The same for i, j < size, a power of two
inline void dots(const Matrix& c, const Matrix& a, const Matrix& b, int64_t size, int64_t width) {
    if (size == 1) return dots_tile<1>(c, a, b, width);
    if (size == 2) return dots_tile<2>(c, a, b, width);
    for (int64_t i = 0; i < size; i += 4)
        for (int64_t j = 0; j < size; j += 4) dots_tile<4>({c.row(i) + j, c.stride}, a.rows(i), b.rows(j), width);
}

}  // namespace
