// A KV cache of one layer of one request, folded into what a converted layer remembers.
//
// Every state is a sum over the tokens that have left the window, each weighted by the gates of those after it. Blocks of
// tokens are summed on their own and then one after the other, in the same order whatever the number of threads.

#include <cstring>
#include <vector>

#include "mixer.h"
#include "product.h"

using namespace dsla;

namespace {

constexpr int CHUNK = 32;
constexpr int CHUNK_VECTORS = CHUNK / LANES;
constexpr int64_t BLOCK = 512;

struct Cache {
    const char *k, *v;
    int64_t page_bytes;
    int page_tokens;
    const int64_t* units;

    const uint16_t* row(const char* pool, int64_t t, int width) const {
        return reinterpret_cast<const uint16_t*>(pool + units[t / page_tokens] * page_bytes) + t % page_tokens * width;
    }
};

// What one thread works with.
struct Workspace {
    float keys[2 * MAX_DIM * CHUNK], scaled[2 * MAX_DIM * CHUNK], values[CHUNK * MAX_DIM], cum[MAX_STATES][CHUNK];

    // Adds tokens [first, first + count) of one KV head to `states` [S, F, D + 1], after what is in them.
    void add(const Layer& p, const Cache& cache, int g, int64_t first, int count, float* states, float* logs) {
        const int width = 2 * p.dim, columns = p.dim + 1;
        float feature[2 * MAX_DIM], total[MAX_STATES] = {};
        for (int j = 0; j < CHUNK; j++) {
            if (j < count) {
                const uint16_t* key = cache.row(cache.k, first + j, p.groups * p.dim) + g * p.dim;
                const uint16_t* value = cache.row(cache.v, first + j, p.groups * p.dim) + g * p.dim;
                features(key, p.k_map + g * p.dim * p.dim, p.dim, feature);
                for (int f = 0; f < width; f++) keys[f * CHUNK + j] = feature[f];
                for (int d = 0; d < p.dim; d += LANES) store(values + j * p.dim + d, widen(value + d));
                for (int s = 0; s < p.states; s++) total[s] += log_gate(p, s, g, key);
            } else {
                for (int f = 0; f < width; f++) keys[f * CHUNK + j] = 0.0f;
                std::memset(values + j * p.dim, 0, p.dim * 4);
            }
            for (int s = 0; s < p.states; s++) cum[s][j] = total[s];
        }
        for (int s = 0; s < p.states; s++) {
            float* state = states + int64_t(s) * width * columns;
            const float keep = std::exp(total[s]);
            logs[s] += total[s];
            vf decay[CHUNK_VECTORS];
            for (int v = 0; v < CHUNK_VECTORS; v++) decay[v] = exponential(total[s] - load<vf>(cum[s] + v * LANES));
            for (int f = 0; f < width; f++) {
                vf sums = {};
                for (int v = 0; v < CHUNK_VECTORS; v++) {
                    const vf x = load<vf>(keys + f * CHUNK + v * LANES) * decay[v];
                    store(scaled + f * CHUNK + v * LANES, x);
                    sums += x;
                }
                float& norm = state[f * columns + p.dim];
                norm = norm * keep + sum(sums);
            }
            for (int f = 0; f < width; f += TILE)
                for (int d = 0; d < p.dim; d += 2 * LANES) {
                    vf acc[TILE][2];
                    for (int i = 0; i < TILE; i++)
                        for (int e = 0; e < 2; e++) acc[i][e] = load<vf>(state + (f + i) * columns + d + e * LANES) * keep;
                    product<2>(scaled + f * CHUNK, CHUNK, values + d, p.dim, CHUNK, acc);
                    for (int i = 0; i < TILE; i++)
                        for (int e = 0; e < 2; e++) store(state + (f + i) * columns + d + e * LANES, acc[i][e]);
                }
        }
    }
};

}  // namespace

extern "C" {

// `tokens` cached tokens, in pages `units` of the pools k and v [n_units, page_tokens, G, D]; the memory's five parts, zeroed,
// are filled.
void dsla_fold(int threads, int64_t tokens, int heads, int groups, int dim, int states, int window, int sinks,
               float temperature, float floor, const float* q_map, const float* k_map, const float* gate,
               const float* gate_bias, const float* mix, const float* mix_bias, const char* k, const char* v,
               int64_t page_bytes, int page_tokens, const int64_t* units, char* const* parts) {
    const Layer p{heads, groups, dim, states, window, sinks, temperature, floor, q_map, k_map, gate, gate_bias, mix, mix_bias};
    const Cache cache{k, v, page_bytes, page_tokens, units};
    const int row = groups * dim;
    const auto copy = [&](int part, const char* pool, int64_t to, int64_t t) {
        std::memcpy(reinterpret_cast<uint16_t*>(parts[part]) + to * row, cache.row(pool, t, row), row * 2);
    };
    for (int64_t t = 0; t < std::min<int64_t>(tokens, sinks); t++) copy(3, k, t, t), copy(4, v, t, t);
    for (int64_t t = std::max<int64_t>(0, tokens - window); t < tokens; t++) copy(1, k, t % window, t), copy(2, v, t % window, t);

    const int64_t left = tokens - window, size = int64_t(2 * dim) * (dim + 1);
    if (left <= sinks) return;
    const int64_t blocks = (left - sinks + BLOCK - 1) / BLOCK;
    std::vector<float> partial(blocks * groups * states * size), logs(blocks * groups * states);
#pragma omp parallel num_threads(threads)
    {
        Workspace* w = new Workspace;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < blocks * groups; item++) {
            const int64_t b = item / groups, end = std::min(left, sinks + (b + 1) * BLOCK);
            for (int64_t t = sinks + b * BLOCK; t < end; t += CHUNK)
                w->add(p, cache, int(item % groups), t, int(std::min<int64_t>(CHUNK, end - t)),
                       partial.data() + item * states * size, logs.data() + item * states);
        }
        delete w;
#pragma omp for schedule(dynamic, 1)
        for (int item = 0; item < states * groups; item++) {
            const int s = item / groups, g = item % groups;
            float* state = reinterpret_cast<float*>(parts[0]) + item * size;
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t at = (b * groups + g) * states + s;
                const float keep = std::exp(logs[at]);
                const float* from = partial.data() + at * size;
                for (int64_t i = 0; i < size; i++) state[i] = state[i] * keep + from[i];
            }
        }
    }
}

}  // extern "C"
