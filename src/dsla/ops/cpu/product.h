// A small fp32 matrix product, accumulated in registers.
#pragma once

#include "vec.h"

namespace dsla {

constexpr int TILE = 4;  // rows of an fp32 tile

// acc[TILE][N] += a [TILE, k] b [k, N * 16]
template <int N>
inline void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int k, vf (*acc)[N]) {
    constexpr int AT_ONCE = WIDE_REGISTERS ? N : 1;
    for (int first = 0; first < N; first += AT_ONCE) {
        vf sums[TILE][AT_ONCE];
        UNROLL
        for (int i = 0; i < TILE; i++)
            UNROLL
            for (int c = 0; c < AT_ONCE; c++) sums[i][c] = acc[i][first + c];
        for (int x = 0; x < k; x++) {
            vf row[AT_ONCE];
            UNROLL
            for (int c = 0; c < AT_ONCE; c++) row[c] = load<vf>(b + x * b_stride + (first + c) * LANES);
            UNROLL
            for (int i = 0; i < TILE; i++)
                UNROLL
                for (int c = 0; c < AT_ONCE; c++) sums[i][c] += a[i * a_stride + x] * row[c];
        }
        UNROLL
        for (int i = 0; i < TILE; i++)
            UNROLL
            for (int c = 0; c < AT_ONCE; c++) acc[i][first + c] = sums[i][c];
    }
}

}  // namespace dsla
