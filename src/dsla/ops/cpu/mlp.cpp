// What follows attention in a decoder layer, in one call: at a row or two, calls one by one take as long as they compute.

#include "vec.h"

using namespace dsla;

extern "C" {

void dsla_rms_norm(int threads, int64_t n, int64_t width, const uint16_t* x, const uint16_t* weight, float eps, uint16_t* y);
void dsla_silu_mul(int threads, int64_t n, int64_t width, const uint16_t* x, uint16_t* y);
void dsla_linear(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint32_t* w, const uint16_t* bias,
                 uint16_t* y);
void dsla_linear_int4(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint32_t* w,
                      const uint16_t* bias, uint16_t* y);

// y = x + down(silu(gate) * up) of n rows [width], where up(norm(x)) [2 * inner] holds the gate first, then up; weights in panels
// of int4 or else bfloat16. Rounded wherever the same steps one by one round.
void dsla_add_swiglu(int threads, int64_t n, int64_t width, int64_t inner, const uint16_t* x, const uint16_t* norm, float eps,
                     int int4, const uint32_t* up, const uint32_t* down, uint16_t* y) {
    const auto linear = int4 ? dsla_linear_int4 : dsla_linear;
    Array<uint16_t> rows(n * width), wide(n * 2 * inner), gated(n * inner);
    dsla_rms_norm(threads, n, width, x, norm, eps, rows.data());
    linear(threads, n, width, 2 * inner, rows.data(), up, nullptr, wide.data());
    dsla_silu_mul(threads, n, inner, wide.data(), gated.data());
    linear(threads, n, inner, width, gated.data(), down, nullptr, rows.data());
    const int64_t size = n * width, whole = size / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 64)
    for (int64_t i = 0; i < whole; i += LANES) narrow(y + i, widen(x + i) + widen(&rows[i]));
    for (int64_t i = whole; i < size; i++) y[i] = narrow(widen(x[i]) + widen(rows[i]));
}

}  // extern "C"
