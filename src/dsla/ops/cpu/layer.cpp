// What a decoder layer does before attention, after it, and in its MLP, each in one call: at a row or two, calls one by one take
// as long as they compute. All is rounded wherever the same steps one by one round.

#include "vec.h"

using namespace dsla;

extern "C" {

void dsla_rms_norm(int threads, int64_t n, int64_t width, const uint16_t* x, const uint16_t* weight, float eps, uint16_t* y);
void dsla_silu_mul(int threads, int64_t n, int64_t width, const uint16_t* x, uint16_t* y);
void dsla_rotate(int threads, int64_t n, int64_t heads, int64_t dim, int64_t turned, const uint16_t* x, int64_t x_stride,
                 const uint16_t* cos, const uint16_t* sin, uint16_t* y, int64_t y_stride);
void dsla_linear(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint32_t* w, const uint16_t* bias,
                 uint16_t* y);
void dsla_linear_int4(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint32_t* w,
                      const uint16_t* bias, uint16_t* y);
}

namespace {

// A weight in panels of int4 or else bfloat16, and its bias or null.
struct Weight {
    int int4;
    const uint32_t* panels;
    const uint16_t* bias;

    void multiply(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, uint16_t* y) const {
        (int4 ? dsla_linear_int4 : dsla_linear)(threads, n, k, n_out, x, panels, bias, y);
    }
};

// y += x of n rows [width], those of y `stride` apart
void add_rows(int threads, int64_t n, int64_t width, const uint16_t* x, uint16_t* y, int64_t stride) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 64)
    for (int64_t i = 0; i < n; i++) {
        const uint16_t* from = x + i * width;
        uint16_t* to = y + i * stride;
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) narrow(to + d, widen(to + d) + widen(from + d));
        for (; d < width; d++) to[d] = narrow(widen(to[d]) + widen(from[d]));
    }
}

}  // namespace

extern "C" {

// y += up(down(x)) of n rows: x [k] and y [n_out], rows of y `stride` apart; weights in panels of bfloat16, the first with `rank`
// outputs.
void dsla_add_low_rank(int threads, int64_t n, int64_t k, int64_t rank, int64_t n_out, const uint16_t* x, const uint32_t* down,
                       const uint32_t* up, uint16_t* y, int64_t stride) {
    constexpr int64_t FEW = 4;  // rows that are not worth a second thread
    if (n <= FEW) threads = 1;
    Array<uint16_t> inner(n * rank), added(n * n_out);
    dsla_linear(threads, n, k, rank, x, down, nullptr, inner.data());
    dsla_linear(threads, n, rank, n_out, inner.data(), up, nullptr, added.data());
    add_rows(threads, n, n_out, added.data(), y, stride);
}

// Queries, keys and values of n rows x [width]: `normed` [n, width] = norm(x), and y [n, heads + 2 * groups, dim] its product with
// `w`, queries and keys rotated. To the queries of `count` rows from row `first` on a low-rank delta is added before that.
void dsla_project(int threads, int64_t n, int64_t width, int64_t heads, int64_t groups, int64_t dim, int64_t turned,
                  const uint16_t* x, const uint16_t* norm, float eps, int int4, const uint32_t* w, const uint16_t* bias,
                  const uint16_t* cos, const uint16_t* sin, int64_t first, int64_t count, int64_t rank, const uint32_t* down,
                  const uint32_t* up, uint16_t* normed, uint16_t* y) {
    const int64_t wide = (heads + 2 * groups) * dim;
    dsla_rms_norm(threads, n, width, x, norm, eps, normed);
    Weight{int4, w, bias}.multiply(threads, n, width, wide, normed, y);
    if (count)
        dsla_add_low_rank(threads, count, width, rank, heads * dim, normed + first * width, down, up, y + first * wide, wide);
    dsla_rotate(threads, n, heads + groups, dim, turned, y, wide, cos, sin, y, wide);
}

// y = x + (w attended + a low-rank delta on `count` rows from row `first` on), of n rows x [width] and attended [k].
void dsla_add_attended(int threads, int64_t n, int64_t k, int64_t width, const uint16_t* x, const uint16_t* attended, int int4,
                       const uint32_t* w, const uint16_t* bias, int64_t first, int64_t count, int64_t rank,
                       const uint32_t* down, const uint32_t* up, uint16_t* y) {
    Weight{int4, w, bias}.multiply(threads, n, k, width, attended, y);
    if (count) dsla_add_low_rank(threads, count, k, rank, width, attended + first * k, down, up, y + first * width, width);
    add_rows(threads, n, width, x, y, width);
}

// y = x + down(silu(gate) * up) of n rows [width], where up(norm(x)) [2 * inner] holds the gate first, then up.
void dsla_add_swiglu(int threads, int64_t n, int64_t width, int64_t inner, const uint16_t* x, const uint16_t* norm, float eps,
                     int int4, const uint32_t* up, const uint32_t* down, uint16_t* y) {
    Array<uint16_t> rows(n * width), wide(n * 2 * inner), gated(n * inner);
    dsla_rms_norm(threads, n, width, x, norm, eps, rows.data());
    Weight{int4, up, nullptr}.multiply(threads, n, width, 2 * inner, rows.data(), wide.data());
    dsla_silu_mul(threads, n, inner, wide.data(), gated.data());
    Weight{int4, down, nullptr}.multiply(threads, n, inner, width, gated.data(), y);
    add_rows(threads, n, width, x, y, width);
}

}  // extern "C"
