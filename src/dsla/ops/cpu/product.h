// Small matrix products of floats.
#pragma once

#include <vector>

#include "amx.h"
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

// The right factor [K, N] of products, K and N multiples of 16, with tile registers of 32. In those it is multiplied as bfloat16,
// in as many `parts` as asked for, whose sum it is, and what it is multiplied with is rounded to bfloat16 too.
class RightFactor {
   public:
    RightFactor(int k, int n, int parts) : k(k), n(n), parts(parts), values(int64_t(k) * n), pairs(amx_ready() ? parts * values.size() / 2 : 0) {}

    // Row `i`, to be written.
    float* row(int64_t i) { return values.data() + i * n; }

    // Call once the rows are written.
    void settle() {
#if defined(DSLA_AMX)
        if (!amx_ready()) return;
        for (int64_t i = 0; i < k / 2; i++)
            for (int64_t c = 0; c < n; c += LANES) {
                vf even = load<vf>(row(2 * i) + c), odd = load<vf>(row(2 * i + 1) + c);
                for (int part = 0; part < parts; part++) {
                    const vu e = nearest(even), o = nearest(odd);
                    store(&pairs[(part * (k / 2) + i) * n + c], e >> 16 | o);
                    even -= as<vf>(e);
                    odd -= as<vf>(o);
                }
            }
#endif
    }

    // y [m, N] = a [m, K] b, rows `a_stride` and `stride` apart; m a multiple of 4, with tile registers of 32.
    void multiply(const float* a, int64_t a_stride, int m, float* y, int64_t stride) const {
#if defined(DSLA_AMX)
        if (amx_ready()) return multiply_tiles(a, a_stride, m, y, stride);
#endif
        for (int i = 0; i < m; i += TILE) {
            int c = 0;
            for (; c + 2 * LANES <= n; c += 2 * LANES) multiply_columns<2>(a + i * a_stride, a_stride, c, y + i * stride, stride);
            for (; c < n; c += LANES) multiply_columns<1>(a + i * a_stride, a_stride, c, y + i * stride, stride);
        }
    }

   private:
    int k, n, parts;
    std::vector<float> values;
    std::vector<uint32_t> pairs;  // [parts, K / 2, N]

    template <int C>
    void multiply_columns(const float* a, int64_t a_stride, int first, float* y, int64_t stride) const {
        vf acc[TILE][C] = {};
        product<C>(a, a_stride, values.data() + first, n, k, acc);
        for (int i = 0; i < TILE; i++)
            for (int c = 0; c < C; c++) store(y + i * stride + first + c * LANES, acc[i][c]);
    }

#if defined(DSLA_AMX)
    void multiply_tiles(const float* a, int64_t a_stride, int m, float* y, int64_t stride) const {
        thread_local std::vector<uint16_t> rounded;
        rounded.resize(AMX_ROWS * k);
        for (int first = 0; first < m; first += AMX_ROWS) {
            for (int i = 0; i < AMX_ROWS; i++)
                for (int d = 0; d < k; d += LANES) narrow(&rounded[i * k + d], load<vf>(a + (first + i) * a_stride + d));
            for (int c = 0; c < n; c += 2 * LANES)
                for (int part = 0; part < parts; part++)
                    tile_product(rows_factor(rounded.data(), k), {&pairs[part * (k / 2) * n + c], n * 4, LANES * n * 4, LANES * 4},
                                 k / TILE_INPUTS, part > 0, y + first * stride + c, stride);
        }
    }
#endif
};

}  // namespace dsla
