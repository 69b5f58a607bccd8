// The dual-state mixer's parameters, memory, and what a single token needs of them.
//
// Settings: hedgehog features, one normaliser shared with window and sinks, scalar gates read from the key, weights of the
// states per head and query. Parameters are fp32. States [S, G, F, D + 1], the last column holding the sum of weights, are
// float or bfloat16 (uint16_t); window [W, G, D] (token t at row t mod W) and sinks [C, G, D] are bfloat16.
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
    char* states;
    uint16_t *window_k, *window_v, *sinks_k, *sinks_v;
};

// Reads of states, and writes to them. What is kept as bfloat16 is rounded up where the bits that are cut off exceed a
// threshold that differs by element and position: a token adds less to a sum over thousands of them than rounding to the
// nearest would ever keep. The thresholds are those of `ops/rounding.py`; `dither` holds them in its upper halves.
constexpr uint32_t ELEMENT_STEP = 0xc13fa9a9u, POSITION_STEP = 0x91e10da5u;

inline uint32_t dither(int64_t position, int64_t element) {
    return uint32_t(position) * POSITION_STEP + uint32_t(element) * ELEMENT_STEP;
}

inline vu dithers(int64_t position, int64_t element) {
    vu lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = dither(position, element + i);
    return lanes;
}

inline vf get(const float* from) { return load<vf>(from); }
inline vf get(const uint16_t* from) { return widen(from); }
inline float get_one(const float* from) { return *from; }
inline float get_one(const uint16_t* from) { return widen(*from); }
inline void put(float* to, vf x, vu) { store(to, x); }
inline void put(uint16_t* to, vf x, vu dither) { store(to, upper_halves(as<vu>(x) + (dither >> 16))); }
inline void put_one(float* to, float x, uint32_t) { *to = x; }
inline void put_one(uint16_t* to, float x, uint32_t dither) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *to = uint16_t((bits + (dither >> 16)) >> 16);
}

// softmax([out, -out]) [2 D], in place of out [D].
inline void soften(float* out, int dim) {
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

// softmax([x W, -x W]) of one head; W [D, D].
inline void features(const uint16_t* x, const float* map, int dim, float* out) {
    for (int f = 0; f < dim; f += 2 * LANES) {
        vf sums[4][2] = {};
        for (int d = 0; d < dim; d += 4)
            for (int i = 0; i < 4; i++) {
                const float a = widen(x[d + i]);
                const float* row = map + (d + i) * dim + f;
                for (int e = 0; e < 2; e++) sums[i][e] += a * load<vf>(row + e * LANES);
            }
        for (int e = 0; e < 2; e++) store(out + f + e * LANES, (sums[0][e] + sums[1][e]) + (sums[2][e] + sums[3][e]));
    }
    soften(out, dim);
}

// Log gate of state s on a key of KV head g.
inline float log_gate(const Layer& p, int s, int g, const uint16_t* key) {
    const float* weight = p.gate + (s * p.groups + g) * p.dim;
    vf dot = {};
    for (int d = 0; d < p.dim; d += LANES) dot += widen(key + d) * load<vf>(weight + d);
    const float x = p.gate_bias[s * p.groups + g] + sum(dot);
    return std::max((std::min(x, 0.0f) - std::log1p(std::exp(-std::fabs(x)))) / p.temperature, p.floor);
}

template <int S>
inline void factors_of(const float* mix, const float* bias, const float* query, int dim, float* out) {
    vf total = {};
    for (int e = 0; e < dim * S; e += LANES) total += load<vf>(mix + e) * repeated<S>(load<vf>(query + e / S));
    total += swap_8(total);
    if (S <= 4) total += swap_4(total);
    if (S <= 2) total += swap_2(total);
    if (S == 1) total[0] += total[1];
    for (int s = 0; s < S; s++) out[s] = std::exp(std::clamp(bias[s] + total[s], -MAX_LOG_WEIGHT, MAX_LOG_WEIGHT));
}

// What the reads of each state count for in head h; there are 1, 2, 4 or 8 states.
inline void factors(const Layer& p, int h, const uint16_t* query, float* out) {
    float wide[MAX_DIM + LANES];
    for (int d = 0; d < p.dim; d += LANES) store(wide + d, widen(query + d));
    store(wide + p.dim, vf{});
    const auto run = p.states == 1 ? factors_of<1> : p.states == 2 ? factors_of<2> : p.states == 4 ? factors_of<4> : factors_of<8>;
    run(p.mix + int64_t(h) * p.dim * p.states, p.mix_bias + h * p.states, wide, p.dim, out);
}

// Shares of window and sinks (of `count` keys, weights total e^top) and of the states (weights `far`), the latter over `far`.
inline void shares(int count, float top, float total, float far, float* near_share, float* far_share) {
    if (count == 0) {
        *near_share = 0.0f;
        *far_share = 1.0f / std::max(far, TINY);
    } else if (!(far <= TINY)) {  // what is no number stays none
        *near_share = 1.0f / (1.0f + far / total * std::exp(-top));
        *far_share = (1.0f - *near_share) / far;
    } else {
        *near_share = 1.0f;
        *far_share = 0.0f;
    }
}

}  // namespace dsla
