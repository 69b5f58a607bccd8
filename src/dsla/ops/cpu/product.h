// Small matrix products of floats.
#pragma once

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

// The right factor [K, N] of products; K and N multiples of 32, or of 48 without tile registers. In those it is multiplied as
// bfloat16, in as many `parts` as asked for, whose sum it is, and what it is multiplied with is rounded to bfloat16 too.
class RightFactor {
   public:
    RightFactor(int k, int n, int parts)
        : k(k), n(n), parts(parts), rows(amx_ready() ? 0 : int64_t(k) * n), pairs(amx_ready() ? int64_t(parts) * k * n / 2 : 0) {}

    // Sets `count` rows from row `first` on, both even, from those at `from`, `stride` apart.
    void set(int first, int count, const float* from, int64_t stride) {
#if defined(DSLA_AMX)
        if (amx_ready()) return set_pairs(first, count, from, stride);
#endif
        for (int i = 0; i < count; i++) std::memcpy(&rows[int64_t(first + i) * n], from + i * stride, n * 4);
    }

    // y [m, N] = a [m, K] b, rows `a_stride` and `stride` apart; m a multiple of 4, with tile registers of 32.
    void multiply(const float* a, int64_t a_stride, int m, float* y, int64_t stride) const {
#if defined(DSLA_AMX)
        if (amx_ready()) return multiply_tiles(a, a_stride, m, y, stride);
#endif
        for (int i = 0; i < m; i += TILE)
            if (n % (3 * LANES) == 0)
                multiply_rows<3>(a + i * a_stride, a_stride, y + i * stride, stride);
            else
                multiply_rows<2>(a + i * a_stride, a_stride, y + i * stride, stride);
    }

   private:
    int k, n, parts;
    Array<float> rows;      // [K, N], or
    Array<uint32_t> pairs;  // [parts, K / 2, N]

    template <int C>
    void multiply_rows(const float* a, int64_t a_stride, float* y, int64_t stride) const {
        for (int first = 0; first < n; first += C * LANES) {
            vf acc[TILE][C] = {};
            product<C>(a, a_stride, rows.data() + first, n, k, acc);
            for (int i = 0; i < TILE; i++)
                for (int c = 0; c < C; c++) store(y + i * stride + first + c * LANES, acc[i][c]);
        }
    }

#if defined(DSLA_AMX)
    void set_pairs(int first, int count, const float* from, int64_t stride) {
        for (int64_t i = 0; i < count; i += 2)
            for (int64_t c = 0; c < n; c += LANES) {
                vf even = load<vf>(from + i * stride + c), odd = load<vf>(from + (i + 1) * stride + c);
                for (int part = 0; part < parts; part++) {
                    const vu e = nearest(even), o = nearest(odd);
                    store(&pairs[(part * (k / 2) + (first + i) / 2) * n + c], e >> 16 | o);
                    even -= as<vf>(e);
                    odd -= as<vf>(o);
                }
            }
    }

    void multiply_tiles(const float* a, int64_t a_stride, int m, float* y, int64_t stride) const {
        thread_local Array<uint16_t> rounded;
        if (int64_t(rounded.size()) < AMX_ROWS * k) rounded.resize(AMX_ROWS * k);
        for (int first = 0; first < m; first += AMX_ROWS) {
            for (int i = 0; i < AMX_ROWS; i++)
                for (int d = 0; d < k; d += LANES) narrow(&rounded[i * k + d], load<vf>(a + (first + i) * a_stride + d));
            for (int c = 0; c < n; c += 2 * LANES)
                for (int part = 0; part < parts; part++)
                    tile_product(rows_factor(rounded.data(), k), pair_rows_factor(&pairs[part * (k / 2) * n + c], n),
                                 k / TILE_INPUTS, part > 0, y + first * stride + c, stride);
        }
    }
#endif
};

}  // namespace dsla
