// Linear layers of a mixture of experts: the rows of x are sorted by their expert, whose weights are then read once for
// all of them.
//
// Row-major experts are multiplied as in linear, column-major ones as in column_sparse_linear, with a list of active
// columns per expert. Threads share (expert, tile) pairs; what a job computes does not depend on the number of threads.
#include "../columns.h"
#include "../rows.h"

namespace {

constexpr int64_t TOGETHER = 8;    // rows of x that one pass over an expert takes
constexpr int64_t TILE_ROWS = 64;  // rows of a row-major weight in one job
constexpr int64_t JOBS = 64;       // of column-major weights, at least, if their columns can be cut into so many parts
constexpr int64_t MOST_PARTS = 16;

// x of T tokens and P picks with strides in elements, ids [T][P], y [T][P][N]; weight [E][N][K] or (column_major)
// [E][K][N]; bias [E][N] or null; cutoff [E][K] or null.
struct ExpertLinearArguments {
    int32_t dtype, threads, column_major, unused;
    void* y;
    const void *x, *weight, *bias;
    const int64_t* ids;
    const float* cutoff;
    int64_t T, P, E, N, K, token_stride, pick_stride;
};

// Rows of x that picked the same expert, at most TOGETHER: they are places [first, first + rows) of the sorted ones.
struct Chunk {
    int64_t expert, first, rows;
    bool continues;  // the chunk before has the same expert
};

// The rows of x sorted by expert, one below the other.
template <class T> struct SortedRows {
    Scratch order, chunk_memory, gathered;
    int64_t found = 0, chunks = 0;

    explicit SortedRows(const ExpertLinearArguments& in)
        : order(sizeof(int64_t) * in.T * in.P), chunk_memory(sizeof(Chunk) * in.T * in.P),
          gathered(sizeof(T) * in.T * in.P * in.K) {
        if (!ok()) return;
        int64_t* places = (int64_t*)order.memory;
        for (int64_t i = 0; i < in.T * in.P; i++) {
            if (in.ids[i] < 0 || in.ids[i] >= in.E) continue;
            int64_t at = found++;
            for (; at && in.ids[places[at - 1]] > in.ids[i]; at--) places[at] = places[at - 1];
            places[at] = i;
        }
        for (int64_t at = 0; at < found; at++) {
            const int64_t i = places[at], expert = in.ids[i];
            Chunk* last = (Chunk*)chunk_memory.memory + chunks - 1;
            const bool continues = chunks && last->expert == expert;
            if (continues && last->rows < TOGETHER) last->rows++;
            else ((Chunk*)chunk_memory.memory)[chunks++] = {expert, at, 1, continues};
            memcpy((T*)gathered.memory + at * in.K,
                   (const T*)in.x + i / in.P * in.token_stride + i % in.P * in.pick_stride, sizeof(T) * in.K);
        }
    }
    bool ok() const { return order.memory && chunk_memory.memory && gathered.memory; }
    const Chunk& chunk(int64_t c) const { return ((const Chunk*)chunk_memory.memory)[c]; }
    int64_t place(int64_t at) const { return ((const int64_t*)order.memory)[at]; }  // in ids and y
    const T* x(int64_t at, int64_t K) const { return (const T*)gathered.memory + at * K; }
};

constexpr int64_t power_of_two(int64_t rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : 8; }

template <class T> int by_rows(const ExpertLinearArguments& in, const SortedRows<T>& sorted) {
    using X = typename Dot<T>::X;
    const int64_t N = in.N, K = in.K, stride = round_up(K, LINE<T>);
    const Scratch packed(sizeof(X) * sorted.chunks * TOGETHER * stride);
    if (!packed.memory) return 2;
    for (int64_t c = 0; c < sorted.chunks; c++) {
        const Chunk& chunk = sorted.chunk(c);
        pack_rows((X*)packed.memory + c * TOGETHER * stride, stride, sorted.x(chunk.first, K), chunk.rows,
                  power_of_two(chunk.rows), K);
    }
    const int64_t tiles = (N + TILE_ROWS - 1) / TILE_ROWS;
    parallel_jobs(sorted.chunks * tiles, threads_for(sorted.chunks * N * K * sizeof(T), in.threads), [&](int64_t job) {
        const int64_t c = job / tiles, begin = job % tiles * TILE_ROWS;
        const Chunk& chunk = sorted.chunk(c);
        with_rows(chunk.rows, [&](auto width) {
            constexpr int ROWS = decltype(width)::value;
            const PackedView<T> x = {(const X*)packed.memory + c * TOGETHER * stride, stride};
            const T* weight = (const T*)in.weight + chunk.expert * N * K;
            const T* bias = in.bias ? (const T*)in.bias + chunk.expert * N : nullptr;
            for_each_row<T, ROWS>(begin, smaller(begin + TILE_ROWS, N), K, x, [&](int64_t n) { return weight + n * K; },
                                  [&](int64_t n, const float* sums) {
                const float offset = bias ? to_float(bias[n]) : 0;
                for (int64_t b = 0; b < chunk.rows; b++)
                    from_float(sums[b] + offset, ((T*)in.y)[sorted.place(chunk.first + b) * N + n]);
            });
            return 0;
        });
    });
    return 0;
}

template <class T> int by_columns(const ExpertLinearArguments& in, const SortedRows<T>& sorted) {
    using X = typename Dot<T>::X;
    const int64_t N = in.N, K = in.K, lines = round_up(N, LINE<T>) / LINE<T>, room = round_up(K + GROUP + WIDTH, WIDTH);
    int64_t jobs = 0;  // before the columns are cut into parts
    const auto tiles_of = [&](int64_t rows) { return (N * power_of_two(rows) * 4 + TILE_BYTES - 1) / TILE_BYTES; };
    for (int64_t c = 0; c < sorted.chunks; c++) jobs += tiles_of(sorted.chunk(c).rows);
    if (!jobs) return 0;
    const int64_t parts = JOBS / jobs < 1 ? 1 : smaller(JOBS / jobs, MOST_PARTS);

    struct Task {
        ActiveColumns<T> active;
        const X* x;
        Vec* sums;
        int64_t tiles, left;
    };
    int64_t width = 0;  // rows of all chunks
    for (int64_t c = 0; c < sorted.chunks; c++) width += power_of_two(sorted.chunk(c).rows);
    const Scratch tasks(sizeof(Task) * sorted.chunks), lists(sizeof(int32_t) * room * sorted.chunks);
    const Scratch packed(ActiveColumns<T>::packed_bytes(width, K)),
        sums(sizeof(float) * width * parts * lines * LINE<T>);
    const Scratch starts(sizeof(int64_t) * (sorted.chunks + 1));
    if (!tasks.memory || !lists.memory || !packed.memory || !sums.memory || !starts.memory) return 2;
    Task* const task = (Task*)tasks.memory;
    int64_t* const start = (int64_t*)starts.memory;
    int64_t rows_before = 0, bytes = 0;
    start[0] = 0;
    for (int64_t c = 0; c < sorted.chunks; c++) {
        const Chunk& chunk = sorted.chunk(c);
        task[c] = {{},
                   (X*)packed.memory + rows_before * round_up(K, GROUP),
                   (Vec*)sums.memory + rows_before * parts * lines * VECTORS<T>,
                   tiles_of(chunk.rows),
                   0};
        task[c].left = parts * task[c].tiles;
        if (chunk.continues) task[c].active = task[c - 1].active;
        else {
            int64_t rows = chunk.rows;
            for (int64_t more = c + 1; more < sorted.chunks && sorted.chunk(more).continues; more++)
                rows += sorted.chunk(more).rows;
            task[c].active.list = (int32_t*)lists.memory + c * room;
            task[c].active.find(sorted.x(chunk.first, K), in.cutoff ? in.cutoff + chunk.expert * K : nullptr, rows, K);
        }
        with_rows(chunk.rows, [&](auto ROWS) {
            task[c].active.template pack<decltype(ROWS)::value>((X*)task[c].x, sorted.x(chunk.first, K), chunk.rows, K);
            return 0;
        });
        rows_before += power_of_two(chunk.rows);
        start[c + 1] = start[c] + parts * task[c].tiles;
        bytes += task[c].active.groups * GROUP * N * sizeof(T);
    }

    parallel_jobs(start[sorted.chunks], threads_for(bytes, in.threads), [&](int64_t job) {
        int64_t c = 0;
        while (start[c + 1] <= job) c++;
        const Chunk& chunk = sorted.chunk(c);
        with_rows(chunk.rows, [&](auto width) {
            constexpr int ROWS = decltype(width)::value;
            constexpr int64_t VECS = ROWS * VECTORS<T>;  // of a line
            const int64_t part = (job - start[c]) % parts, begin = (job - start[c]) / parts * TILE<ROWS>;
            const int64_t groups = task[c].active.groups, from = groups * part / parts,
                          to = groups * (part + 1) / parts;
            const T* weight = (const T*)in.weight + chunk.expert * N * K;
            const int64_t count = smaller(TILE<ROWS>, N - begin);
            add_columns<T, ROWS>(task[c].sums + (part * lines + begin / LINE<T>) * VECS, weight, task[c].active,
                                 task[c].x, from, to, N, begin, count);
            if (__atomic_sub_fetch(&task[c].left, 1, __ATOMIC_ACQ_REL)) return 0;
            // The last job of the chunk: all its sums are there.
            const T* bias = in.bias ? (const T*)in.bias + chunk.expert * N : nullptr;
            for (int64_t line = 0; line < lines; line++)
                for (int64_t b = 0; b < chunk.rows; b++) {
                    const int64_t first = line * LINE<T>;
                    T* y = (T*)in.y + sorted.place(chunk.first + b) * N + first;
                    add_parts<T>(task[c].sums + line * VECS + b * VECTORS<T>, parts, lines * VECS,
                                 smaller(LINE<T>, N - first), [&](int64_t i, float value) {
                        from_float(value + (bias ? to_float(bias[first + i]) : 0), y[i]);
                    });
                }
            return 0;
        });
    });
    return 0;
}

}  // namespace

HASTEN_EXPORT(expert_linear, ExpertLinearArguments)(const ExpertLinearArguments& in) {
    return with_dtype(in.dtype, [&](auto* type) {
        using T = typename Pointed<decltype(type)>::type;
        const SortedRows<T> sorted(in);
        if (!sorted.ok()) return 2;
        for (int64_t i = 0; i < in.T * in.P; i++)
            if (in.ids[i] < 0 || in.ids[i] >= in.E) memset((T*)in.y + i * in.N, 0, sizeof(T) * in.N);
        return in.column_major ? by_columns(in, sorted) : by_rows(in, sorted);
    });
}
