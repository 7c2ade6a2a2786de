// What decays make of a chunk: weights of its tokens for each other, and q and k since it began and until it ends.
#pragma once
#include "tiled_loads.h"

#if defined(HASTEN_TILES)
namespace {

constexpr PairLanes PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct TiledDecays : TiledLoads {
    using TiledLoads::TiledLoads;

    // exp(g d) for the distances d of tokens
    void set_powers(float* powers, double g) const {
        memset(powers, 0, sizeof(float) * (2 * C + BLOCK));
        for (int64_t d = 0; d <= C; d++) powers[C - d] = float(__builtin_exp(d ? g * d : 0.));
    }

    // The weights of row i, which `factors` multiply, and for the delta rule what its token corrects
    void weigh(int64_t i, const float* factors) {
        const Lanes zero = {};
        const float by_q = vector ? 1.f : norm_q[i], by_k = -beta[i] * (vector ? 1.f : norm_k[i]);
        expect_lines(4);
        for (int64_t j = 0; j <= i / BLOCK; j++) {
            const int64_t at = i % BLOCK * BLOCK;
            Lanes w[2], l[2];
            for (int64_t half = 0; half < 2; half++) {
                const Lanes factor = factors ? lanes(factors + j * BLOCK + half * TILE) : zero + 1.f;
                const Lanes by = factor * lanes(strength + j * BLOCK + half * TILE);
                const float* products = block_of(scores, i / BLOCK, j) + at + half * TILE;
                w[half] = factor == zero ? zero : lanes(products) * by * by_q;
                if (!delta) continue;
                products = block_of(overlaps, i / BLOCK, j) + at + half * TILE;
                l[half] = factor == zero ? zero : lanes(products) * by * by_k;
            }
            put_row(weights.row(i, j), w[0], w[1]);
            if (!delta) continue;
            if (j < i / BLOCK) {
                put_row(corrections.row(i, j), l[0], l[1]);
                continue;
            }
            put(inner + i * BLOCK, l[0]), put(inner + i * BLOCK + TILE, l[1]);
            inner[i * BLOCK + i % BLOCK] = 0;
        }
    }

    // One decay for all components: it multiplies the triangles of products.
    void scalar_decays(const TiledHead& head, const Place& at, int64_t rows) {
        const float* until;
        if (constant) {
            for (int64_t i = 0; i < rows; i++) {
                weigh(i, head.powers + C - i);
                set_factors(i, head.powers[C - i - 1]);
            }
            until = head.powers + C - at.count + 1;
            const double g = in.decay ? in.decay[at.head * shape.decay.head] : 0;
            kept[0] = float(__builtin_expm1(g * at.count));
        } else {
            const float* g = decay_of(at);
            double all = 0;
            float since = 1;
            memset(between, 0, sizeof(float) * C);
            for (int64_t i = 0; i < rows; i++) {
                const float log_decay = i < at.count ? g[i * shape.decay.token] : 0.f;
                const float factor = __builtin_expf(log_decay);
                for (int64_t j = 0; j < rows; j += TILE) put(between + j, lanes(between + j) * factor);
                between[i] = 1;
                all += log_decay;
                grows |= log_decay > 0;
                weigh(i, between);
                set_factors(i, since *= factor);
            }
            until = between;
            kept[0] = float(__builtin_expm1(all));
        }
        for (int64_t c = 1; c < wide_k; c++) kept[c] = kept[0];
        for (int64_t j = 0; j < rows; j += TILE) put(until_end + j, lanes(until + j) * lanes(strength + j));
    }
    // What is left of the values when the chunk ends, as a right operand
    void age_values(int64_t rows) {
        const PairLanes upper = PairLanes{} + 0xffff0000;
        for (int64_t i = 0; i < rows; i += 2)
            for (int64_t j = 0; j < 2 * across; j++) {
                Lanes even, odd;
                if (delta) {
                    const float* u = U + i * odd_lines(wide_v) + j * TILE;
                    even = lanes(u), odd = lanes(u + odd_lines(wide_v));
                } else {
                    const PairLanes both = load_bits<PairLanes>(values.row(i / DEPTH * TILE + i % DEPTH / 2, j));
                    even = bit_cast<Lanes>(both << 16), odd = bit_cast<Lanes>(both & upper);
                }
                put_pairs(aged.row(i / DEPTH * TILE + i % DEPTH / 2, j), even * until_end[i], odd * until_end[i + 1]);
            }
    }

    // What row i of Q S, and of K S for the delta rule, is multiplied by: the decay since the chunk began is one of
    // them.
    void set_factors(int64_t i, float since) {
        of_q[i] = since * norm_q[i];
        of_k[i] = since * norm_k[i] * -beta[i];
    }

    // Every component decays by itself. Halving: what the second half of a block sees of the first passes its middle,
    // and factors there; the halves are blocks of their own.
    void vector_decays(const Place& at, int64_t rows) {
        load_decays(at, rows);
        memset(scores, 0, sizeof(float) * C * C);
        if (delta) memset(overlaps, 0, sizeof(float) * C * C);
        for (int64_t i = 0; i < rows; i++) {
            Lanes dot = {};
            const float *query = q + i * row_stride, *key = k + i * row_stride;
            for (int64_t c = 0; c < wide_k; c += TILE) dot += lanes(query + c) * lanes(key + c);
            block_of(scores, i / BLOCK, i / BLOCK)[i % BLOCK * (BLOCK + 1)] = total(dot);
        }
        for (int64_t tile = 0; tile < rows / TILE; tile++) {
            halve_tile<1>(tile);
            halve_tile<2>(tile);
            halve_tile<4>(tile);
            halve_tile<8>(tile);
        }
        for (int64_t tile = 0; tile < rows / TILE; tile += 2) halve_tiles<1>(tile);
        if (rows > BLOCK) halve_tiles<2>(0);
        for (int64_t i = 0; i < rows; i++) {
            weigh(i, nullptr);
            of_q[i] = 1, of_k[i] = -beta[i];
        }
        since_and_until(rows);
    }
    void load_decays(const Place& at, int64_t rows) {
        const float* g = decay_of(at);
        Vec highest = {};
        memset(kept, 0, sizeof(float) * wide_k);
        for (int64_t i = 0; i < rows; i++) {
            float* const row = A + i * row_stride;
            unpack(row, g + i * shape.decay.token, i < at.count ? shape.K : 0, wide_k);
            for (int64_t c = 0; c < wide_k; c += WIDTH) {
                const Vec log_decay = load(row + c);
                highest = log_decay > highest ? log_decay : highest;
                store(kept + c, load(kept + c) + log_decay);
                store(row + c, exp(log_decay));
            }
        }
        for (int64_t c = 0; c < wide_k; c += WIDTH) store(kept + c, expm1(load(kept + c)));
        grows |= sum(highest) > 0;
    }
    // Halves within tile `tile` of tokens. Its q and k under decays are a tile of `halves` each, one below the other.
    template <int HALF> void halve_tile(int64_t tile) {
        const int64_t begin = tile * TILE * row_stride;
        for (int64_t c = 0; c < deep; c++) {
            Pair *const of_q = halves.at(2 * tile, c), *const of_k = halves.at(2 * tile + 1, c);
            for (int64_t r = 0; r < TILE; r += 2 * HALF) {
                const int64_t at = begin + r * row_stride + c * DEPTH;
                until<HALF>(of_k + r * TILE, at);
                since<HALF>(of_q + (r + HALF) * TILE, of_k + (r + HALF) * TILE, at + HALF * row_stride);
            }
            transpose(KT.at(c, tile), of_k);
        }
        one_column(block, halves.from(2 * tile, 0), KT.from(0, tile), deep);
        const int64_t side = tile % 2 * TILE, blocks = tile / 2;
        for (int64_t r = HALF; r < TILE; r++) {
            if (!(r / HALF & 1)) continue;
            const PairLanes place = PLACES - uint32_t(r / (2 * HALF) * (2 * HALF));  // from the first half on
            const auto seen = place < uint32_t(HALF);
            float* to = block_of(scores, blocks, blocks) + (side + r) * BLOCK + side;
            put(to, seen ? lanes(block + r * BLOCK) : lanes(to));
            if (!delta) continue;
            to = block_of(overlaps, blocks, blocks) + (side + r) * BLOCK + side;
            put(to, seen ? lanes(block + (TILE + r) * BLOCK) : lanes(to));
        }
    }
    // Of `count` rows from `at` on: k times the decay until they end; q and k times the decay since they began
    template <int COUNT> void until(Pair* of_k, int64_t at) const {
        Lanes first = Lanes{} + 1.f, second = first;
        for (int64_t r = COUNT - 1; r >= 0; r--) {
            const float *key = k + at + r * row_stride, *decay = A + at + r * row_stride;
            put_row(of_k + r * TILE, lanes(key) * first, lanes(key + TILE) * second);
            first *= lanes(decay), second *= lanes(decay + TILE);
        }
    }
    template <int COUNT> void since(Pair* of_q, Pair* of_k, int64_t at) const {
        Lanes first = Lanes{} + 1.f, second = first;
        for (int64_t r = 0; r < COUNT; r++) {
            const int64_t from = at + r * row_stride;
            first *= lanes(A + from), second *= lanes(A + from + TILE);
            put_row(of_q + r * TILE, lanes(q + from) * first, lanes(q + from + TILE) * second);
            if (delta) put_row(of_k + r * TILE, lanes(k + from) * first, lanes(k + from + TILE) * second);
        }
    }
    // Halves of TILES tiles of tokens each
    template <int TILES> void halve_tiles(int64_t begin) {
        const int64_t middle = begin + TILES;
        for (int64_t c = 0; c < deep; c++) {
            Lanes first = Lanes{} + 1.f, second = first;
            for (int64_t r = middle * TILE - 1; r >= begin * TILE; r--) {
                const int64_t from = r * row_stride + c * DEPTH;
                put_row(halves.at(2 * (r / TILE) + 1, c) + r % TILE * TILE, lanes(k + from) * first,
                        lanes(k + from + TILE) * second);
                first *= lanes(A + from), second *= lanes(A + from + TILE);
            }
            for (int64_t tile = begin; tile < middle; tile++) transpose(KT.at(c, tile), halves.at(2 * tile + 1, c));
            first = second = Lanes{} + 1.f;
            for (int64_t r = middle * TILE; r < (middle + TILES) * TILE; r++) {
                const int64_t from = r * row_stride + c * DEPTH, at = r % TILE * TILE;
                first *= lanes(A + from), second *= lanes(A + from + TILE);
                put_row(halves.at(2 * (r / TILE), c) + at, lanes(q + from) * first, lanes(q + from + TILE) * second);
                if (delta)
                    put_row(halves.at(2 * (r / TILE) + 1, c) + at, lanes(k + from) * first,
                            lanes(k + from + TILE) * second);
            }
        }
        for (int64_t tile = middle; tile < middle + TILES; tile++)
            for (int64_t column = begin; column < middle; column += 2) {
                const int64_t width = TILES == 1 ? TILE : BLOCK;
                if (TILES == 1) one_column(block, halves.from(2 * tile, 0), KT.from(0, column), deep);
                else products(block, halves.from(2 * tile, 0), KT.from(0, column), deep);
                for (int64_t r = 0; r < TILE; r++) {
                    const int64_t to = (tile % 2 * TILE + r) * BLOCK + column % 2 * TILE;
                    memcpy(block_of(scores, tile / 2, column / 2) + to, block + r * BLOCK, sizeof(float) * width);
                    if (!delta) continue;
                    memcpy(block_of(overlaps, tile / 2, column / 2) + to, block + (TILE + r) * BLOCK,
                           sizeof(float) * width);
                }
            }
    }
    void since_and_until(int64_t rows) {
        for (int64_t c = 0; c < deep; c++) {
            Lanes first = Lanes{} + 1.f, second = first;
            for (int64_t j = rows - 1; j >= 0; j--) {
                const float *key = k + j * row_stride + c * DEPTH, *decay = A + j * row_stride + c * DEPTH;
                put_row(halves.row(j, c), lanes(key) * first * strength[j], lanes(key + TILE) * second * strength[j]);
                first *= lanes(decay), second *= lanes(decay + TILE);
            }
            first = second = Lanes{} + 1.f;
            for (int64_t i = 0; i < rows; i++) {
                const int64_t from = i * row_stride + c * DEPTH;
                first *= lanes(A + from), second *= lanes(A + from + TILE);
                put_row(since_q.row(i, c), lanes(q + from) * first, lanes(q + from + TILE) * second);
                if (!delta) continue;
                put_row(since_k.row(i, c), lanes(k + from) * first, lanes(k + from + TILE) * second);
            }
        }
        transpose_keys(halves, rows);
    }
};

}  // namespace
#endif
