// T new tokens of one request through a converted layer, by chunks: window and sinks, both states, and their mixing.
//
// Within a chunk the weight of token j for query t in head h is (q_t k_j) sum_s factor_s exp(cum_s[t] - cum_s[j]), both states in
// one product; what came before the chunk is read from the states as they were at its start.

#include <memory>
#include <vector>

#include "mixer.h"
#include "product.h"
#include "tiles.h"

using namespace dsla;

namespace {

#if defined(DSLA_AMX)
constexpr int CHUNK = 32;
#else
constexpr int CHUNK = 48;
#endif
constexpr int CHUNK_VECTORS = CHUNK / LANES;
constexpr int NEAR_ROWS = padded_rows(CHUNK);

struct Prompt {
    const Layer& p;
    int64_t tokens, chunks;
    int width, columns;
    int64_t state_size;
    std::vector<uint16_t> near_k, near_v;  // [W + T, G, D], from the oldest token of the window on
    std::vector<float> keys;               // [chunks, G, F, CHUNK], features of the tokens that leave the window
    std::vector<float> values;             // [chunks * CHUNK, G, D]
    std::vector<float> cum;                // [chunks, S, G, CHUNK], log gates summed from the chunk's start
    std::unique_ptr<float[]> starts;       // [chunks, S, G, F, D + 1], states at the chunk's start
    std::vector<RightFactor> k_maps;       // of each KV head

    Prompt(const Layer& p, int64_t tokens)
        : p(p), tokens(tokens), chunks((tokens + CHUNK - 1) / CHUNK), width(2 * p.dim), columns(p.dim + 1),
          state_size(int64_t(width) * columns), near_k((p.window + tokens) * p.groups * p.dim), near_v(near_k.size()),
          keys(chunks * p.groups * width * CHUNK), values(chunks * CHUNK * p.groups * p.dim),
          cum(chunks * p.states * p.groups * CHUNK), starts(new float[chunks * p.states * p.groups * state_size]),
          k_maps(p.groups, RightFactor(p.dim, p.dim, 3)) {}

    float* chunk_keys(int64_t c, int g) { return keys.data() + (c * p.groups + g) * width * CHUNK; }
    const float* chunk_keys(int64_t c, int g) const { return keys.data() + (c * p.groups + g) * width * CHUNK; }
    const float* chunk_values(int64_t c, int g) const { return values.data() + (c * CHUNK * p.groups + g) * p.dim; }
    float* chunk_cum(int64_t c, int s, int g) { return cum.data() + ((c * p.states + s) * p.groups + g) * CHUNK; }
    const float* chunk_cum(int64_t c, int s, int g) const { return cum.data() + ((c * p.states + s) * p.groups + g) * CHUNK; }
    float* start(int64_t c, int s, int g) { return starts.get() + ((c * p.states + s) * p.groups + g) * state_size; }
    const float* start(int64_t c, int s, int g) const { return starts.get() + ((c * p.states + s) * p.groups + g) * state_size; }

    // Features, values and log gates of one chunk's tokens that leave the window; sinks and places before the text enter nothing.
    void enter(int64_t c, int64_t prior) {
        alignas(64) float rows[CHUNK * MAX_DIM] = {}, feature[CHUNK * 2 * MAX_DIM];
        const int64_t first = c * CHUNK, end = std::min<int64_t>(CHUNK, tokens - first);
        const int64_t begin = std::clamp<int64_t>(p.window + p.sinks - prior - first, 0, end);
        for (int g = 0; g < p.groups; g++) {
            const auto at = [&](int64_t j) { return ((first + j) * p.groups + g) * p.dim; };
            for (int64_t j = begin; j < end; j++)
                for (int d = 0; d < p.dim; d += LANES) {
                    store(rows + j * p.dim + d, widen(near_k.data() + at(j) + d));
                    store(values.data() + at(j) + d, widen(near_v.data() + at(j) + d));
                }
            k_maps[g].multiply(rows, p.dim, CHUNK, feature, width);
            float total[MAX_STATES] = {}, *to = chunk_keys(c, g);
            for (int64_t j = 0; j < CHUNK; j++) {
                const bool enters = j >= begin && j < end;
                if (enters) {
                    soften(feature + j * width, p.dim);
                    for (int f = 0; f < width; f++) to[f * CHUNK + j] = feature[j * width + f];
                }
                for (int s = 0; s < p.states; s++) {
                    if (enters) total[s] += log_gate(p, s, g, near_k.data() + at(j));
                    chunk_cum(c, s, g)[j] = total[s];
                }
            }
        }
    }

    // One state of one KV head at the start of every chunk; leaves the last at `kept`, `position` tokens from the first.
    template <typename T>
    void scan(int s, int g, T* kept, int64_t position) {
        std::vector<float> scaled(width * CHUNK), whole(state_size);
        float* state = whole.data();
        for (int64_t i = 0; i < state_size; i++) state[i] = get_one(kept + i);
        for (int64_t c = 0; c < chunks; c++) {
            std::memcpy(start(c, s, g), state, state_size * 4);
            const float *k = chunk_keys(c, g), *sums = chunk_cum(c, s, g);
            const float last = sums[CHUNK - 1], keep = std::exp(last);
            vf decay[CHUNK_VECTORS];
            for (int v = 0; v < CHUNK_VECTORS; v++) decay[v] = exponential(last - load<vf>(sums + v * LANES));
            for (int f = 0; f < width; f++) {
                vf total = {};
                for (int v = 0; v < CHUNK_VECTORS; v++) {
                    const vf x = load<vf>(k + f * CHUNK + v * LANES) * decay[v];
                    store(scaled.data() + f * CHUNK + v * LANES, x);
                    total += x;
                }
                float& norm = state[f * columns + p.dim];
                norm = norm * keep + sum(total);
            }
            const float* v = chunk_values(c, g);
            for (int f = 0; f < width; f += TILE)
                for (int d = 0; d < p.dim; d += 2 * LANES) {
                    vf acc[TILE][2];
                    for (int i = 0; i < TILE; i++)
                        for (int e = 0; e < 2; e++) acc[i][e] = load<vf>(state + (f + i) * columns + d + e * LANES) * keep;
                    product<2>(scaled.data() + f * CHUNK, CHUNK, v + d, p.groups * p.dim, CHUNK, acc);
                    for (int i = 0; i < TILE; i++)
                        for (int e = 0; e < 2; e++) store(state + (f + i) * columns + d + e * LANES, acc[i][e]);
                }
        }
        const int64_t element = (int64_t(s) * p.groups + g) * state_size;
        for (int64_t i = 0; i < state_size; i++) put_one(kept + i, state[i], dither(position, element + i));
    }
};

// What one thread works with on one chunk and KV head.
struct Workspace {
    const Prompt& prompt;
    const Layer& p;
    const int width, dim, mixed;  // features of a key, head dim, weights of a query: one for each token and feature of each state
    RightFactor keys, memory;     // of the chunk [F, CHUNK]; values of the chunk, then the states at its start [mixed, D]
    float decays[MAX_STATES][CHUNK * CHUNK], norms[MAX_STATES][2 * MAX_DIM], kept[MAX_STATES][CHUNK];
    float shares[MAX_STATES][CHUNK], factors[MAX_STATES][CHUNK];
    Array<float> weights;         // [CHUNK, mixed]
    alignas(64) float query[CHUNK * MAX_DIM], features[CHUNK * 2 * MAX_DIM], far_y[CHUNK * MAX_DIM];
    float far[CHUNK];
    Array<Cell> packed_k, packed_v;
    uint16_t q[CHUNK * MAX_DIM];
    alignas(64) Element rows[NEAR_ROWS * MAX_DIM];
    alignas(64) float near_y[NEAR_ROWS * MAX_DIM];
    float top[NEAR_ROWS], total[NEAR_ROWS];
    SoftmaxRows softmax;

    Workspace(const Prompt& prompt, int padded)
        : prompt(prompt), p(prompt.p), width(prompt.width), dim(p.dim), mixed(CHUNK + p.states * width), keys(width, CHUNK, 1),
          memory(mixed, dim, 1), weights(CHUNK * mixed), packed_k(padded * dim / PAIRED), packed_v(packed_k.size()) {}

    // decays[s][t, j] = exp(cum_s[t] - cum_s[j]) for j <= t, else 0; kept[s][t] = exp(cum_s[t]); the right factors.
    void prepare(int64_t c, int g) {
        for (int s = 0; s < p.states; s++) {
            const float* cum = prompt.chunk_cum(c, s, g);
            for (int t = 0; t < CHUNK; t++) {
                for (int v = 0; v < CHUNK_VECTORS; v++)
                    store(decays[s] + t * CHUNK + v * LANES, exponential(cum[t] - maximum(load<vf>(cum + v * LANES), splat(cum[t]))));
                for (int j = t + 1; j < CHUNK; j++) decays[s][t * CHUNK + j] = 0.0f;
            }
            const float* state = prompt.start(c, s, g);
            for (int v = 0; v < CHUNK; v += LANES) store(kept[s] + v, exponential(load<vf>(cum + v)));
            memory.set(CHUNK + s * width, width, state, prompt.columns);
            for (int f = 0; f < width; f++) norms[s][f] = state[f * prompt.columns + dim];
        }
        memory.set(0, CHUNK, prompt.chunk_values(c, g), p.groups * dim);
        keys.set(0, width, prompt.chunk_keys(c, g), CHUNK);
    }

    // Reads of the states, weighted: far_y [CHUNK, D] and the sums of weights far [CHUNK]; q rows [CHUNK, D] of head h.
    void read_states(int h, const RightFactor& map) {
        for (int t = 0; t < CHUNK; t++) {
            for (int d = 0; d < dim; d += LANES) store(query + t * dim + d, widen(q + t * dim + d));
            float factor[MAX_STATES];
            dsla::factors(p, h, q + t * dim, factor);
            for (int s = 0; s < p.states; s++) {
                factors[s][t] = factor[s];
                shares[s][t] = factor[s] * kept[s][t];
            }
        }
        map.multiply(query, dim, CHUNK, features, width);
        for (int t = 0; t < CHUNK; t++) soften(features + t * width, dim);
        keys.multiply(features, width, CHUNK, weights.data(), mixed);
        for (int t = 0; t < CHUNK; t++) {
            float* row = weights.data() + t * mixed;
            vf total = {};
            for (int v = 0; v < CHUNK; v += LANES) {
                vf decay = {};
                for (int s = 0; s < p.states; s++) decay += factors[s][t] * load<vf>(decays[s] + t * CHUNK + v);
                const vf weight = load<vf>(row + v) * decay;
                total += weight;
                store(row + v, weight);
            }
            for (int s = 0; s < p.states; s++)
                for (int f = 0; f < width; f += LANES) {
                    const vf weight = load<vf>(features + t * width + f) * shares[s][t];
                    total += weight * load<vf>(norms[s] + f);
                    store(row + CHUNK + s * width + f, weight);
                }
            far[t] = sum(total);
        }
        memory.multiply(weights.data(), mixed, CHUNK, far_y, dim);
    }

    // Softmax attention over window and sinks: near_y [CHUNK, D] over weights total * e^top. Keys lie packed, near ones first.
    void read_near(int64_t position, int count, int near, int padded) {
        const int cells = dim / PAIRED;
        const float scale = 1.0f / std::sqrt(float(dim));
        for (int t = 0; t < CHUNK; t++) put_row(rows + t * dim, q + t * dim, dim);
        std::fill_n(near_y, NEAR_ROWS * dim, 0.0f);
        for (int t = 0; t < NEAR_ROWS; t++) top[t] = -1e30f, total[t] = 0.0f;
        by_fastest([&](auto by) {
            typedef decltype(by) By;
            for (int key = 0; key < padded; key += BLOCK_KEYS) {
                const int columns = std::min(BLOCK_KEYS, padded - key);
                const Cell *keys = packed_k.data() + int64_t(key) * cells, *values = packed_v.data() + int64_t(key) * cells;
                const auto from = [&](int64_t begin, int64_t end, float* scores) {
                    for (int64_t c = std::max<int64_t>(begin - key, 0); c < std::min<int64_t>(end - key, columns); c++)
                        scores[c] = -INFINITY;
                };
                for (int first = 0; first < CHUNK; first += By::ROWS) {
                    // Row t sees near keys [t, t + W) that exist, and the sinks that have left its window.
                    const auto hide = [&](int i, float* scores) {
                        const int t = std::min(first + i, count - 1);
                        from(0, std::min<int64_t>(near, std::max<int64_t>(t, p.window - 1 - position)), scores);
                        from(t + p.window, near, scores);
                        from(near + std::clamp<int64_t>(position + t - p.window + 1, 0, p.sinks), padded, scores);
                    };
                    softmax.add<By>(rows + first * dim, CHUNK - first, keys, values, dim, columns, scale, near_y + first * dim,
                                    top + first, total + first, hide);
                }
            }
        });
    }
};

}  // namespace

extern "C" {

// q [T, H, D], k and v [T, G, D] with given row strides (elements), y [T, H, D]; the request's memory (five parts, in place)
// holds `prior` tokens; states are bfloat16 if `narrow_states`, else float.
void dsla_prefill(int threads, int64_t tokens, int heads, int groups, int dim, int states, int window, int sinks,
                  float temperature, float floor, const float* q_map, const float* k_map, const float* gate,
                  const float* gate_bias, const float* mix, const float* mix_bias, const uint16_t* q, int64_t q_stride,
                  const uint16_t* k, int64_t k_stride, const uint16_t* v, int64_t v_stride, char* const* parts,
                  int64_t prior, int narrow_states, uint16_t* y) {
    const Layer p{heads, groups, dim, states, window, sinks, temperature, floor, q_map, k_map, gate, gate_bias, mix, mix_bias};
    const Slot slot{parts[0], reinterpret_cast<uint16_t*>(parts[1]),
                    reinterpret_cast<uint16_t*>(parts[2]), reinterpret_cast<uint16_t*>(parts[3]),
                    reinterpret_cast<uint16_t*>(parts[4])};
    const int row = groups * dim, shared = heads / groups;
    Prompt prompt(p, tokens);
    for (int64_t i = std::max<int64_t>(0, window - prior); i < window; i++) {
        const int64_t at = (prior - window + i) % window;
        std::memcpy(prompt.near_k.data() + i * row, slot.window_k + at * row, row * 2);
        std::memcpy(prompt.near_v.data() + i * row, slot.window_v + at * row, row * 2);
    }
    for (int64_t t = 0; t < tokens; t++) {
        std::memcpy(prompt.near_k.data() + (window + t) * row, k + t * k_stride, row * 2);
        std::memcpy(prompt.near_v.data() + (window + t) * row, v + t * v_stride, row * 2);
        if (prior + t < sinks) {
            std::memcpy(slot.sinks_k + (prior + t) * row, k + t * k_stride, row * 2);
            std::memcpy(slot.sinks_v + (prior + t) * row, v + t * v_stride, row * 2);
        }
        if (window && t >= tokens - window) {
            std::memcpy(slot.window_k + (prior + t) % window * row, k + t * k_stride, row * 2);
            std::memcpy(slot.window_v + (prior + t) % window * row, v + t * v_stride, row * 2);
        }
    }
    const int near = window ? window + CHUNK - 1 : 0, padded = (near + sinks + 63) / 64 * 64;
    std::vector<RightFactor> q_maps(heads, RightFactor(dim, dim, 2));
#pragma omp parallel num_threads(threads)
    {
        const TileRegisters registers;
#pragma omp for schedule(static) nowait
        for (int h = 0; h < heads; h++) q_maps[h].set(0, dim, q_map + int64_t(h) * dim * dim, dim);
#pragma omp for schedule(static)
        for (int g = 0; g < groups; g++) prompt.k_maps[g].set(0, dim, k_map + int64_t(g) * dim * dim, dim);
#pragma omp for schedule(dynamic, 1)
        for (int64_t c = 0; c < prompt.chunks; c++) prompt.enter(c, prior);
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < states * groups; item++) {
            const int s = item / groups, g = item % groups;
            const int64_t first = item * prompt.state_size;
            if (narrow_states)
                prompt.scan(s, g, reinterpret_cast<uint16_t*>(slot.states) + first, prior + tokens);
            else
                prompt.scan(s, g, reinterpret_cast<float*>(slot.states) + first, prior + tokens);
        }
        const auto w = std::make_unique<Workspace>(prompt, padded);
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < prompt.chunks * groups; item++) {
            const int64_t c = item / groups, first = c * CHUNK;
            const int g = int(item % groups), count = int(std::min<int64_t>(CHUNK, tokens - first));
            w->prepare(c, g);
            // Near key i of the chunk is token first + i - (W - 1); the sinks lie behind. What is beyond either is not seen.
            const int there = int(std::min<int64_t>(near, window + tokens - first - 1));
            for (int from = 0; from < near + sinks; from += LANES) {
                const uint16_t *keys[LANES], *values[LANES];
                for (int i = 0; i < LANES; i++) {
                    const int sink = std::min(from + i, near + sinks - 1) - near;
                    const int64_t at = (first + std::min(from + i, there - 1) + 1) * row + g * dim;
                    keys[i] = sink < 0 ? prompt.near_k.data() + at : slot.sinks_k + sink * row + g * dim;
                    values[i] = sink < 0 ? prompt.near_v.data() + at : slot.sinks_v + sink * row + g * dim;
                }
                pack_tokens(keys, values, dim, from, w->packed_k.data(), w->packed_v.data());
            }
            for (int r = 0; r < shared; r++) {
                const int h = g * shared + r;
                for (int t = 0; t < CHUNK; t++)
                    std::memcpy(w->q + t * dim, q + (first + std::min(t, count - 1)) * q_stride + h * dim, dim * 2);
                w->read_states(h, q_maps[h]);
                w->read_near(prior + first, count, near, padded);
                for (int t = 0; t < count; t++) {
                    const int seen = int(std::min<int64_t>(prior + first + t + 1, window) +
                                         std::clamp<int64_t>(prior + first + t - window + 1, 0, sinks));
                    float near_share, far_share;
                    shares(seen, w->top[t], w->total[t], w->far[t], &near_share, &far_share);
                    const float each = seen ? near_share / w->total[t] : 0.0f;
                    uint16_t* to = y + ((first + t) * heads + h) * dim;
                    for (int d = 0; d < dim; d += LANES)
                        narrow(to + d, load<vf>(w->near_y + t * dim + d) * each + load<vf>(w->far_y + t * dim + d) * far_share);
                }
            }
        }
    }
}

}  // extern "C"
