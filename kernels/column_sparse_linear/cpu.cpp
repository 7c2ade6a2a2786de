// y = sum over the active columns j of x[:, j] * weight[:, j] for a column-major weight: the other columns are not read.
//
// Threads split the outputs. A thread takes a tile of outputs, whose sums stay in the L1 cache, and adds eight active columns to it at a
// time. Runs of memory are short (a tile of one column), which no hardware prefetcher follows: the list of active columns tells what
// comes next, so the columns of a later group are prefetched while one is added.
#include "../simd.h"

namespace {

constexpr int GROUP = 8;               // columns added at a time
constexpr int64_t TILE_BYTES = 8192;   // of sums
constexpr int64_t AHEAD_BYTES = 16384;  // of weights under way

// The list of active columns, and their x packed as [group][ROWS][GROUP / 2].
template <class T, int ROWS> struct Active {
    using X = typename Columns<T>::X;
    Scratch list, values;
    int64_t groups = 0;

    Active(const T* x, const float* cutoff, int64_t rows, int64_t K)
        : list(sizeof(int32_t) * (K + GROUP)), values(sizeof(X) * ROWS * (K + GROUP) / 2) {
        if (!list.memory || !values.memory) return;
        int32_t* columns = (int32_t*)list.memory;
        int64_t found = 0;
        for (int64_t k = 0; k < K; k++) {
            bool any = !cutoff;
            for (int64_t b = 0; cutoff && b < rows; b++) any |= !(magnitude(to_float(x[b * K + k])) <= cutoff[k]);
            columns[found] = int32_t(k);
            found += any;
        }
        groups = (found + GROUP - 1) / GROUP;
        X* packed = (X*)values.memory;
        for (int64_t g = 0; g < groups; g++)
            for (int b = 0; b < ROWS; b++)
                for (int c = 0; c < GROUP; c += 2) {
                    const int64_t i = g * GROUP + c;
                    const auto value = [&](int64_t i) { return i < found && b < rows ? x[b * K + columns[i]] : T{}; };
                    packed[(g * ROWS + b) * (GROUP / 2) + c / 2] = Columns<T>::pack(value(i), value(i + 1));
                }
        for (int64_t i = found; found && i < groups * GROUP; i++) columns[i] = columns[found - 1];  // times zero
    }
    const int32_t* columns(int64_t group) const { return (const int32_t*)list.memory + group * GROUP; }
    const X* x(int64_t group) const { return (const X*)values.memory + group * ROWS * (GROUP / 2); }
};

// sums[ROWS][2] += the SPAN outputs at w[c] of eight columns
template <class T, int ROWS> inline void add_span(Vec* sums, const T* const* w, const typename Columns<T>::X* x) {
    Vec local[ROWS][2];
    memcpy(local, sums, sizeof(local));
    for (int pair = 0; pair < GROUP / 2; pair++) {
        const auto weights = Columns<T>::load_weights(w[2 * pair], w[2 * pair + 1]);
        for (int b = 0; b < ROWS; b++) Columns<T>::add(local[b], weights, x[b * (GROUP / 2) + pair]);
    }
    memcpy(sums, local, sizeof(local));
}

// sums += `count` outputs of eight columns, from w[c] on, while as many from ahead[c] on are prefetched
template <class T, int ROWS>
void add_group(Vec* sums, const T* const (&w)[GROUP], const T* const (&ahead)[GROUP], const typename Columns<T>::X* x, int64_t count) {
    constexpr int SPAN = Columns<T>::SPAN;
    const T* at[GROUP];
    int64_t n = 0;
    for (; n + SPAN <= count; n += SPAN, sums += 2 * ROWS) {
        for (int c = 0; c < GROUP; c++) {
            at[c] = w[c] + n;
            for (int line = 0; line < SPAN; line += 64 / sizeof(T)) prefetch(ahead[c] + n + line);
        }
        add_span<T, ROWS>(sums, at, x);
    }
    if (n < count) {
        T tail[GROUP][SPAN] = {};
        for (int c = 0; c < GROUP; c++) {
            memcpy(tail[c], w[c] + n, sizeof(T) * (count - n));
            at[c] = tail[c];
        }
        add_span<T, ROWS>(sums, at, x);
    }
}

// y[rows, N] at the outputs [begin, begin + count)
template <class T, int ROWS>
void store_tile(T* y, Vec* sums, const T* bias, int64_t rows, int64_t N, int64_t begin, int64_t count) {
    constexpr int SPAN = Columns<T>::SPAN;
    for (int64_t n = 0; n < count; n += SPAN)
        for (int b = 0; b < ROWS; b++, sums += 2) {
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
        return with_rows(rows, [&](auto count_) {
            using T = typename Pointed<decltype(type)>::type;
            constexpr int ROWS = decltype(count_)::value;
            constexpr int64_t TILE = TILE_BYTES / sizeof(float) / ROWS;
            const T *weight = (const T*)weight_, *bias = (const T*)bias_;
            const Active<T, ROWS> active((const T*)x_, cutoff, rows, K);
            if (!active.list.memory || !active.values.memory) return 2;
            parallel(N, 64, threads_for(active.groups * GROUP * N * sizeof(T), threads), [&](int64_t begin, int64_t end) {
                for (; begin < end; begin += TILE) {
                    const int64_t count = smaller(TILE, end - begin);
                    const int64_t distance = 1 + AHEAD_BYTES / (GROUP * sizeof(T) * (count + 64));
                    Vec sums[TILE * ROWS / WIDTH] = {};
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
