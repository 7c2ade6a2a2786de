// y = x @ weight.T + bias for a few rows of x: every weight is read once and used for all of them.
#include "../rows.h"

namespace {

// x [rows, K], weight [N, K], bias [N] or null, y [rows, N]; 1 <= rows <= 8
struct LinearArguments {
    int32_t dtype, threads;
    void* y;
    const void *x, *weight, *bias;
    int64_t rows, N, K;
};

}  // namespace

HASTEN_EXPORT(linear, LinearArguments)(const LinearArguments& in) {
    const int64_t rows = in.rows, N = in.N, K = in.K;
    return with_dtype(in.dtype, [&](auto* type) {
        return with_rows(rows, [&](auto width) {
            using T = typename Pointed<decltype(type)>::type;
            constexpr int ROWS = decltype(width)::value;
            T* y = (T*)in.y;
            const T *weight = (const T*)in.weight, *bias = (const T*)in.bias;
            const PackedRows<T> x((const T*)in.x, rows, ROWS, K);
            if (!x.data()) return 2;
            parallel(N, 4, threads_for(N * K * sizeof(T), in.threads), [&](int64_t begin, int64_t end) {
                const auto row = [&](int64_t n) { return weight + n * K; };
                for_each_row<T, ROWS>(begin, end, K, x, row, [&](int64_t n, const float* sums) {
                    const float offset = bias ? to_float(bias[n]) : 0;
                    for (int64_t b = 0; b < rows; b++) from_float(sums[b] + offset, y[b * N + n]);
                });
            });
            return 0;
        });
    });
}
