// One token of a converted layer for n requests: window, sinks, both states and their mixing, in place on the slots.

#include <algorithm>
#include <cmath>

#include "mixer.h"

using namespace dsla;

namespace {

// state = gate * state + key value^T (value's last column is 1), then read by R queries: y[R, D] and sums[R].
template <int R>
void advance(float* state, float gate, const float* key, const float* value, int dim, const float* queries, int stride,
             float* y, float* sums) {
    const int width = 2 * dim, columns = dim + 1;
    for (int d = 0; d < dim; d += 2 * LANES) {
        const vf v0 = load<vf>(value + d), v1 = load<vf>(value + d + LANES);
        vf acc[R][2] = {};
        for (int f = 0; f < width; f++) {
            float* at = state + f * columns + d;
            const vf s0 = load<vf>(at) * gate + key[f] * v0, s1 = load<vf>(at + LANES) * gate + key[f] * v1;
            store(at, s0);
            store(at + LANES, s1);
            for (int r = 0; r < R; r++) {
                acc[r][0] += queries[r * stride + f] * s0;
                acc[r][1] += queries[r * stride + f] * s1;
            }
        }
        for (int r = 0; r < R; r++)
            for (int c = 0; c < 2; c++) store(y + r * dim + d + c * LANES, acc[r][c]);
    }
    std::fill_n(sums, R, 0.0f);
    for (int f = 0; f < width; f++) {
        float& total = state[f * columns + dim];
        total = total * gate + key[f];
        for (int r = 0; r < R; r++) sums[r] += queries[r * stride + f] * total;
    }
}

constexpr int MAX_SHARED = 8;
constexpr decltype(&advance<1>) ADVANCE[] = {advance<1>, advance<2>, advance<3>, advance<4>,
                                             advance<5>, advance<6>, advance<7>, advance<8>};

float dot(const uint16_t* a, const uint16_t* b, int dim) {
    vf total = {};
    for (int d = 0; d < dim; d += 2 * LANES) total = dot_pairs(total, load<vu>(a + d), load<vu>(b + d));
    return sum(total);
}

// One KV head of one request; q and y [R, D].
void step_group(const Layer& p, const Slot& slot, int g, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                int64_t length, uint16_t* y) {
    const int dim = p.dim, row = p.groups * dim, shared = p.heads / p.groups, width = 2 * dim;
    const uint16_t *left_k = k, *left_v = v;
    uint16_t old_k[MAX_DIM], old_v[MAX_DIM];
    if (length < p.sinks) {
        std::memcpy(slot.sinks_k + length * row + g * dim, k, dim * 2);
        std::memcpy(slot.sinks_v + length * row + g * dim, v, dim * 2);
    }
    if (p.window) {
        uint16_t *at_k = slot.window_k + length % p.window * row + g * dim, *at_v = slot.window_v + length % p.window * row + g * dim;
        std::memcpy(old_k, at_k, dim * 2);
        std::memcpy(old_v, at_v, dim * 2);
        std::memcpy(at_k, k, dim * 2);
        std::memcpy(at_v, v, dim * 2);
        left_k = old_k, left_v = old_v;
    }

    float key[2 * MAX_DIM], value[MAX_DIM], gates[MAX_STATES];
    const bool enters = length - p.window >= p.sinks;
    if (enters) {
        features(left_k, p.k_map + g * dim * dim, dim, key);
        for (int d = 0; d < dim; d++) value[d] = widen(left_v[d]);
    } else {
        std::fill_n(key, width, 0.0f);
        std::fill_n(value, dim, 0.0f);
    }
    for (int s = 0; s < p.states; s++) gates[s] = enters ? std::exp(log_gate(p, s, g, left_k)) : 1.0f;

    // Window and sinks.
    const int near = int(std::min<int64_t>(length + 1, p.window));
    const int first = int(std::clamp<int64_t>(length - p.window + 1, 0, p.sinks));
    const uint16_t *keys[MAX_NEAR], *values[MAX_NEAR];
    for (int i = 0; i < near; i++) keys[i] = slot.window_k + i * row + g * dim, values[i] = slot.window_v + i * row + g * dim;
    for (int i = 0; i < first; i++) {
        keys[near + i] = slot.sinks_k + i * row + g * dim;
        values[near + i] = slot.sinks_v + i * row + g * dim;
    }
    const int count = near + first;
    const float scale = 1.0f / std::sqrt(float(dim));

    for (int base = 0; base < shared; base += MAX_SHARED) {
        const int heads = std::min(MAX_SHARED, shared - base);
        float queries[MAX_SHARED * 2 * MAX_DIM], reads[MAX_STATES][MAX_SHARED * MAX_DIM], sums[MAX_STATES][MAX_SHARED];
        for (int r = 0; r < heads; r++) {
            const int h = g * shared + base + r;
            features(q + (base + r) * dim, p.q_map + h * dim * dim, dim, queries + r * width);
        }
        for (int s = 0; s < p.states; s++) {
            float* state = slot.states + (s * p.groups + g) * int64_t(width) * (dim + 1);
            // Later heads of a large group find the states advanced already.
            const float gate = base ? 1.0f : gates[s];
            static const float nothing[2 * MAX_DIM] = {};
            ADVANCE[heads - 1](state, gate, base ? nothing : key, value, dim, queries, width, reads[s], sums[s]);
        }
        for (int r = 0; r < heads; r++) {
            const int h = g * shared + base + r;
            const uint16_t* query = q + (base + r) * dim;
            float factors[MAX_STATES], far = 0;
            for (int s = 0; s < p.states; s++) {
                factors[s] = factor(p, s, h, query);
                far += factors[s] * sums[s][r];
            }
            float top = -INFINITY, total = 0, weights[MAX_NEAR];
            for (int i = 0; i < count; i++) {
                weights[i] = dot(query, keys[i], dim) * scale;
                top = std::max(top, weights[i]);
            }
            for (int i = 0; i < count; i++) {
                weights[i] = std::exp(weights[i] - top);
                total += weights[i];
            }
            float near_share, far_share;
            shares(count, top, total, far, &near_share, &far_share);
            const float each = count ? near_share / total : 0.0f;
            for (int d = 0; d < dim; d += LANES) {
                vf out = {};
                for (int i = 0; i < count; i++) out += weights[i] * widen(values[i] + d);
                out *= each;
                for (int s = 0; s < p.states; s++) out += factors[s] * far_share * load<vf>(reads[s] + r * dim + d);
                narrow(y + (base + r) * dim + d, out);
            }
        }
    }
}

}  // namespace

extern "C" {

// q [n, H, D], k and v [n, G, D] with given row strides (elements), y [n, H, D]; `slots` picks rows of the five pools, whose
// rows lie `row_bytes` apart; `lengths` are the tokens seen before.
void dsla_step(int threads, int n, int heads, int groups, int dim, int states, int window, int sinks, float temperature,
               float floor, const float* q_map, const float* k_map, const float* gate, const float* gate_bias,
               const float* mix, const float* mix_bias, const uint16_t* q, int64_t q_stride, const uint16_t* k,
               int64_t k_stride, const uint16_t* v, int64_t v_stride, char* const* pools, const int64_t* row_bytes,
               const int64_t* slots, const int64_t* lengths, uint16_t* y) {
    const Layer layer{heads, groups, dim, states, window, sinks, temperature, floor, q_map, k_map, gate, gate_bias, mix, mix_bias};
    const int shared = heads / groups;
#pragma omp parallel for schedule(static) num_threads(threads) if (n * groups > 1)
    for (int item = 0; item < n * groups; item++) {
        const int i = item / groups, g = item % groups;
        char* at[5];
        for (int part = 0; part < 5; part++) at[part] = pools[part] + slots[i] * row_bytes[part];
        const Slot slot{reinterpret_cast<float*>(at[0]), reinterpret_cast<uint16_t*>(at[1]), reinterpret_cast<uint16_t*>(at[2]),
                        reinterpret_cast<uint16_t*>(at[3]), reinterpret_cast<uint16_t*>(at[4])};
        step_group(layer, slot, g, q + i * q_stride + g * shared * dim, k + i * k_stride + g * dim, v + i * v_stride + g * dim,
                   lengths[i], y + (int64_t(i) * heads + g * shared) * dim);
    }
}

}  // extern "C"
