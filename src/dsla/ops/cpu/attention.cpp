// Softmax attention over keys and values that lie in pages, bfloat16 in, fp32 sums.
//
// A page holds `page_tokens` tokens [page_tokens, G, D] of one layer of one request; `tables[i]` lists the pages of request i.
// The H = G * R query heads of a group of R share one KV head.

#include <algorithm>
#include <cmath>
#include <memory>
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
constexpr int SPLIT = 512;  // keys one work item of a decode step reads, at most

// Keys that one reads of a request: as many whatever else is in the batch.
inline int split_of(int64_t length) { return int(std::clamp<int64_t>((length / 4 + LANES - 1) / LANES * LANES, 64, SPLIT)); }

// What attention over some keys leaves: largest score, sums of weights by lane, weighted sum of values.
struct Partial {
    float top;
    vf totals;
    float y[MAX_DIM];

    void clear(int dim) {
        top = -INFINITY;
        totals = vf{};
        std::fill_n(y, dim, 0.0f);
    }

    void rescale(float highest, int dim) {
        const float keep = std::exp(top - highest);
        top = highest;
        totals *= keep;
        for (int d = 0; d < dim; d += LANES) store(y + d, load<vf>(y + d) * keep);
    }
};

const int32_t LANE_NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr int MAX_SHARED = WIDE_REGISTERS ? 8 : 4;  // query heads of a group that are computed at once

// Where the keys and values of the first KV head of consecutive tokens lie; the last row is repeated beyond the end.
struct Rows {
    const uint16_t *keys[SPLIT + LANES], *values[SPLIT + LANES];

    Rows(const Pages& p, const int64_t* table, int64_t begin, int64_t end) {
        const int count = int(std::min<int64_t>(end - begin, SPLIT + LANES));
        for (int i = 0; i < count;) {
            const int same_page = std::min(count - i, int(p.page_tokens - (begin + i) % p.page_tokens));
            const uint16_t *key = p.key(table, begin + i), *value = p.value(table, begin + i);
            for (int j = 0; j < same_page; j++, i++) {
                keys[i] = key + j * p.groups * p.dim;
                values[i] = value + j * p.groups * p.dim;
            }
        }
        std::fill(keys + count, keys + SPLIT + LANES, keys[count - 1]);
        std::fill(values + count, values + SPLIT + LANES, values[count - 1]);
    }
};

// Fetches a share of the rows to come, a few lines at each of `SLOTS` places of a loop: more at once would fill the buffers that
// loads wait in, and fewer would leave memory idle.
template <int SLOTS>
inline void fetch(const uint16_t* from, int slot, int dim) {
    const int lines = dim * LANES / 32, each = (lines + SLOTS - 1) / SLOTS;
    for (int line = slot * each; line < std::min(lines, (slot + 1) * each); line++) __builtin_prefetch(from + line * 32, 0, 3);
}

// Weights of `count` <= LANES rows for R query heads of the KV head that lies `shift` elements into each row.
// D is the head dim, or 0 where it is only known as `any_dim`.
template <int R, int D>
void weigh_rows(const uint16_t* const* keys, int count, int shift, int any_dim, const Element* q, float scale,
                const uint16_t* ahead, Element* weights, Partial* out) {
    const int dim = D ? D : any_dim;
    vf dots[R][LANES];
    for (int j = 0; j < LANES; j++) {
        vf acc[R] = {};
        fetch<LANES>(ahead, j, dim);
        UNROLL
        for (int d = 0; d < dim; d += 32) {
            const Multiplied key = multiplied(keys[j] + shift + d);
            UNROLL
            for (int r = 0; r < R; r++) acc[r] = dot(acc[r], q + r * dim + d, key);
        }
        UNROLL
        for (int r = 0; r < R; r++) dots[r][j] = acc[r];
    }
    for (int r = 0; r < R; r++) {
        vf scores = sums(dots[r]) * scale;
        if (count < LANES) scores = select(load<vi>(LANE_NUMBERS) < count, scores, splat(-INFINITY));
        const float highest = maximum(scores);
        if (highest > out[r].top) out[r].rescale(highest, dim);
        const vf exps = exponential(scores - out[r].top);
        out[r].totals += exps;
        put_elements(weights + r * LANES, exps);
    }
}

// Adds LANES rows of values by their weights.
template <int R, int D>
void add_rows(const uint16_t* const* values, int shift, int any_dim, const uint16_t* ahead, const Element* weights,
              Partial* out) {
    const int dim = D ? D : any_dim;
    constexpr int width = GATHERED * LANES;
    for (int d = 0; d < dim; d += width) {
        vf acc[R][GATHERED];
        UNROLL
        for (int r = 0; r < R; r++)
            UNROLL
            for (int c = 0; c < GATHERED; c++) acc[r][c] = load<vf>(out[r].y + d + c * LANES);
        UNROLL
        for (int i = 0; i < LANES / PAIRED; i++) {
            Cells cells[GATHERED];
            fetch<LANES / PAIRED>(ahead + d * LANES, i, width);
            gather(values + i * PAIRED, shift + d, cells);
            UNROLL
            for (int r = 0; r < R; r++) {
                const Cells weight = splat_cell(weights + r * LANES, i);
                UNROLL
                for (int c = 0; c < GATHERED; c++) acc[r][c] = add_product(acc[r][c], weight, cells[c]);
            }
        }
        UNROLL
        for (int r = 0; r < R; r++)
            UNROLL
            for (int c = 0; c < GATHERED; c++) store(out[r].y + d + c * LANES, acc[r][c]);
    }
}

template <int D>
constexpr decltype(&weigh_rows<1, D>) WEIGH[] = {
    weigh_rows<1, D>, weigh_rows<2, D>, weigh_rows<3, D>, weigh_rows<4, D>,
    weigh_rows<5, D>, weigh_rows<6, D>, weigh_rows<7, D>, weigh_rows<8, D>};
template <int D>
constexpr decltype(&add_rows<1, D>) ADD[] = {
    add_rows<1, D>, add_rows<2, D>, add_rows<3, D>, add_rows<4, D>,
    add_rows<5, D>, add_rows<6, D>, add_rows<7, D>, add_rows<8, D>};

// Attention of all query heads over `count` <= LANES rows from `first` on, added to `out` [H]; weights [H, LANES] is scratch.
void attend_rows(const Rows& rows, int first, int count, int groups, int per_group, int dim, const Element* q, float scale,
                 Element* weights, Partial* out) {
    const auto* weigh = dim == 64 ? WEIGH<64> : dim == 128 ? WEIGH<128> : WEIGH<0>;
    const auto* add = dim == 64 ? ADD<64> : dim == 128 ? ADD<128> : ADD<0>;
    const uint16_t *const *keys = rows.keys + first, *const *values = rows.values + first;
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < per_group; r += MAX_SHARED) {
            const int h = g * per_group + r;
            weigh[std::min(MAX_SHARED, per_group - r) - 1](keys, count, g * dim, dim, q + h * dim, scale,
                                                           keys[LANES] + g * dim * LANES, weights + h * LANES, out + h);
        }
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < per_group; r += MAX_SHARED) {
            const int h = g * per_group + r;
            add[std::min(MAX_SHARED, per_group - r) - 1](values, g * dim, dim, values[LANES] + g * dim * LANES,
                                                         weights + h * LANES, out + h);
        }
}

constexpr int BLOCK_ROWS = padded_rows(96);  // query rows of a work item
static_assert(BLOCK_ROWS == padded_rows(BLOCK_ROWS));

struct Workspace {
    alignas(64) Element q[BLOCK_ROWS * MAX_DIM];
    alignas(64) float y[BLOCK_ROWS * MAX_DIM];
    float top[BLOCK_ROWS], total[BLOCK_ROWS];
    SoftmaxRows softmax;
};

}  // namespace

extern "C" {

// Writes the newest key and value of n requests into their pages, then attends with one query each over all their tokens.
// q [n, H, D], k and v [n, G, D] with given row strides (elements); `prior` tokens each lie in the pages; y [n, H, D].
void dsla_attend_decode(int threads, int n, int heads, int groups, int dim, const uint16_t* q, int64_t q_stride,
                        const uint16_t* k, int64_t k_stride, const uint16_t* v, int64_t v_stride, char* k_pages,
                        char* v_pages, int64_t page_bytes, int page_tokens, const int64_t* const* tables,
                        const int64_t* prior, uint16_t* y) {
    const Pages pages{k_pages, v_pages, page_bytes, page_tokens, groups, dim};
    const int per_group = heads / groups;
    const float scale = 1.0f / std::sqrt(float(dim));
    std::vector<int> owner, part;
    std::vector<int64_t> first(n + 1), lengths(prior, prior + n);
    for (int i = 0; i < n; i++) {
        std::memcpy(pages.key(tables[i], prior[i]), k + i * k_stride, groups * dim * 2);
        std::memcpy(pages.value(tables[i], prior[i]), v + i * v_stride, groups * dim * 2);
        lengths[i]++;
        first[i] = int64_t(owner.size());
        for (int s = 0; s * int64_t(split_of(lengths[i])) < lengths[i]; s++) {
            owner.push_back(i);
            part.push_back(s);
        }
    }
    first[n] = int64_t(owner.size());
    std::vector<Partial> partials(owner.size() * heads);
    const int pieces = int(owner.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces > 1)
    for (int piece = 0; piece < pieces; piece++) {
        const int i = owner[piece];
        const int split = split_of(lengths[i]);
        const int64_t begin = part[piece] * int64_t(split);
        const int keys = int(std::min<int64_t>(split, lengths[i] - begin));
        const Rows rows(pages, tables[i], begin, lengths[i]);
        Partial* out = &partials[piece * heads];
        for (int h = 0; h < heads; h++) out[h].clear(dim);
        std::vector<Element> queries(heads * dim), weights(heads * LANES);
        for (int h = 0; h < heads; h++) put_row(&queries[h * dim], q + i * q_stride + h * dim, dim);
        for (int first = 0; first < keys; first += LANES)
            attend_rows(rows, first, std::min(LANES, keys - first), groups, per_group, dim, queries.data(), scale,
                        weights.data(), out);
    }
    for (int i = 0; i < n; i++) {
        for (int h = 0; h < heads; h++) {
            float top = -INFINITY, total = 0, mixed[MAX_DIM] = {};
            for (int64_t s = first[i]; s < first[i + 1]; s++) top = std::max(top, partials[s * heads + h].top);
            for (int64_t s = first[i]; s < first[i + 1]; s++) {
                const Partial& partial = partials[s * heads + h];
                const float weight = std::exp(partial.top - top);
                total += sum(partial.totals) * weight;
                for (int d = 0; d < dim; d++) mixed[d] += partial.y[d] * weight;
            }
            for (int d = 0; d < dim; d++) y[(i * heads + h) * dim + d] = narrow(mixed[d] / total);
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
    const int per_group = heads / groups, cells = dim / PAIRED;
    const int64_t length = prior + tokens, padded = (length + 63) / 64 * 64;
    const float scale = 1.0f / std::sqrt(float(dim));
    for (int t = 0; t < tokens; t++) {
        std::memcpy(pages.key(table, prior + t), k + t * k_stride, groups * dim * 2);
        std::memcpy(pages.value(table, prior + t), v + t * v_stride, groups * dim * 2);
    }
    // Both packed forms of a group take as many cells.
    Array<Cell> packed_k(groups * padded * cells), packed_v(packed_k.size());
    const int64_t blocks = padded / LANES, rows = int64_t(tokens) * per_group;
    const int64_t row_blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            const uint16_t *keys[LANES], *values[LANES];
            for (int i = 0; i < LANES; i++) {
                const int64_t token = std::min(block * LANES + i, length - 1);
                keys[i] = pages.key(table, token), values[i] = pages.value(table, token);
            }
            for (int g = 0; g < groups; g++) {
                const int64_t at = g * padded * cells;
                pack_tokens(keys, values, dim, block * LANES, packed_k.data() + at, packed_v.data() + at);
                for (int i = 0; i < LANES; i++) keys[i] += dim, values[i] += dim;
            }
        }
        const TileRegisters registers;
        const auto w = std::make_unique<Workspace>();
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < groups * row_blocks; item++) {
            const int g = int(item % groups);
            // The last rows see the most keys: first, so that no thread ends with a long one.
            const int64_t row = (row_blocks - 1 - item / groups) * BLOCK_ROWS;
            const int count = int(std::min<int64_t>(BLOCK_ROWS, rows - row));
            for (int i = 0; i < BLOCK_ROWS; i++) {
                const int64_t from = row + std::min(i, count - 1);
                put_row(w->q + i * dim, q + from / per_group * q_stride + (g * per_group + from % per_group) * dim, dim);
                w->top[i] = -INFINITY;
                w->total[i] = 0;
            }
            std::fill_n(w->y, BLOCK_ROWS * dim, 0.0f);
            const Cell* const packed[] = {packed_k.data() + g * padded * cells, packed_v.data() + g * padded * cells};
            int64_t sees[BLOCK_ROWS];
            for (int i = 0; i < BLOCK_ROWS; i++) sees[i] = prior + (row + std::min(i, count - 1)) / per_group + 1;
            by_fastest([&](auto by) {
                typedef decltype(by) By;
                for (int64_t key = 0; key < sees[count - 1]; key += BLOCK_KEYS) {
                    const int width = int((std::min<int64_t>(BLOCK_KEYS, sees[count - 1] - key) + 63) / 64 * 64);
                    // All rows see the first key, so that those that see nothing of a block keep what they have.
                    const Cell *keys = packed[0] + key * cells, *values = packed[1] + key * cells;
                    for (int first = 0; first < count; first += By::ROWS) {
                        const auto hide = [&](int i, float* scores) {
                            for (int64_t c = std::max<int64_t>(sees[first + i] - key, 0); c < width; c++) scores[c] = -INFINITY;
                        };
                        w->softmax.add<By>(w->q + first * dim, count - first, keys, values, dim, width, scale, w->y + first * dim,
                                           w->top + first, w->total + first, hide);
                    }
                }
            });
            for (int i = 0; i < count; i++) {
                const int64_t to = row + i;
                uint16_t* out = y + (to / per_group * heads + g * per_group + to % per_group) * dim;
                const float scale_out = 1.0f / w->total[i];
                for (int d = 0; d < dim; d += LANES) narrow(out + d, load<vf>(w->y + i * dim + d) * scale_out);
            }
        }
    }
}

}  // extern "C"
