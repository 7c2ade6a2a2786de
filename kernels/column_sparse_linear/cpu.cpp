// y = sum over the active columns j of x[:, j] * weight[:, j] for a column-major weight: the other columns are not read.
//
// Threads split the outputs. A thread takes a tile of outputs, whose sums stay in its cache, and adds eight active columns to it at a
// time. Memory is read in short runs (the tile of one column), which no hardware prefetcher foresees: the list of active columns tells
// what comes next, so the columns of a later group are prefetched while one is added.
#include "../active.h"

namespace {

constexpr int GROUP = 8;                // columns added at a time
constexpr int64_t TILE_BYTES = 65536;   // of sums
constexpr int64_t AHEAD_BYTES = 16384;  // of weights under way, at least

// The active columns in groups, and their x packed as [group][ROWS][GROUP].
template <class T, int ROWS> struct ActiveColumns {
    using X = typename Dot<T>::X;
    ActiveList list;
    Scratch packed;
    int64_t groups = 0;

    ActiveColumns(const T* x, const float* cutoff, int64_t rows, int64_t K)
        : list(K + GROUP), packed(sizeof(X) * ROWS * (K + GROUP)) {
        if (!list.memory || !packed.memory) return;
        int32_t* columns = list.data();
        int64_t found = K;
        if (cutoff) found = find_active(columns, x, cutoff, false, rows, K);
        else for (int64_t k = 0; k < K; k++) columns[k] = int32_t(k);

        groups = (found + GROUP - 1) / GROUP;
        if (groups) memset(packed.memory, 0, sizeof(X) * groups * GROUP * ROWS);
        for (int64_t i = found; i < groups * GROUP; i++) columns[i] = columns[found - 1];  // times zero
        for (int64_t b = 0; b < rows; b++)
            for (int64_t i = 0; i < found; i++)
                ((X*)packed.memory)[(i / GROUP * ROWS + b) * GROUP + i % GROUP] = Dot<T>::pack(x[b * K + columns[i]]);
    }
    const int32_t* columns(int64_t group) const { return list.data() + group * GROUP; }
    const X* x(int64_t group) const { return (const X*)packed.memory + group * ROWS * GROUP; }
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
void add_group(Vec* sums, const T* const (&w)[GROUP], const T* const (&ahead)[GROUP], const typename Dot<T>::X* x, int64_t count) {
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

// y[rows, N] at the outputs [begin, begin + count)
template <class T, int ROWS>
void store_tile(T* y, Vec* sums, const T* bias, int64_t rows, int64_t N, int64_t begin, int64_t count) {
    constexpr int SPAN = LINE<T>;
    for (int64_t n = 0; n < count; n += SPAN)
        for (int b = 0; b < ROWS; b++, sums += VECTORS<T>) {
            if (b >= rows) continue;
            Columns<T>::in_order(sums);
            float values[SPAN];
            memcpy(values, sums, sizeof(values));
            const int64_t here = begin + n, length = smaller(SPAN, count - n);
            for (int64_t i = 0; i < length; i++)
                from_float(values[i] + (bias ? to_float(bias[here + i]) : 0), y[b * N + here + i]);
        }
}

}  // namespace

// x [rows, K], weight [K][N] in memory, cutoff [K] or null, bias [N] or null, y [rows, N]; 1 <= rows <= 8
HASTEN_EXPORT(hasten_column_sparse_linear)
(int dtype, void* y_, const void* x_, const void* weight_, const float* cutoff, const void* bias_, int64_t rows, int64_t N, int64_t K,
 int threads) {
    return with_dtype(dtype, [&](auto* type) {
        return with_rows(rows, [&](auto width) {
            using T = typename Pointed<decltype(type)>::type;
            constexpr int ROWS = decltype(width)::value;
            constexpr int64_t TILE = TILE_BYTES / (sizeof(float) * ROWS);
            const T *weight = (const T*)weight_, *bias = (const T*)bias_;
            const ActiveColumns<T, ROWS> active((const T*)x_, cutoff, rows, K);
            if (!active.list.memory || !active.packed.memory) return 2;
            parallel(N, 64, threads_for(active.groups * GROUP * N * sizeof(T), threads), [&](int64_t begin, int64_t end) {
                for (; begin < end; begin += TILE) {
                    const int64_t count = smaller(TILE, end - begin);
                    const int64_t distance = 1 + AHEAD_BYTES / (GROUP * sizeof(T) * (count + 64));
                    Vec sums[TILE * ROWS / WIDTH];
                    memset(sums, 0, sizeof(float) * ROWS * round_up(count, LINE<T>));
                    for (int64_t g = 0; g < active.groups; g++) {
                        const int32_t *now = active.columns(g), *later = active.columns(smaller(g + distance, active.groups - 1));
                        const T *w[GROUP], *ahead[GROUP];
                        for (int c = 0; c < GROUP; c++) {
                            w[c] = weight + now[c] * N + begin;
                            ahead[c] = weight + later[c] * N + begin;
                        }
                        add_group<T, ROWS>(sums, w, ahead, active.x(g), count);
                    }
                    store_tile<T, ROWS>((T*)y_, sums, bias, rows, N, begin, count);
                }
            });
            return 0;
        });
    });
}
