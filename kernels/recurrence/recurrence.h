// The recurrence of linear attention and of the delta rule, in chunks and in steps: S = Diag(a) S + k u^T, o = scale
// S^T q, where u is beta v, or for the delta rule beta (v - (Diag(a) S)^T k). With a normaliser, linear attention's v
// has a last component of 1, which stays in the state, and o is divided by its own.
//
// A thread takes one head of one sequence and goes through its chunks in order; all that a chunk needs lies in the
// thread's cache, in float. Decays enter as products of the factors a themselves, never as differences of summed
// logarithms: no factor exceeds 1, zeros need no care, and nothing cancels. A state is multiplied as S += (a - 1) S,
// for a factor near 1 that was rounded once would bias a state that is multiplied by it thousands of times.
#pragma once
#include "../matrix.h"
#include "../vector_math.h"

namespace {

constexpr int64_t CHUNK = 64;
constexpr float EPSILON = 1e-6f;  // added to the normaliser

// Strides in elements.
struct TokenStrides { int64_t row, token, head, component; };
struct StateStrides { int64_t row, head, k, v; };

struct Shape {
    int64_t N, T, H, Hv, K, V;
    TokenStrides q, k, v;
    TokenStrides beta, decay;  // 0 where a decay does not depend on it; its components are contiguous
    StateStrides state;
};

struct RecurrenceArguments {
    int32_t dtype, threads;
    void* o;
    const void *q, *k, *v;
    const float *beta, *decay;  // null: none
    const float* skip;          // null: zeros; of each head of v what o takes of v itself
    const float* initial;       // null: zeros
    float* state;               // of whole sequences the final ones, contiguous; of steps what they continue and change
    const int64_t* bounds;      // null: sequence n is row n of the batch; else tokens bounds[n] to bounds[n + 1]
    float scale;
    int32_t unit;               // make q and k unit vectors
    int32_t normalize;          // the state has one column more than v
    int32_t wide;               // o is float, whatever the others are
    Shape shape;
};

template <class T> struct Inputs {
    const T *q, *k, *v;
    const float *decay, *beta, *skip;
    const int64_t* bounds;
    float scale;
    bool unit, wide;
    int64_t ones;  // columns of the state beyond those of v
    explicit Inputs(const RecurrenceArguments& in)
        : q((const T*)in.q), k((const T*)in.k), v((const T*)in.v), decay(in.decay), beta(in.beta), skip(in.skip),
          bounds(in.bounds),
          scale(in.scale), unit(in.unit != 0), wide(in.wide != 0), ones(in.normalize != 0) {}

    // Token t of batch row `row` for head `head` of v
    const T* q_at(const Shape& shape, int64_t row, int64_t head, int64_t t) const {
        return q + row * shape.q.row + t * shape.q.token + head * shape.H / shape.Hv * shape.q.head;
    }
    const T* k_at(const Shape& shape, int64_t row, int64_t head, int64_t t) const {
        return k + row * shape.k.row + t * shape.k.token + head * shape.H / shape.Hv * shape.k.head;
    }
    const T* v_at(const Shape& shape, int64_t row, int64_t head, int64_t t) const {
        return v + row * shape.v.row + t * shape.v.token + head * shape.v.head;
    }
    const float* beta_at(const Shape& shape, int64_t row, int64_t head, int64_t t) const {
        return beta + row * shape.beta.row + t * shape.beta.token + head * shape.beta.head;
    }
    const float* decay_at(const Shape& shape, int64_t row, int64_t head, int64_t t) const {
        return decay + row * shape.decay.row + t * shape.decay.token + head * shape.decay.head;
    }
    // o of a token: scale times `from`, whose last column is the normaliser where there is one, and the skip
    void write(void* o, const Shape& shape, int64_t row, int64_t head, int64_t t, float* from) const;
};

// A row stride that spreads over the cache's sets.
inline int64_t odd_lines(int64_t floats) { return (round_up(floats, 16) / 16 | 1) * 16; }

// to[0 .. count) = from, padded with zeros to `width`, a multiple of WIDTH
template <class T> inline void unpack(float* to, const T* from, int64_t count, int64_t width) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
    if (i < count) store(to + i, load_part(from + i, count - i)), i += WIDTH;
    for (; i < width; i += WIDTH) store(to + i, Vec{});
}

// The same of components `stride` elements apart
template <class T> inline void gather(float* to, const T* from, int64_t stride, int64_t count, int64_t width) {
    if (stride == 1) return unpack(to, from, count, width);
    for (int64_t i = 0; i < width; i++) to[i] = i < count ? to_float(from[i * stride]) : 0.f;
}

// The same of `count` tokens; `rows` rows, of which the others become zeros
template <class T>
inline void gather(const Matrix& to, const T* from, const TokenStrides& strides, int64_t count, int64_t rows,
                   int64_t size, int64_t width) {
    if (strides.component == 1) {
        for (int64_t i = 0; i < rows; i++) unpack(to.row(i), from + i * strides.token, i < count ? size : 0, width);
        return;
    }
    for (int64_t i = 0; i < rows; i++) memset(to.row(i), 0, sizeof(float) * width);
    for (int64_t c = 0; c < size; c++)  // tokens are neighbours in memory
        for (int64_t i = 0; i < count; i++) to.row(i)[c] = to_float(from[i * strides.token + c * strides.component]);
}

template <class T> inline void pack(T* to, const float* from, float scale, int64_t count) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i) * scale);
    if (i < count) store_part(to + i, load(from + i) * scale, count - i);
}

template <class T>
void Inputs<T>::write(void* o, const Shape& shape, int64_t row, int64_t head, int64_t t, float* from) const {
    const int64_t to = ((row * shape.T + t) * shape.Hv + head) * shape.V;
    float factor = ones ? scale / (from[shape.V] + EPSILON) : scale;
    if (skip) {
        const T* values = v_at(shape, row, head, t);
        for (int64_t j = 0; j < shape.V; j++)
            from[j] = from[j] * factor + skip[head] * to_float(values[j * shape.v.component]);
        factor = 1;
    }
    if (wide) pack((float*)o + to, from, factor, shape.V);
    else pack((T*)o + to, from, factor, shape.V);
}

inline void multiply(float* row, float factor, int64_t width) {
    for (int64_t i = 0; i < width; i += WIDTH) store(row + i, load(row + i) * factor);
}

inline void make_unit(float* row, int64_t width) {
    Vec squares = {};
    for (int64_t i = 0; i < width; i += WIDTH) squares += load(row + i) * load(row + i);
    multiply(row, 1.f / __builtin_sqrtf(sum(squares) + 1e-6f), width);
}

// Prefetches `rows` rows: memory is read in pieces of one head of one token, which no hardware prefetcher foresees
template <class T> inline void expect(const T* from, const TokenStrides& strides, int64_t rows, int64_t size) {
    const bool in_rows = strides.component == 1;
    const int64_t stride = in_rows ? strides.token : strides.component, along = in_rows ? size : rows;
    for (int64_t i = 0; i < (in_rows ? rows : size); i++)
        for (int64_t c = 0; c < along; c += LINE<T>) prefetch(from + i * stride + c);
}

// (I - L) u = ... by forward substitution in place, L strictly lower: `rows` rows, a multiple of TILE_ROWS
inline void substitute(const Matrix& U, const Matrix& L, int64_t rows, int64_t width) {
    for (int64_t first = 0; first < rows; first += TILE_ROWS) {
        if (first) product_rows(U.rows(first), L.rows(first), U, first, width, true);
        const Matrix own = U.rows(first), by = {L.row(first) + first, L.stride};
        for (int64_t c = 0; c < width; c += WIDTH)
            for (int i = 1; i < TILE_ROWS; i++) {
                Vec u = load(own.row(i) + c);
                for (int j = 0; j < i; j++) u += load(own.row(j) + c) * by.row(i)[j];
                store(own.row(i) + c, u);
            }
    }
}

// Writes to every huge page of new memory: the system clears a page when it is first written to, which takes longer
// than all else here. Threads that each do it for pages of their own do not wait for each other.
inline void first_write(void* memory, int64_t bytes, int threads) {
    constexpr int64_t PAGE = 2 << 20;
    parallel(bytes / PAGE, 1, threads, [&](int64_t from, int64_t to) {
        for (int64_t page = from; page < to; page++) ((volatile char*)memory)[page * PAGE + PAGE - 1] = 0;
    });
}

// Whole sequences (3 where a decay is positive) by Work, which is made once per thread and takes up to Work::heads
// heads of a sequence at a time.
template <class Work, class T>
int run_chunks(void* o, const float* initial, float* final, const Shape& shape, const Inputs<T>& in, int threads) {
    int failed = 0;
    const int64_t size = shape.K * (shape.V + in.ones), rows = in.bounds ? 1 : shape.N;
    first_write(o, rows * shape.T * shape.Hv * shape.V * (in.wide ? sizeof(float) : sizeof(T)), threads);
    parallel(shape.N * shape.Hv, 1, threads, [&](int64_t from, int64_t to) {
        Work chunks(shape, in);
        if (!chunks.memory.memory) {
            failed = 2;
            return;
        }
        for (int64_t item = from, count; item < to; item += count) {
            const int64_t n = item / shape.Hv, head = item % shape.Hv, row = in.bounds ? 0 : n;
            const int64_t begin = in.bounds ? in.bounds[n] : 0, end = in.bounds ? in.bounds[n + 1] : shape.T;
            count = smaller(smaller(chunks.heads, to - item), shape.Hv - head);
            chunks.run(o, initial ? initial + item * size : nullptr, final + item * size, row, head, count, begin, end);
        }
        if (chunks.grows) failed = 3;
    });
    return failed;
}

}  // namespace
