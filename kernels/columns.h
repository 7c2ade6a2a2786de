// Sums over the columns of a column-major weight: what column_sparse_linear and expert_linear share.
//
// A thread adds eight columns at a time to sums that stay in its cache. Memory is read in runs of one column, which no
// hardware prefetcher foresees: the list of columns tells what comes next, so the columns of a later group are
// prefetched while one is added.
#pragma once
#include "active.h"

namespace {

constexpr int GROUP = 8;                // columns added at a time
constexpr int64_t TILE_BYTES = 65536;   // of sums that are kept in the cache
constexpr int64_t AHEAD_BYTES = 16384;  // of weights under way, at least
template <int ROWS> constexpr int64_t TILE = TILE_BYTES / (sizeof(float) * ROWS);  // outputs

// The columns active in some of `rows` rows x [rows, K] in groups, and their x packed as [group][ROWS][GROUP].
template <class T> struct ActiveColumns {
    using X = typename Dot<T>::X;
    int32_t* list;  // memory for K + GROUP + WIDTH indices
    int64_t found = 0, groups = 0;

    // Without a cutoff every column is active.
    void find(const T* x, const float* cutoff, int64_t rows, int64_t K) {
        found = K;
        if (cutoff) found = find_active(list, x, cutoff, false, rows, K);
        else for (int64_t k = 0; k < K; k++) list[k] = int32_t(k);
        groups = (found + GROUP - 1) / GROUP;
        for (int64_t i = found; i < groups * GROUP; i++) list[i] = list[found - 1];  // times zero
    }
    // Memory for packed_bytes(ROWS, K).
    template <int ROWS> void pack(X* packed, const T* x, int64_t rows, int64_t K) const {
        if (groups) memset(packed, 0, sizeof(X) * groups * GROUP * ROWS);
        for (int64_t b = 0; b < rows; b++)
            for (int64_t i = 0; i < found; i++)
                packed[(i / GROUP * ROWS + b) * GROUP + i % GROUP] = Dot<T>::pack(x[b * K + list[i]]);
    }
    static size_t packed_bytes(int64_t ROWS, int64_t K) { return sizeof(X) * ROWS * round_up(K, GROUP); }
};

// sums[ROWS][VECTORS] += the line of outputs at w[c] of eight columns
template <class T, int ROWS> inline void add_line(Vec* sums, const T* const* w, const typename Dot<T>::X* x) {
    Vec local[ROWS][VECTORS<T>];
    memcpy(local, sums, sizeof(local));
    for (int pair = 0; pair < GROUP / 2; pair++) {
        const typename Columns<T>::Weights weights(w[2 * pair], w[2 * pair + 1]);
        for (int b = 0; b < ROWS; b++) Columns<T>::add(local[b], weights, x + b * GROUP + 2 * pair);
    }
    memcpy(sums, local, sizeof(local));
}

// sums += `count` outputs of eight columns, from w[c] on, while as many from ahead[c] on are prefetched
template <class T, int ROWS>
void add_group(Vec* sums, const T* const (&w)[GROUP], const T* const (&ahead)[GROUP], const typename Dot<T>::X* x,
               int64_t count) {
    constexpr int SPAN = LINE<T>;
    const T* at[GROUP];
    int64_t n = 0;
    for (; n + SPAN <= count; n += SPAN, sums += ROWS * VECTORS<T>) {
        for (int c = 0; c < GROUP; c++) {
            at[c] = w[c] + n;
            prefetch(ahead[c] + n);
        }
        add_line<T, ROWS>(sums, at, x);
    }
    if (n < count) {
        T tail[GROUP][SPAN] = {};
        for (int c = 0; c < GROUP; c++) {
            memcpy(tail[c], w[c] + n, sizeof(T) * (count - n));
            at[c] = tail[c];
        }
        add_line<T, ROWS>(sums, at, x);
    }
}

// sums [lines of outputs][ROWS][VECTORS] = the groups [from, to) of active columns for the `count` outputs from `begin`
// on; at most TILE<ROWS>. weight [K][N] in memory, x as it was packed.
template <class T, int ROWS>
void add_columns(Vec* sums, const T* weight, const ActiveColumns<T>& active, const typename Dot<T>::X* x, int64_t from,
                 int64_t to, int64_t N, int64_t begin, int64_t count) {
    const int64_t distance = 1 + AHEAD_BYTES / (GROUP * sizeof(T) * (count + LINE<T>));
    const size_t bytes = sizeof(float) * ROWS * round_up(count, LINE<T>);
    Vec tile[TILE<ROWS> * ROWS / WIDTH];
    memset(tile, 0, bytes);
    for (int64_t g = from; g < to; g++) {
        const int32_t *now = active.list + g * GROUP,
                      *later = active.list + smaller(g + distance, active.groups - 1) * GROUP;
        const T *w[GROUP], *ahead[GROUP];
        for (int c = 0; c < GROUP; c++) {
            w[c] = weight + now[c] * N + begin;
            ahead[c] = weight + later[c] * N + begin;
        }
        add_group<T, ROWS>(tile, w, ahead, x + g * ROWS * GROUP, count);
    }
    memcpy(sums, tile, bytes);
}

// y[b] = the sums of the parts, which are `apart` vectors from each other, of the `count` outputs of one line; store(i,
// value)
template <class T, class Store>
inline void add_parts(const Vec* sums, int64_t parts, int64_t apart, int64_t count, const Store& store) {
    Vec total[VECTORS<T>] = {};
    for (int64_t part = 0; part < parts; part++)
        for (int v = 0; v < VECTORS<T>; v++) total[v] += sums[part * apart + v];
    Columns<T>::in_order(total);
    float values[LINE<T>];
    memcpy(values, total, sizeof(values));
    for (int64_t i = 0; i < count; i++) store(i, values[i]);
}

}  // namespace
