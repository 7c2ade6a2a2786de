// y = sum over the active columns j of x[:, j] * weight[:, j] for a column-major weight: the other columns are not
// read.
//
// The list of active columns is cut into a fixed number of parts, whose sums are added in order at the end; threads
// share out the parts, and tiles of outputs where there are very many. (Threads that split the outputs would make the
// runs of memory shorter: less bandwidth, measured.)
#include "../columns.h"

namespace {

template <int ROWS> constexpr int PARTS = ROWS == 1 ? 8 : 4;

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
            constexpr int64_t VECS = ROWS * VECTORS<T>;  // of a line of outputs
            T* y = (T*)in.y;
            const T *x = (const T*)in.x, *weight = (const T*)in.weight, *bias = (const T*)in.bias;
            const int64_t lines = (N + LINE<T> - 1) / LINE<T>;
            const ActiveList list(K + GROUP);
            const Scratch packed(ActiveColumns<T>::packed_bytes(ROWS, K));
            const Scratch partial(sizeof(Vec) * PARTS<ROWS> * lines * VECS);  // [PARTS][lines][ROWS][VECTORS]
            if (!list.memory || !packed.memory || !partial.memory) return 2;
            const auto packed_x = (typename Dot<T>::X*)packed.memory;
            Vec* const sums = (Vec*)partial.memory;
            ActiveColumns<T> active = {list.data()};
            active.find(x, in.cutoff, rows, K);
            active.template pack<ROWS>(packed_x, x, rows, K);
            const int threads = threads_for(active.groups * GROUP * N * sizeof(T), in.threads);

            const int64_t tiles = (N + TILE<ROWS> - 1) / TILE<ROWS>,
                          groups = (active.groups + PARTS<ROWS> - 1) / PARTS<ROWS>;
            parallel(tiles * PARTS<ROWS>, 1, threads, [&](int64_t job, int64_t end) {
                for (; job < end; job++) {
                    const int64_t part = job % PARTS<ROWS>, begin = job / PARTS<ROWS> * TILE<ROWS>;
                    const int64_t to = smaller((part + 1) * groups, active.groups);
                    add_columns<T, ROWS>(sums + (part * lines + begin / LINE<T>) * VECS, weight, active, packed_x,
                                         part * groups, to, N, begin, smaller(TILE<ROWS>, N - begin));
                }
            });

            parallel(lines, 1, threads, [&](int64_t line, int64_t end) {
                for (; line < end; line++)
                    for (int64_t b = 0; b < rows; b++) {
                        const int64_t first = line * LINE<T>;
                        add_parts<T>(sums + line * VECS + b * VECTORS<T>, PARTS<ROWS>, lines * VECS,
                                     smaller(LINE<T>, N - first), [&](int64_t i, float value) {
                            from_float(value + (bias ? to_float(bias[first + i]) : 0), y[b * N + first + i]);
                        });
                    }
            });
            return 0;
        });
    });
}
