// Softmax attention over keys and values that lie in pages, bfloat16 in, fp32 sums.
//
// A page holds `page_tokens` tokens [page_tokens, G, D] of one layer of one request; `tables[i]` lists the pages of request i.
// The H = G * R query heads of a group of R share one KV head.

#include <algorithm>
#include <cmath>
#include <vector>

#include "tiles.h"

using namespace dsla;

namespace {

struct Pages {
    char* k;
    char* v;
    int64_t page_bytes;
    int page_tokens, groups, dim;

    uint16_t* key(const int64_t* table, int64_t token) const { return at(k, table, token); }
    uint16_t* value(const int64_t* table, int64_t token) const { return at(v, table, token); }

   private:
    uint16_t* at(char* base, const int64_t* table, int64_t token) const {
        char* page = base + table[token / page_tokens] * page_bytes;
        return reinterpret_cast<uint16_t*>(page) + token % page_tokens * groups * dim;
    }
};

constexpr int MAX_DIM = 256;
constexpr int SPLIT = 512;  // keys one work item of a decode step reads

// What attention over some keys leaves: largest score, sum of weights, weighted sum of values.
struct Partial {
    float top, total;
    float y[MAX_DIM];

    void clear(int dim) {
        top = -INFINITY;
        total = 0;
        std::fill_n(y, dim, 0.0f);
    }
};

constexpr int STRETCH = 128;  // keys whose scores are kept at once; while they are read, the next ones are fetched
constexpr int MAX_SHARED = 8;  // query heads of a group that are computed at once

// Where the keys and values of the first KV head of consecutive tokens lie; the last row is repeated beyond the end.
struct Rows {
    const uint16_t *keys[SPLIT + STRETCH], *values[SPLIT + STRETCH];

    Rows(const Pages& p, const int64_t* table, int64_t begin, int64_t end) {
        const int count = int(std::min<int64_t>(end - begin, SPLIT + STRETCH));
        for (int i = 0; i < count;) {
            const int same_page = std::min(count - i, int(p.page_tokens - (begin + i) % p.page_tokens));
            const uint16_t *key = p.key(table, begin + i), *value = p.value(table, begin + i);
            for (int j = 0; j < same_page; j++, i++) {
                keys[i] = key + j * p.groups * p.dim;
                values[i] = value + j * p.groups * p.dim;
            }
        }
        std::fill(keys + count, keys + SPLIT + STRETCH, keys[count - 1]);
        std::fill(values + count, values + SPLIT + STRETCH, values[count - 1]);
    }
};

// Query heads of the KV head that lies `shift` elements into each row, over `count` rows from `first` on, added to `out`.
// D is the head dim, or 0 where it is only known as `any_dim`.
template <int R, int D>
void attend_stretch(const Rows& rows, int first, int count, int shift, int any_dim, const uint16_t* q, float scale,
                    Partial* out) {
    const int dim = D ? D : any_dim;
    const int padded = (count + LANES - 1) / LANES * LANES;
    float scores[R][STRETCH];
    alignas(4) uint16_t weights[R][STRETCH];
    const uint16_t* const* keys = rows.keys + first;
    const uint16_t* const* values = rows.values + first;
    for (int i = 0; i < padded; i += LANES) {
        for (int j = 0; j < LANES; j++)
            for (int d = 0; d < dim; d += 32) __builtin_prefetch(keys[i + j + STRETCH] + shift + d, 0, 2);
        for (int r = 0; r < R; r++) {
            vf dots[LANES];
            for (int j = 0; j < LANES; j++) {
                dots[j] = vf{};
                for (int d = 0; d < dim; d += 32)
                    dots[j] = dot_pairs(dots[j], load<vu>(q + r * dim + d), load<vu>(keys[i + j] + shift + d));
            }
            store(scores[r] + i, sums(dots) * scale);
        }
    }
    float keep[R];
    for (int r = 0; r < R; r++) {
        for (int i = count; i < padded; i++) scores[r][i] = -INFINITY;
        vf most = load<vf>(scores[r]);
        for (int i = LANES; i < padded; i += LANES) most = maximum(most, load<vf>(scores[r] + i));
        const float top = std::max(out[r].top, maximum(most));
        vf total = {};
        for (int i = 0; i < padded; i += LANES) {
            vf exps = exponential(load<vf>(scores[r] + i) - top);
            total += exps;
            narrow(weights[r] + i, exps);
        }
        keep[r] = std::exp(out[r].top - top);
        out[r].top = top;
        out[r].total = out[r].total * keep[r] + sum(total);
    }
    for (int d = 0; d < dim; d += 32) {
        vf acc[R][2];
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 2; c++) acc[r][c] = load<vf>(out[r].y + d + c * LANES) * keep[r];
        for (int i = 0; i < count; i += 2) {
            vu pairs[2];
            for (int j = 0; j < 2; j++) __builtin_prefetch(values[i + j + STRETCH] + shift + d, 0, 2);
            interleave(load<vh>(values[i] + shift + d), load<vh>(values[i + 1] + shift + d), pairs);
            for (int r = 0; r < R; r++) {
                vu weight = splat(reinterpret_cast<const uint32_t*>(weights[r])[i / 2]);
                for (int c = 0; c < 2; c++) acc[r][c] = dot_pairs(acc[r][c], weight, pairs[c]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 2; c++) store(out[r].y + d + c * LANES, acc[r][c]);
    }
}

template <int D>
constexpr decltype(&attend_stretch<1, D>) STRETCH_KERNELS[] = {
    attend_stretch<1, D>, attend_stretch<2, D>, attend_stretch<3, D>, attend_stretch<4, D>,
    attend_stretch<5, D>, attend_stretch<6, D>, attend_stretch<7, D>, attend_stretch<8, D>};

void attend_group(const Rows& rows, int first, int count, int shift, int dim, const uint16_t* q, int heads, float scale,
                  Partial* out) {
    const auto* kernels = dim == 64 ? STRETCH_KERNELS<64> : dim == 128 ? STRETCH_KERNELS<128> : STRETCH_KERNELS<0>;
    for (int r = 0; r < heads; r += MAX_SHARED)
        kernels[std::min(MAX_SHARED, heads - r) - 1](rows, first, count, shift, dim, q + r * dim, scale, out + r);
}

constexpr int BLOCK_ROWS = 48;  // query rows of a work item

struct Workspace {
    uint16_t q[BLOCK_ROWS * MAX_DIM];
    float scores[ROWS * BLOCK_KEYS];
    alignas(4) uint16_t weights[ROWS * BLOCK_KEYS];
    float y[BLOCK_ROWS * MAX_DIM];
    float top[BLOCK_ROWS], total[BLOCK_ROWS];
};

}  // namespace

extern "C" {

// Writes the newest key and value of n requests into their pages, then attends with one query each over all their tokens.
// q [n, H, D], k and v [n, G, D] with given row strides (elements); lengths count the new token; y [n, H, D].
void dsla_attend_decode(int threads, int n, int heads, int groups, int dim, const uint16_t* q, int64_t q_stride,
                        const uint16_t* k, int64_t k_stride, const uint16_t* v, int64_t v_stride, char* k_pages,
                        char* v_pages, int64_t page_bytes, int page_tokens, const int64_t* const* tables,
                        const int64_t* lengths, uint16_t* y) {
    const Pages pages{k_pages, v_pages, page_bytes, page_tokens, groups, dim};
    const int per_group = heads / groups;
    const float scale = 1.0f / std::sqrt(float(dim));
    std::vector<int> owner, part;
    std::vector<int64_t> first(n + 1);
    for (int i = 0; i < n; i++) {
        std::memcpy(pages.key(tables[i], lengths[i] - 1), k + i * k_stride, groups * dim * 2);
        std::memcpy(pages.value(tables[i], lengths[i] - 1), v + i * v_stride, groups * dim * 2);
        first[i] = int64_t(owner.size());
        for (int s = 0; s * int64_t(SPLIT) < lengths[i]; s++) {
            owner.push_back(i);
            part.push_back(s);
        }
    }
    first[n] = int64_t(owner.size());
    std::vector<Partial> partials(owner.size() * heads);
    const int pieces = int(owner.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces > 2)
    for (int piece = 0; piece < pieces; piece++) {
        const int i = owner[piece];
        const int64_t begin = part[piece] * int64_t(SPLIT);
        const int keys = int(std::min<int64_t>(SPLIT, lengths[i] - begin));
        const Rows rows(pages, tables[i], begin, lengths[i]);
        Partial* out = &partials[piece * heads];
        for (int h = 0; h < heads; h++) out[h].clear(dim);
        for (int first = 0; first < keys; first += STRETCH)
            for (int g = 0; g < groups; g++)
                attend_group(rows, first, std::min(STRETCH, keys - first), g * dim, dim,
                             q + i * q_stride + g * per_group * dim, per_group, scale, out + g * per_group);
    }
    for (int i = 0; i < n; i++) {
        for (int h = 0; h < heads; h++) {
            float top = -INFINITY, total = 0, sum[MAX_DIM] = {};
            for (int64_t s = first[i]; s < first[i + 1]; s++) top = std::max(top, partials[s * heads + h].top);
            for (int64_t s = first[i]; s < first[i + 1]; s++) {
                const Partial& partial = partials[s * heads + h];
                const float weight = std::exp(partial.top - top);
                total += partial.total * weight;
                for (int d = 0; d < dim; d++) sum[d] += partial.y[d] * weight;
            }
            for (int d = 0; d < dim; d++) y[(i * heads + h) * dim + d] = narrow(sum[d] / total);
        }
    }
}

// Writes the keys and values of T new tokens of one request into its pages, then attends causally over all its tokens.
// q [T, H, D], k and v [T, G, D] with given row strides (elements); prior tokens lie in the pages; y [T, H, D].
void dsla_attend_prefill(int threads, int tokens, int heads, int groups, int dim, const uint16_t* q, int64_t q_stride,
                         const uint16_t* k, int64_t k_stride, const uint16_t* v, int64_t v_stride, char* k_pages,
                         char* v_pages, int64_t page_bytes, int page_tokens, const int64_t* table, int64_t prior,
                         uint16_t* y) {
    const Pages pages{k_pages, v_pages, page_bytes, page_tokens, groups, dim};
    const int per_group = heads / groups, pairs = dim / 2;
    const int64_t length = prior + tokens, padded = (length + 63) / 64 * 64;
    const float scale = 1.0f / std::sqrt(float(dim));
    for (int t = 0; t < tokens; t++) {
        std::memcpy(pages.key(table, prior + t), k + t * k_stride, groups * dim * 2);
        std::memcpy(pages.value(table, prior + t), v + t * v_stride, groups * dim * 2);
    }
    // Both packed forms of a group take padded * D / 2 words.
    std::vector<uint32_t> packed_k(groups * padded * pairs), packed_v(groups * padded * pairs);
    const int64_t blocks = padded / LANES, rows = int64_t(tokens) * per_group;
    const int64_t row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            for (int i = 0; i < LANES; i++) {
                const int64_t token = block * LANES + i;
                if (token >= length) break;
                const uint16_t *key = pages.key(table, token), *value = pages.value(table, token);
                for (int g = 0; g < groups; g++)
                    pack_token(key + g * dim, value + g * dim, dim, token, packed_k.data() + g * padded * pairs,
                               packed_v.data() + g * padded * pairs);
            }
        }
        Workspace* w = new Workspace;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < groups * row_blocks; item++) {
            const int g = int(item % groups);
            // The last rows see the most keys: first, so that no thread ends with a long one.
            const int64_t row = (row_blocks - 1 - item / groups) * BLOCK_ROWS;
            const int count = int(std::min<int64_t>(BLOCK_ROWS, rows - row));
            const int tiles = (count + ROWS - 1) / ROWS;
            for (int i = 0; i < tiles * ROWS; i++) {
                const int64_t from = row + std::min(i, count - 1);
                std::memcpy(w->q + i * dim, q + from / per_group * q_stride + (g * per_group + from % per_group) * dim,
                            dim * 2);
                w->top[i] = -INFINITY;
                w->total[i] = 0;
            }
            std::fill_n(w->y, tiles * ROWS * dim, 0.0f);
            const int64_t seen = prior + (row + count - 1) / per_group + 1;
            for (int64_t key = 0; key < seen; key += BLOCK_KEYS) {
                const int width = int((std::min<int64_t>(BLOCK_KEYS, seen - key) + 63) / 64 * 64);
                for (int tile = 0; tile < tiles; tile++) {
                    const int first = tile * ROWS;
                    for (int c = 0; c < width; c += 64)
                        score_tile(w->q + first * dim, dim, packed_k.data() + (g * padded + key + c) * pairs, dim, scale,
                                   w->scores + c);
                    float keep[ROWS];
                    for (int i = 0; i < ROWS; i++) {
                        float* scores = w->scores + i * BLOCK_KEYS;
                        const int64_t sees = prior + (row + std::min(first + i, count - 1)) / per_group + 1 - key;
                        for (int64_t c = std::max<int64_t>(sees, 0); c < width; c++) scores[c] = -INFINITY;
                        vf most = load<vf>(scores);
                        for (int c = LANES; c < width; c += LANES) most = maximum(most, load<vf>(scores + c));
                        const float top = std::max(w->top[first + i], maximum(most));
                        // Rows that see nothing of this block, whose first key they all see in the first block, keep theirs.
                        vf total = {};
                        for (int c = 0; c < width; c += LANES) {
                            vf exps = exponential(load<vf>(scores + c) - top);
                            total += exps;
                            narrow(w->weights + i * BLOCK_KEYS + c, exps);
                        }
                        keep[i] = std::exp(w->top[first + i] - top);
                        w->top[first + i] = top;
                        w->total[first + i] = w->total[first + i] * keep[i] + sum(total);
                    }
                    const uint32_t* values = packed_v.data() + (g * padded + key) * pairs;
                    add_values(w->weights, values, dim, width, keep, w->y + first * dim);
                }
            }
            for (int i = 0; i < count; i++) {
                const int64_t to = row + i;
                uint16_t* out = y + (to / per_group * heads + g * per_group + to % per_group) * dim;
                const float scale_out = 1.0f / w->total[i];
                for (int d = 0; d < dim; d += LANES) narrow(out + d, load<vf>(w->y + i * dim + d) * scale_out);
            }
        }
        delete w;
    }
}

}  // extern "C"
