// Dot products of rows of a row-major weight with a few rows of x: what linear and row_sparse_linear share.
#pragma once
#include "simd.h"

namespace {

// x [rows, K] packed for Dot<T> as [ROWS, stride], zeros where it is padded.
template <class T>
inline void pack_rows(typename Dot<T>::X* to, int64_t stride, const T* x, int64_t rows, int64_t ROWS, int64_t K) {
    memset(to, 0, sizeof(*to) * ROWS * stride);
    for (int64_t b = 0; b < rows; b++)
        for (int64_t k = 0; k < K; k++) to[b * stride + k] = Dot<T>::pack(x[b * K + k]);
}

template <class T> struct PackedView {
    const typename Dot<T>::X* memory;
    int64_t stride;
    const typename Dot<T>::X* data() const { return memory; }
};

template <class T> struct PackedRows {
    using X = typename Dot<T>::X;
    int64_t stride;
    Scratch scratch;
    PackedRows(const T* x, int64_t rows, int64_t ROWS, int64_t K)
        : stride(round_up(K, LINE<T>)), scratch(sizeof(X) * ROWS * stride) {
        if (scratch.memory) pack_rows((X*)scratch.memory, stride, x, rows, ROWS, K);
    }
    const X* data() const { return (const X*)scratch.memory; }
};

// How many rows of the weight are taken together, so that the sums stay in registers.
template <int ROWS> constexpr int rows_together() { return ROWS <= 2 ? REGISTERS / 4 : REGISTERS / 8; }

// out[i][b] = w[i] . x[b] for R rows of the weight; next are the rows that the caller takes after these.
template <class T, int ROWS, int R, class Packed>
inline void dot_rows(const T* const (&w)[R], const T* const (&next)[R], const Packed& x, int64_t K,
                     float (&out)[R][ROWS]) {
    constexpr int AHEAD = 2048 / sizeof(T);
    Vec sums[R][ROWS] = {};
    const auto add = [&](int i, const T* weights, int64_t k) {
        const typename Dot<T>::Weights line(weights);
#pragma GCC unroll 8
        for (int b = 0; b < ROWS; b++) sums[i][b] = Dot<T>::add(sums[i][b], line, x.data() + b * x.stride + k);
    };
    int64_t k = 0;
    for (; k + LINE<T> <= K; k += LINE<T>)
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            prefetch(k + AHEAD < K ? w[i] + k + AHEAD : next[i] + (k + AHEAD - K));
            add(i, w[i] + k, k);
        }
    if (k < K)
        for (int i = 0; i < R; i++) {
            T tail[LINE<T>] = {};
            memcpy(tail, w[i] + k, (K - k) * sizeof(T));
            add(i, tail, k);
        }
    for (int i = 0; i < R; i++)
        for (int b = 0; b < ROWS; b++) out[i][b] = sum(sums[i][b]);
}

// store(i, sums[ROWS]) for every i in [begin, end): the dot products of row(i) of the weight.
template <class T, int ROWS, class Packed, class Row, class Store>
inline void for_each_row(int64_t begin, int64_t end, int64_t K, const Packed& x, const Row& row, const Store& store) {
    constexpr int R = rows_together<ROWS>();
    for (int64_t i = begin; i < end; i += R) {
        const T *w[R], *next[R];
        for (int r = 0; r < R; r++) {  // a group that is too short repeats its last row
            w[r] = row(smaller(i + r, end - 1));
            next[r] = row(smaller(i + R + r, end - 1));
        }
        float sums[R][ROWS];
        dot_rows<T, ROWS>(w, next, x, K, sums);
        for (int r = 0; r < R && i + r < end; r++) store(i + r, sums[r]);
    }
}

}  // namespace
