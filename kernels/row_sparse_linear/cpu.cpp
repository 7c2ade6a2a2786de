// y = gate * (x @ weight.T + bias) for the outputs whose gate passes the threshold in some row; the other rows of weight are not read.
#include "../active.h"
#include "../rows.h"

// x [rows, K], weight [N, K], gate and y [rows, N], threshold [1], bias [N] or null; 1 <= rows <= 8
HASTEN_EXPORT(hasten_row_sparse_linear)
(int dtype, void* y_, const void* x_, const void* weight_, const void* gate_, const float* threshold, const void* bias_, int64_t rows,
 int64_t N, int64_t K, int threads) {
    return with_dtype(dtype, [&](auto* type) {
        return with_rows(rows, [&](auto width) {
            using T = typename Pointed<decltype(type)>::type;
            constexpr int ROWS = decltype(width)::value;
            T* y = (T*)y_;
            const T *weight = (const T*)weight_, *gate = (const T*)gate_, *bias = (const T*)bias_;
            const PackedRows<T> x((const T*)x_, rows, ROWS, K);
            const ActiveList list(N);
            const int32_t* active = list.data();
            if (!x.data() || !active) return 2;
            const int64_t found = find_active(list.data(), gate, threshold, true, rows, N);
            memset((void*)y, 0, sizeof(T) * rows * N);
            parallel(found, 4, threads_for(found * K * sizeof(T), threads), [&](int64_t begin, int64_t end) {
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
