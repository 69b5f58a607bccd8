// One token of a converted layer for n requests: window, sinks, all states and their mixing, in place on the slots.

#include <algorithm>
#include <cmath>

#include "mixer.h"

using namespace dsla;

namespace {

constexpr int MAX_SHARED = 8;

// Bytes of a cache line, and how far ahead of its use a state is fetched. Window and sinks, which lie in short pieces, are
// fetched in between, a piece with each row of the states: all at once, they would hold the states up.
constexpr int LINE = 64, AHEAD = 3072;

// state = gate * state + key value^T in columns [0, V * 16) of a state, read by R queries: y [R, D].
// The first columns take along the last one of all, where values are 1, and leave it in `norms` too, if there is such.
// Rows `near` [soon, D] are fetched for later.
template <typename T, int R, int V>
void advance(T* state, int64_t position, int64_t element, float gate, const float* key, const float* value, int dim,
             const float* queries, float* y, float* norms, const uint16_t* const* near, int soon) {
    const int width = 2 * dim, columns = dim + 1;
    const uint32_t next = uint32_t(columns) * ELEMENT_STEP;
    uint32_t last = dither(position, element + dim);
    vf values[V], acc[R][V] = {};
    vu thresholds[V];
    UNROLL
    for (int e = 0; e < V; e++) {
        values[e] = load<vf>(value + e * LANES);
        thresholds[e] = dithers(position, element + e * LANES);
    }
    for (int f = 0; f < width; f++) {
        T* at = state + f * columns;
        for (int e = 0; e < columns * int(sizeof(T)); e += LINE) __builtin_prefetch(reinterpret_cast<char*>(at) + AHEAD + e);
        if (f < soon)
            for (int d = 0; d < dim; d += LINE / 2) __builtin_prefetch(near[f] + d);
        const float weight = key[f];
        vf query[R];
        UNROLL
        for (int r = 0; r < R; r++) query[r] = splat(queries[r * width + f]);
        UNROLL
        for (int e = 0; e < V; e++) {
            const vf x = get(at + e * LANES) * gate + weight * values[e];
            put(at + e * LANES, x, thresholds[e]);
            thresholds[e] += next;
            UNROLL
            for (int r = 0; r < R; r++) acc[r][e] += query[r] * x;
        }
        if (norms) {
            norms[f] = get_one(at + dim) * gate + weight;
            put_one(at + dim, norms[f], last);
            last += next;
        }
    }
    UNROLL
    for (int r = 0; r < R; r++)
        UNROLL
        for (int e = 0; e < V; e++) store(y + r * dim + e * LANES, acc[r][e]);
}

// All columns of a state whose first element is `element` among those of its layer; y [R, D] and the sums of weights [R].
template <typename T, int R>
void advance_state(T* state, int64_t position, int64_t element, float gate, const float* key, const float* value, int dim,
                   const float* queries, float* y, float* sums, const uint16_t* const* near, int soon) {
    // As many sums as registers hold.
    constexpr int LESS = WIDE_REGISTERS ? 2 : 1, WIDE = WIDE_REGISTERS && R <= 4 ? 4 : LESS;
    const int width = 2 * dim;
    float norms[2 * MAX_DIM];
    for (int d = 0; d < dim;) {
        const bool wide = dim - d >= WIDE * LANES;
        const auto run = wide ? advance<T, R, WIDE> : advance<T, R, LESS>;
        run(state + d, position, element + d, gate, key, value + d, dim, queries, y + d,
            d ? nullptr : norms, near, d ? 0 : soon);
        d += (wide ? WIDE : LESS) * LANES;
    }
    UNROLL
    for (int r = 0; r < R; r++) {
        vf total = {};
        for (int f = 0; f < width; f += LANES) total += load<vf>(queries + r * width + f) * load<vf>(norms + f);
        sums[r] = sum(total);
    }
}

// Softmax attention of R queries [R, D] over `count` keys: weights, the largest and the total of each, y [R, D] times total.
template <int R>
void attend(const uint16_t* q, const uint16_t* const* keys, const uint16_t* const* values, int count, int dim,
            float weights[R][MAX_NEAR], float* tops, float* totals, float* y) {
    const float scale = 1.0f / std::sqrt(float(dim));
    UNROLL
    for (int r = 0; r < R; r++) {
        vf top = splat(-INFINITY);
        for (int i = 0; i < count; i += LANES) {
            vf dots[LANES] = {};
            const int last = std::min(LANES, count - i);
            for (int j = 0; j < last; j++)
                for (int d = 0; d < dim; d += 2 * LANES)
                    dots[j] = dot_pairs(dots[j], load<vu>(q + r * dim + d), load<vu>(keys[i + j] + d));
            vf scores = dsla::sums(dots) * scale;
            for (int j = last; j < LANES; j++) scores[j] = -INFINITY;
            store(weights[r] + i, scores);
            top = maximum(top, scores);
        }
        tops[r] = maximum(top);
        vf total = {};
        for (int i = 0; i < count; i += LANES) {
            const vf e = exponential(load<vf>(weights[r] + i) - tops[r]);
            store(weights[r] + i, e);
            total += e;
        }
        totals[r] = sum(total);
    }
    for (int d = 0; d < dim; d += 2 * LANES) {
        vf acc[R][2] = {};
        for (int i = 0; i < count; i++) {
            const vf v0 = widen(values[i] + d), v1 = widen(values[i] + d + LANES);
            UNROLL
            for (int r = 0; r < R; r++) acc[r][0] += weights[r][i] * v0, acc[r][1] += weights[r][i] * v1;
        }
        UNROLL
        for (int r = 0; r < R; r++) store(y + r * dim + d, acc[r][0]), store(y + r * dim + d + LANES, acc[r][1]);
    }
}

// What a step of one KV head of one request works on.
struct Work {
    explicit Work(const Layer& p) : p(p) {}

    const Layer& p;
    char* states;
    int g;
    int64_t position;
    float gates[MAX_STATES], key[2 * MAX_DIM], value[MAX_DIM];
    int count;
    const uint16_t *keys[MAX_NEAR], *values[MAX_NEAR];
};

// Heads [h, h + R), which share the KV head; q and y [R, D].
template <typename T, int R>
void step_heads(const Work& w, int h, const uint16_t* q, uint16_t* y) {
    const Layer& p = w.p;
    const int dim = p.dim, width = 2 * dim;
    float queries[R * 2 * MAX_DIM], reads[MAX_STATES][R * MAX_DIM], sums[MAX_STATES][R], near[R * MAX_DIM];
    float weights[R][MAX_NEAR], tops[R], totals[R];
    UNROLL
    for (int r = 0; r < R; r++) features(q + r * dim, p.q_map + int64_t(h + r) * dim * dim, dim, queries + r * width);
    for (int s = 0; s < p.states; s++) {
        const int64_t element = int64_t(s * p.groups + w.g) * width * (dim + 1);
        advance_state<T, R>(reinterpret_cast<T*>(w.states) + element, w.position, element, w.gates[s], w.key, w.value, dim,
                            queries, reads[s], sums[s], s ? w.values : w.keys, w.count);
    }
    attend<R>(q, w.keys, w.values, w.count, dim, weights, tops, totals, near);
    UNROLL
    for (int r = 0; r < R; r++) {
        float factor[MAX_STATES], far = 0, near_share, far_share;
        factors(p, h + r, q + r * dim, factor);
        for (int s = 0; s < p.states; s++) far += factor[s] * sums[s][r];
        shares(w.count, tops[r], totals[r], far, &near_share, &far_share);
        const float each = w.count ? near_share / totals[r] : 0.0f;
        for (int d = 0; d < dim; d += LANES) {
            vf out = load<vf>(near + r * dim + d) * each;
            for (int s = 0; s < p.states; s++) out += factor[s] * far_share * load<vf>(reads[s] + r * dim + d);
            narrow(y + r * dim + d, out);
        }
    }
}

template <typename T>
constexpr decltype(&step_heads<T, 1>) STEPS[MAX_SHARED] = {step_heads<T, 1>, step_heads<T, 2>, step_heads<T, 3>, step_heads<T, 4>,
                                                           step_heads<T, 5>, step_heads<T, 6>, step_heads<T, 7>, step_heads<T, 8>};

// One KV head of one request; q and y [R, D].
void step_group(const Layer& p, const Slot& slot, int g, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                int64_t length, bool narrow_states, uint16_t* y) {
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

    Work w(p);
    w.states = slot.states, w.g = g, w.position = length + 1;
    if (length - p.window >= p.sinks) {
        features(left_k, p.k_map + int64_t(g) * dim * dim, dim, w.key);
        for (int d = 0; d < dim; d += LANES) store(w.value + d, widen(left_v + d));
        for (int s = 0; s < p.states; s++) w.gates[s] = std::exp(log_gate(p, s, g, left_k));
    } else {
        std::fill_n(w.key, width, 0.0f);
        std::fill_n(w.value, dim, 0.0f);
        std::fill_n(w.gates, p.states, 1.0f);
    }

    const int near = int(std::min<int64_t>(length + 1, p.window));
    const int first = int(std::clamp<int64_t>(length - p.window + 1, 0, p.sinks));
    for (int i = 0; i < near; i++) {
        w.keys[i] = slot.window_k + i * row + g * dim;
        w.values[i] = slot.window_v + i * row + g * dim;
    }
    for (int i = 0; i < first; i++) {
        w.keys[near + i] = slot.sinks_k + i * row + g * dim;
        w.values[near + i] = slot.sinks_v + i * row + g * dim;
    }
    w.count = near + first;

    for (int base = 0; base < shared; base += MAX_SHARED) {
        const int heads = std::min(MAX_SHARED, shared - base) - 1;
        const auto run = narrow_states ? STEPS<uint16_t>[heads] : STEPS<float>[heads];
        run(w, g * shared + base, q + base * dim, y + base * dim);
        // Later heads of a large group find the states advanced already.
        std::fill_n(w.gates, p.states, 1.0f);
        std::fill_n(w.key, width, 0.0f);
    }
}

}  // namespace

extern "C" {

// q [n, H, D], k and v [n, G, D] with given row strides (elements), y [n, H, D]; `slots` picks rows of the five pools, whose
// rows lie `row_bytes` apart; `lengths` are the tokens seen before; states are bfloat16 if `narrow_states`, else float.
void dsla_step(int threads, int n, int heads, int groups, int dim, int states, int window, int sinks, float temperature,
               float floor, const float* q_map, const float* k_map, const float* gate, const float* gate_bias,
               const float* mix, const float* mix_bias, const uint16_t* q, int64_t q_stride, const uint16_t* k,
               int64_t k_stride, const uint16_t* v, int64_t v_stride, char* const* pools, const int64_t* row_bytes,
               const int64_t* slots, const int64_t* lengths, int narrow_states, uint16_t* y) {
    const Layer layer{heads, groups, dim, states, window, sinks, temperature, floor, q_map, k_map, gate, gate_bias, mix, mix_bias};
    const int shared = heads / groups;
#pragma omp parallel for schedule(static) num_threads(threads) if (n * groups > 1)
    for (int item = 0; item < n * groups; item++) {
        const int i = item / groups, g = item % groups;
        char* at[5];
        for (int part = 0; part < 5; part++) at[part] = pools[part] + slots[i] * row_bytes[part];
        const Slot slot{at[0], reinterpret_cast<uint16_t*>(at[1]), reinterpret_cast<uint16_t*>(at[2]),
                        reinterpret_cast<uint16_t*>(at[3]), reinterpret_cast<uint16_t*>(at[4])};
        step_group(layer, slot, g, q + i * q_stride + g * shared * dim, k + i * k_stride + g * dim, v + i * v_stride + g * dim,
                   lengths[i], narrow_states, y + (int64_t(i) * heads + g * shared) * dim);
    }
}

}  // extern "C"
