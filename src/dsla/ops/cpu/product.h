// A small fp32 matrix product, accumulated in registers.
#pragma once

#include "vec.h"

namespace dsla {

constexpr int TILE = 4;  // rows of an fp32 tile

// acc[TILE][N] += a [TILE, k] b [k, N * 16]
template <int N>
inline void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int k, vf (*acc)[N]) {
    vf sums[TILE][N];
    for (int i = 0; i < TILE; i++)
        for (int c = 0; c < N; c++) sums[i][c] = acc[i][c];
    for (int x = 0; x < k; x++) {
        vf row[N];
        for (int c = 0; c < N; c++) row[c] = load<vf>(b + x * b_stride + c * LANES);
        for (int i = 0; i < TILE; i++)
            for (int c = 0; c < N; c++) sums[i][c] += a[i * a_stride + x] * row[c];
    }
    for (int i = 0; i < TILE; i++)
        for (int c = 0; c < N; c++) acc[i][c] = sums[i][c];
}

}  // namespace dsla
