// y = gate * (x @ weight.T + bias) for the outputs whose gate passes the threshold in some row; the other rows of
// weight are not read.
#include "../active.h"
#include "../rows.h"

namespace {

// x [rows, K], weight [N, K], gate and y [rows, N], threshold [1], bias [N] or null; 1 <= rows <= 8
struct RowSparseLinearArguments {
    int32_t dtype, threads;
    void* y;
    const void *x, *weight, *gate, *bias;
    const float* threshold;
    int64_t rows, N, K;
};

}  // namespace

HASTEN_EXPORT(row_sparse_linear, RowSparseLinearArguments)(const RowSparseLinearArguments& in) {
    const int64_t rows = in.rows, N = in.N, K = in.K;
    return with_dtype(in.dtype, [&](auto* type) {
        return with_rows(rows, [&](auto width) {
            using T = typename Pointed<decltype(type)>::type;
            constexpr int ROWS = decltype(width)::value;
            T* y = (T*)in.y;
            const T *weight = (const T*)in.weight, *gate = (const T*)in.gate, *bias = (const T*)in.bias;
            const PackedRows<T> x((const T*)in.x, rows, ROWS, K);
            const ActiveList list(N);
            const int32_t* active = list.data();
            if (!x.data() || !active) return 2;
            const int64_t found = find_active(list.data(), gate, in.threshold, true, rows, N);
            memset((void*)y, 0, sizeof(T) * rows * N);
            parallel(found, 4, threads_for(found * K * sizeof(T), in.threads), [&](int64_t begin, int64_t end) {
                const auto row = [&](int64_t i) { return weight + active[i] * K; };
                for_each_row<T, ROWS>(begin, end, K, x, row, [&](int64_t i, const float* sums) {
                    const int64_t n = active[i];
                    const float offset = bias ? to_float(bias[n]) : 0;
                    for (int64_t b = 0; b < rows; b++) {
                        const int64_t at = b * N + n;
                        from_float(to_float(gate[at]) * (sums[b] + offset), y[at]);
                    }
                });
            });
            return 0;
        });
    });
}
