// Register tiles of softmax attention: 6 query rows against packed keys and values, bfloat16 in, fp32 sums.
#pragma once

#include "vec.h"

namespace dsla {

constexpr int ROWS = 6;  // query rows of a tile
constexpr int BLOCK_KEYS = 256;

// Scores of 6 query rows against 64 keys; keys packed [16 keys][D / 2][16][2].
inline void score_tile(const uint16_t* q, int q_stride, const uint32_t* k, int dim, float scale, float* scores) {
    vf acc[ROWS][4] = {};
    const int pairs = dim / 2;
    for (int d = 0; d < pairs; d++) {
        vu keys[4];
        for (int c = 0; c < 4; c++) keys[c] = load<vu>(k + (c * pairs + d) * LANES);
        for (int i = 0; i < ROWS; i++) {
            vu pair = splat(reinterpret_cast<const uint32_t*>(q + i * q_stride)[d]);
            for (int c = 0; c < 4; c++) acc[i][c] = dot_pairs(acc[i][c], pair, keys[c]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int c = 0; c < 4; c++) store(scores + i * BLOCK_KEYS + c * LANES, acc[i][c] * scale);
}

// y[6][C * 16] = y * keep + weights[6][count] v, values packed [count / 2][D][2].
template <int C>
inline void value_tile(const uint16_t* weights, const uint32_t* v, int dim, int count, const float* keep, float* y) {
    vf acc[ROWS][C];
    for (int i = 0; i < ROWS; i++)
        for (int c = 0; c < C; c++) acc[i][c] = load<vf>(y + i * dim + c * LANES) * keep[i];
    for (int pair = 0; pair < count / 2; pair++) {
        vu values[C];
        for (int c = 0; c < C; c++) values[c] = load<vu>(v + pair * dim + c * LANES);
        for (int i = 0; i < ROWS; i++) {
            vu weight = splat(reinterpret_cast<const uint32_t*>(weights + i * BLOCK_KEYS)[pair]);
            for (int c = 0; c < C; c++) acc[i][c] = dot_pairs(acc[i][c], weight, values[c]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int c = 0; c < C; c++) store(y + i * dim + c * LANES, acc[i][c]);
}

// The same for all columns; dim a multiple of 32.
inline void add_values(const uint16_t* weights, const uint32_t* v, int dim, int count, const float* keep, float* y) {
    int d = 0;
    for (; d + 64 <= dim; d += 64) value_tile<4>(weights, v + d, dim, count, keep, y + d);
    for (; d < dim; d += 32) value_tile<2>(weights, v + d, dim, count, keep, y + d);
}

// Puts key and value number `index` of a group into their packed forms.
inline void pack_token(const uint16_t* key, const uint16_t* value, int dim, int64_t index, uint32_t* keys, uint32_t* values) {
    const int pairs = dim / 2;
    uint32_t* to_k = keys + index / LANES * LANES * pairs + index % LANES;
    for (int d = 0; d < pairs; d++) to_k[d * LANES] = load<uint32_t>(key + 2 * d);
    uint16_t* to_v = reinterpret_cast<uint16_t*>(values + index / 2 * dim);
    for (int d = 0; d < dim; d++) to_v[2 * d + index % 2] = value[d];
}

}  // namespace dsla
