// y = sum over the active columns j of x[:, j] * weight[:, j] for a column-major weight: the other columns are not read.
//
// The list of active columns is cut into a fixed number of parts, whose sums are added in order at the end; threads share out the parts,
// and tiles of outputs where there are very many. A thread adds eight columns at a time to sums that stay in its cache. Memory is read
// in runs of one column, which no hardware prefetcher foresees: the list tells what comes next, so the columns of a later group are
// prefetched while one is added. (Threads that split the outputs would make the runs shorter: less bandwidth, measured.)
#include "../active.h"

namespace {

constexpr int GROUP = 8;                // columns added at a time
constexpr int64_t TILE_BYTES = 65536;   // of sums that are kept in the cache
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

// The sums of every part, [PARTS][lines of outputs][ROWS][VECTORS].
template <class T, int ROWS> struct PartialSums : Scratch {
    static constexpr int PARTS = ROWS == 1 ? 8 : 4;
    const int64_t lines;
    explicit PartialSums(int64_t N)
        : Scratch(sizeof(float) * PARTS * ROWS * round_up(N, LINE<T>)), lines(round_up(N, LINE<T>) / LINE<T>) {}
    Vec* at(int64_t part, int64_t line) const { return (Vec*)memory + (part * lines + line) * (ROWS * VECTORS<T>); }
};

// x [rows, K], weight [K][N] in memory, cutoff [K] or null, bias [N] or null, y [rows, N]; 1 <= rows <= 8
struct ColumnSparseLinearArguments {
    int32_t dtype, threads;
    void* y;
    const void *x, *weight, *bias;
    const float* cutoff;
    int64_t rows, N, K;
};

}  // namespace

HASTEN_EXPORT(column_sparse_linear, ColumnSparseLinearArguments)(const ColumnSparseLinearArguments& in) {
    const int64_t rows = in.rows, N = in.N, K = in.K;
    return with_dtype(in.dtype, [&](auto* type) {
        return with_rows(rows, [&](auto width) {
            using T = typename Pointed<decltype(type)>::type;
            constexpr int ROWS = decltype(width)::value;
            constexpr int PARTS = PartialSums<T, ROWS>::PARTS;
            constexpr int64_t TILE = TILE_BYTES / (sizeof(float) * ROWS);
            T* y = (T*)in.y;
            const T *weight = (const T*)in.weight, *bias = (const T*)in.bias;
            const ActiveColumns<T, ROWS> active((const T*)in.x, in.cutoff, rows, K);
            const PartialSums<T, ROWS> sums(N);
            if (!active.list.memory || !active.packed.memory || !sums.memory) return 2;
            const int threads = threads_for(active.groups * GROUP * N * sizeof(T), in.threads);

            const int64_t tiles = (N + TILE - 1) / TILE, groups = (active.groups + PARTS - 1) / PARTS;
            parallel(tiles * PARTS, 1, threads, [&](int64_t job, int64_t end) {
                for (; job < end; job++) {
                    const int64_t part = job % PARTS, begin = job / PARTS * TILE, count = smaller(TILE, N - begin);
                    const int64_t distance = 1 + AHEAD_BYTES / (GROUP * sizeof(T) * (count + LINE<T>));
                    const size_t bytes = sizeof(float) * ROWS * round_up(count, LINE<T>);
                    Vec tile[TILE * ROWS / WIDTH];
                    memset(tile, 0, bytes);
                    for (int64_t g = part * groups; g < smaller((part + 1) * groups, active.groups); g++) {
                        const int32_t *now = active.columns(g), *later = active.columns(smaller(g + distance, active.groups - 1));
                        const T *w[GROUP], *ahead[GROUP];
                        for (int c = 0; c < GROUP; c++) {
                            w[c] = weight + now[c] * N + begin;
                            ahead[c] = weight + later[c] * N + begin;
                        }
                        add_group<T, ROWS>(tile, w, ahead, active.x(g), count);
                    }
                    memcpy(sums.at(part, begin / LINE<T>), tile, bytes);
                }
            });

            parallel(sums.lines, 1, threads, [&](int64_t line, int64_t end) {
                for (; line < end; line++)
                    for (int64_t b = 0; b < rows; b++) {
                        Vec total[VECTORS<T>] = {};
                        for (int part = 0; part < PARTS; part++)
                            for (int v = 0; v < VECTORS<T>; v++) total[v] += sums.at(part, line)[b * VECTORS<T> + v];
                        Columns<T>::in_order(total);
                        float values[LINE<T>];
                        memcpy(values, total, sizeof(values));
                        const int64_t first = line * LINE<T>, length = smaller(LINE<T>, N - first);
                        for (int64_t i = 0; i < length; i++)
                            from_float(values[i] + (bias ? to_float(bias[first + i]) : 0), y[b * N + first + i]);
                    }
            });
            return 0;
        });
    });
}
