// A low-rank delta, added in place: as many calls as it has steps would take longer than they compute.

#include "vec.h"

using namespace dsla;

extern "C" {

void dsla_linear(int threads, int64_t n, int64_t k, int64_t n_out, const uint16_t* x, const uint32_t* w, const uint16_t* bias,
                 uint16_t* y);

// y += up(down(x)) of n rows: x [k] and y [n_out] bfloat16, rows of y `stride` apart; weights in panels of bfloat16, the first
// with `rank` outputs. Rounded wherever the same steps one by one round.
void dsla_add_low_rank(int threads, int64_t n, int64_t k, int64_t rank, int64_t n_out, const uint16_t* x, const uint32_t* down,
                       const uint32_t* up, uint16_t* y, int64_t stride) {
    constexpr int64_t FEW = 4;  // rows that are not worth a second thread
    if (n <= FEW) threads = 1;
    Array<uint16_t> inner(n * rank), added(n * n_out);
    dsla_linear(threads, n, k, rank, x, down, nullptr, inner.data());
    dsla_linear(threads, n, rank, n_out, inner.data(), up, nullptr, added.data());
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 64)
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < n_out; c += LANES)
            narrow(y + i * stride + c, widen(y + i * stride + c) + widen(&added[i * n_out + c]));
}

}  // extern "C"
