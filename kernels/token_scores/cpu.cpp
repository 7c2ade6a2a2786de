// The attention that tokens receive from few queries, as the mean over heads and queries.
//
// Scores take three passes, each shared by the threads: the logits, for which every key is read once; the softmax of
// every row of logits, left without its division; and the sums over rows, each times its factor. What a job computes
// does not depend on the number of threads.
#include "../rows.h"
#include "../vector_math.h"

namespace {

constexpr int64_t KEYS_OF_JOB = 128;     // whose queries, if they are many, all pass before the next keys
constexpr int64_t TOGETHER = 8;          // queries that take a key from a register
constexpr int64_t AHEAD = 4096;          // bytes that keys are fetched in advance
constexpr int64_t COLUMNS_OF_JOB = 256;  // of the sums over rows

// query [B][Q][H][D], key of B, G, T and D with strides in elements; mask [B][1][T], or [B][Q][T] (mask_per_query), or
// null; softcap 0 for none; scores [B][T].
struct TokenScoresArguments {
    int32_t dtype, threads;
    float scale, softcap;
    float* scores;
    const void *query, *key;
    const uint8_t* mask;
    int64_t B, Q, H, D, G, T, row_stride, group_stride, key_stride, mask_per_query;
};

// Lane l of the result is lane l ^ D of v.
template <int D> inline Vec swap_lanes(Vec v) {
#if defined(__AVX512F__)
    if (D == 8) return _mm512_shuffle_f32x4(v, v, 0x4e);
    if (D == 4) return _mm512_shuffle_f32x4(v, v, 0xb1);
    return _mm512_permute_ps(v, D == 2 ? 0x4e : 0xb1);
#elif defined(__AVX2__)
    if (D == 4) return _mm256_permute2f128_ps(v, v, 1);
    return _mm256_permute_ps(v, D == 2 ? 0x4e : 0xb1);
#else
    Vec swapped;
    for (int l = 0; l < WIDTH; l++) swapped[l] = v[l ^ D];
    return swapped;
#endif
}

// Lane l of the result is the sum of v[l], always by the same tree. v is overwritten.
template <int D = WIDTH / 2> inline Vec sums_of(Vec* v) {
    if constexpr (D == 0) return v[0];
    else {
        Ints lanes;
        for (int l = 0; l < WIDTH; l++) lanes[l] = l;
        const Ints upper = (lanes & D) != 0;
        for (int i = 0; i < D; i++) {
            const Vec kept = upper ? v[i + D] : v[i], moved = upper ? v[i] : v[i + D];
            v[i] = kept + swap_lanes<D>(moved);
        }
        return sums_of<D / 2>(v);
    }
}

// The packed queries of one pass over keys: lines of TOGETHER queries, one below the other.
template <class T> inline int64_t place(int64_t query, int64_t d) {
    return d / LINE<T> * TOGETHER * LINE<T> + query * LINE<T> + d % LINE<T>;
}

// sums[b * KEYS] = the lanes of key . x[b], not yet added up
template <class T, int ROWS, int KEYS>
inline void dot_key(Vec* sums, const T* key, int64_t ahead, int64_t D, const typename Dot<T>::X* x) {
    Vec own[ROWS] = {};
    const auto add = [&](const T* weights, int64_t d) {
        const typename Dot<T>::Weights line(weights);
#pragma GCC unroll 8
        for (int b = 0; b < ROWS; b++) own[b] = Dot<T>::add(own[b], line, x + d * TOGETHER + b * LINE<T>);
    };
    int64_t d = 0;
    for (; d + LINE<T> <= D; d += LINE<T>) {
        prefetch((const void*)((uintptr_t)(key + d) + ahead));
        add(key + d, d);
    }
    if (d < D) {
        T tail[LINE<T>] = {};
        memcpy(tail, key + d, (D - d) * sizeof(T));
        add(tail, d);
    }
#pragma GCC unroll 8
    for (int b = 0; b < ROWS; b++) sums[b * KEYS] = own[b];
}

// softcap * tanh(logits / softcap), or the logits themselves where softcap is 0
inline Vec capped(Vec logits, float softcap) { return softcap == 0 ? logits : tanh(logits / softcap) * softcap; }

// logits[b][t] = scale * key[t] . x[b], capped, for ROWS packed queries, of which `rows` are stored, and `count` keys;
// logits [rows][logits_stride], with room for round_up(count, WIDTH).
template <class T, int ROWS>
inline void dot_keys(float* logits, int64_t logits_stride, int64_t rows, const T* key, int64_t key_stride,
                     int64_t count, int64_t D, const typename Dot<T>::X* x, float scale, float softcap) {
    constexpr int KEYS = ROWS < WIDTH ? WIDTH / ROWS : 1, SUMS = ROWS * KEYS;
    const int64_t bytes = key_stride * sizeof(T), ahead = bytes ? round_up(AHEAD, bytes < 0 ? -bytes : bytes) : 0;
    for (int64_t t = 0; t < count; t += KEYS) {
        Vec sums[SUMS];
        for (int i = 0; i < KEYS; i++)
            dot_key<T, ROWS, KEYS>(sums + i, key + smaller(t + i, count - 1) * key_stride, ahead, D, x);
        float found[SUMS];
        for (int i = 0; i < SUMS; i += WIDTH) store(found + i, capped(sums_of(sums + i) * scale, softcap));
        for (int64_t b = 0; b < rows; b++)
            memcpy(logits + b * logits_stride + t, found + b * KEYS, sizeof(float) * KEYS);
    }
}

// Replaces T logits by exp(logit - largest) where allowed (null: everywhere), else 0, and returns their sum; what
// follows up to the next vector becomes 0. At least one is allowed.
inline float exponentials(float* logits, const uint8_t* allowed, int64_t T) {
    const float lowest = -__builtin_inff();
    if (allowed)
        for (int64_t t = 0; t < T; t++) logits[t] = allowed[t] ? logits[t] : lowest;
    for (int64_t t = T; t < round_up(T, WIDTH); t++) logits[t] = lowest;
    Vec largest = Vec{} + lowest;
    for (int64_t t = 0; t < T; t += WIDTH) {
        const Vec v = load(logits + t);
        largest = v > largest ? v : largest;
    }
    float most = lowest;
    for (int l = 0; l < WIDTH; l++) most = largest[l] > most ? largest[l] : most;
    Vec total = {};
    for (int64_t t = 0; t < T; t += WIDTH) {
        const Vec e = exp(load(logits + t) - most);
        store(logits + t, e);
        total += e;
    }
    return sum(total);
}

template <class T> int score(const TokenScoresArguments& in) {
    using X = typename Dot<T>::X;
    const int64_t B = in.B, Q = in.Q, H = in.H, D = in.D, G = in.G;
    const int64_t share = H / G, rows = Q * share, packed_rows = round_up(rows, TOGETHER);  // on a head of keys
    const int64_t stride = round_up(in.T, WIDTH), x_stride = round_up(D, LINE<T>);
    const size_t packed_bytes = sizeof(X) * B * G * packed_rows * x_stride;
    const Scratch packed(packed_bytes), all_logits(sizeof(float) * B * G * rows * stride);
    const Scratch all_factors(sizeof(float) * B * G * rows), counts(sizeof(int64_t) * B);
    if (!packed.memory || !all_logits.memory || !all_factors.memory || !counts.memory) return 2;
    X* const x = (X*)packed.memory;
    float *const logits = (float*)all_logits.memory, *const factors = (float*)all_factors.memory;
    memset(x, 0, packed_bytes);
    for (int64_t b = 0; b < B; b++)
        for (int64_t q = 0; q < Q; q++)
            for (int64_t h = 0; h < H; h++) {
                const T* from = (const T*)in.query + ((b * Q + q) * H + h) * D;
                const int64_t row = q * share + h % share;
                X* to = x + ((b * G + h / share) * packed_rows + row / TOGETHER * TOGETHER) * x_stride;
                for (int64_t d = 0; d < D; d++) to[place<T>(row % TOGETHER, d)] = Dot<T>::pack(from[d]);
            }
    const auto allowed = [&](int64_t b, int64_t q) {
        return in.mask + (in.mask_per_query ? b * Q + q : b) * in.T;
    };
    int64_t* const counted = (int64_t*)counts.memory;  // queries with an allowed key
    for (int64_t b = 0; b < B; b++) {
        counted[b] = 0;
        for (int64_t q = 0; q < Q; q++) counted[b] += !in.mask || memchr(allowed(b, q), 1, in.T);
    }

    const int64_t blocks = (in.T + KEYS_OF_JOB - 1) / KEYS_OF_JOB, work = B * G * in.T * D * int64_t(sizeof(T));
    parallel_jobs(B * G * blocks, threads_for(work * packed_rows / TOGETHER, in.threads), [&](int64_t job) {
        const int64_t group = job / blocks, first = job % blocks * KEYS_OF_JOB;
        const int64_t before = group / G * in.row_stride + group % G * in.group_stride + first * in.key_stride;
        for (int64_t r = 0; r < rows; r += TOGETHER)
            with_rows(rows - r, [&](auto width) {
                constexpr int ROWS = decltype(width)::value;
                dot_keys<T, ROWS>(logits + (group * rows + r) * stride + first, stride, smaller(rows - r, TOGETHER),
                                  (const T*)in.key + before, in.key_stride, smaller(KEYS_OF_JOB, in.T - first), D,
                                  x + (group * packed_rows + r) * x_stride, in.scale, in.softcap);
                return 0;
            });
    });

    const int threads = threads_for(B * G * rows * stride * 4, in.threads);
    parallel_jobs(B * G * rows, threads, [&](int64_t row) {
        const int64_t b = row / rows / G, q = row % rows / share;
        const uint8_t* mask = in.mask ? allowed(b, q) : nullptr;
        if (mask && !memchr(mask, 1, in.T)) {
            memset(logits + row * stride, 0, sizeof(float) * stride);
            factors[row] = 0;
        } else factors[row] = 1 / (exponentials(logits + row * stride, mask, in.T) * float(H * counted[b]));
    });

    const int64_t parts = (in.T + COLUMNS_OF_JOB - 1) / COLUMNS_OF_JOB;
    parallel_jobs(B * parts, threads, [&](int64_t job) {
        const int64_t b = job / parts, first = job % parts * COLUMNS_OF_JOB;
        const int64_t end = smaller(first + COLUMNS_OF_JOB, in.T);
        const float *from = logits + b * G * rows * stride, *factor = factors + b * G * rows;
        for (int64_t t = first; t < end; t += WIDTH) {
            Vec total = {};
            for (int64_t row = 0; row < G * rows; row++) total += load(from + row * stride + t) * factor[row];
            store_part(in.scores + b * in.T + t, total, smaller(WIDTH, end - t));
        }
    });
    return 0;
}

}  // namespace

HASTEN_EXPORT(token_scores, TokenScoresArguments)(const TokenScoresArguments& in) {
    return with_dtype(in.dtype, [&](auto* type) { return score<typename Pointed<decltype(type)>::type>(in); });
}
