// y = x @ weight.T + bias for a few rows of x: every weight is read once and used for all of them.
#include "../rows.h"

// x [rows, K], weight [N, K], bias [N] or null, y [rows, N]; 1 <= rows <= 8
HASTEN_EXPORT(hasten_linear)
(int dtype, void* y_, const void* x_, const void* weight_, const void* bias_, int64_t rows, int64_t N, int64_t K, int threads) {
    return with_dtype(dtype, [&](auto* type) {
        return with_rows(rows, [&](auto width) {
            using T = typename Pointed<decltype(type)>::type;
            constexpr int ROWS = decltype(width)::value;
            T* y = (T*)y_;
            const T *weight = (const T*)weight_, *bias = (const T*)bias_;
            const PackedRows<T> x((const T*)x_, rows, ROWS, K);
            if (!x.data()) return 2;
            parallel(N, 4, threads_for(N * K * sizeof(T), threads), [&](int64_t begin, int64_t end) {
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
