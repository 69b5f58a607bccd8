// The dual-state mixer's parameters, memory, and what a single token needs of them.
//
// Settings: hedgehog features, one normaliser shared with window and sinks, scalar gates read from the key, weights of the
// states per head and query. Parameters are fp32. States are fp32 [S, G, F, D + 1], the last column holding the sum of
// weights; window [W, G, D] (token t at row t mod W) and sinks [C, G, D] are bfloat16.
#pragma once

#include <algorithm>
#include <cmath>

#include "vec.h"

namespace dsla {

constexpr int MAX_DIM = 256;
constexpr int MAX_STATES = 8;
constexpr int MAX_NEAR = 1024;
constexpr float TINY = 1e-30f;
constexpr float MAX_LOG_WEIGHT = 30.0f;

struct Layer {
    int heads, groups, dim, states, window, sinks;
    float temperature, floor;
    const float* q_map;      // [H, D, D]
    const float* k_map;      // [G, D, D]
    const float* gate;       // [S, G, D]
    const float* gate_bias;  // [S, G]
    const float* mix;        // [H, D, S]
    const float* mix_bias;   // [H, S]
};

struct Slot {
    float* states;
    uint16_t *window_k, *window_v, *sinks_k, *sinks_v;
};

// softmax([x W, -x W]) of one head; W [D, D].
inline void features(const uint16_t* x, const float* map, int dim, float* out) {
    std::fill_n(out, dim, 0.0f);
    for (int d = 0; d < dim; d += 4) {
        const float a = widen(x[d]), b = widen(x[d + 1]), c = widen(x[d + 2]), e = widen(x[d + 3]);
        const float* row = map + d * dim;
        for (int f = 0; f < dim; f += LANES) {
            vf sum = load<vf>(out + f);
            sum += a * load<vf>(row + f);
            sum += b * load<vf>(row + dim + f);
            sum += c * load<vf>(row + 2 * dim + f);
            sum += e * load<vf>(row + 3 * dim + f);
            store(out + f, sum);
        }
    }
    vf top = {};
    for (int f = 0; f < dim; f += LANES) {
        vf x = load<vf>(out + f);
        top = maximum(top, maximum(x, -x));
    }
    const float most = maximum(top);
    vf total = {};
    for (int f = 0; f < dim; f += LANES) {
        vf x = load<vf>(out + f);
        vf up = exponential(x - most), down = exponential(-x - most);
        store(out + f, up);
        store(out + dim + f, down);
        total += up + down;
    }
    const float scale = 1.0f / sum(total);
    for (int f = 0; f < 2 * dim; f += LANES) store(out + f, load<vf>(out + f) * scale);
}

// Log gate of state s on a key of KV head g.
inline float log_gate(const Layer& p, int s, int g, const uint16_t* key) {
    const float* weight = p.gate + (s * p.groups + g) * p.dim;
    vf dot = {};
    for (int d = 0; d < p.dim; d += LANES) dot += widen(key + d) * load<vf>(weight + d);
    const float x = p.gate_bias[s * p.groups + g] + sum(dot);
    return std::max((std::min(x, 0.0f) - std::log1p(std::exp(-std::fabs(x)))) / p.temperature, p.floor);
}

// What the reads of state s count for in head h.
inline float factor(const Layer& p, int s, int h, const uint16_t* query) {
    float x = p.mix_bias[h * p.states + s];
    for (int d = 0; d < p.dim; d++) x += widen(query[d]) * p.mix[(h * p.dim + d) * p.states + s];
    return std::exp(std::clamp(x, -MAX_LOG_WEIGHT, MAX_LOG_WEIGHT));
}

// Shares of window and sinks (of `count` keys, weights total e^top) and of the states (weights `far`), the latter over `far`.
inline void shares(int count, float top, float total, float far, float* near_share, float* far_share) {
    if (count == 0) {
        *near_share = 0.0f;
        *far_share = 1.0f / std::max(far, TINY);
    } else if (far > TINY) {
        *near_share = 1.0f / (1.0f + std::exp(std::log(far) - top - std::log(total)));
        *far_share = (1.0f - *near_share) / far;
    } else {
        *near_share = 1.0f;
        *far_share = 0.0f;
    }
}

}  // namespace dsla
