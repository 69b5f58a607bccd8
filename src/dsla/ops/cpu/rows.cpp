// Small operations on the rows of a step: norm, rotation, gated activation. bfloat16, sums in fp32; rounded to bfloat16 where
// the same steps on tensors round.

#include <cmath>

#include "vec.h"

using namespace dsla;

namespace {

inline float rounded(float x) { return widen(narrow(x)); }

inline vf rounded(vf x) {
    uint16_t y[LANES];
    narrow(y, x);
    return widen(y);
}

}  // namespace

extern "C" {

// y = weight * x / rms(x) of each of n rows [width].
void dsla_rms_norm(int threads, int64_t n, int64_t width, const uint16_t* x, const uint16_t* weight, float eps, uint16_t* y) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 64)
    for (int64_t i = 0; i < n; i++) {
        const uint16_t* row = x + i * width;
        float rest = 0;
        vf squares = {};
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) squares += widen(row + d) * widen(row + d);
        for (; d < width; d++) rest += widen(row[d]) * widen(row[d]);
        const float scale = 1.0f / std::sqrt((rest + sum(squares)) / float(width) + eps);
        for (d = 0; d + LANES <= width; d += LANES)
            narrow(y + i * width + d, widen(weight + d) * rounded(widen(row + d) * scale));
        for (; d < width; d++) y[i * width + d] = narrow(widen(weight[d]) * rounded(widen(row[d]) * scale));
    }
}

// y = silu(gate) * up of n rows [2 * width] that hold the gate first, then up.
void dsla_silu_mul(int threads, int64_t n, int64_t width, const uint16_t* x, uint16_t* y) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 64)
    for (int64_t i = 0; i < n; i++) {
        const uint16_t *gate = x + i * 2 * width, *up = gate + width;
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) {
            const vf g = widen(gate + d);
            // e^-g overflows below -88, where silu is 0.
            narrow(y + i * width + d, rounded(g / (1.0f + exponential(-maximum(g, splat(-87.0f))))) * widen(up + d));
        }
        for (; d < width; d++) {
            const float g = widen(gate[d]);
            y[i * width + d] = narrow(rounded(g / (1.0f + std::exp(-g))) * widen(up[d]));
        }
    }
}

// y [n, heads, dim] = x, rows `x_stride` and `y_stride` elements apart, the first `turned` dims of each head rotated by cos and
// sin [n, turned] of its position; half-split layout. y may be x.
void dsla_rotate(int threads, int64_t n, int64_t heads, int64_t dim, int64_t turned, const uint16_t* x, int64_t x_stride,
                 const uint16_t* cos, const uint16_t* sin, uint16_t* y, int64_t y_stride) {
    const int64_t half = turned / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (n > 64)
    for (int64_t i = 0; i < n; i++) {
        const uint16_t *c = cos + i * turned, *s = sin + i * turned;
        for (int64_t h = 0; h < heads; h++) {
            const uint16_t *first = x + i * x_stride + h * dim, *second = first + half;
            uint16_t *to_first = y + i * y_stride + h * dim, *to_second = to_first + half;
            int64_t d = 0;
            for (; d + LANES <= half; d += LANES) {
                const vf a = widen(first + d), b = widen(second + d);
                narrow(to_first + d, rounded(a * widen(c + d)) + rounded(-b * widen(s + d)));
                narrow(to_second + d, rounded(b * widen(c + half + d)) + rounded(a * widen(s + half + d)));
            }
            for (; d < half; d++) {
                const float a = widen(first[d]), b = widen(second[d]);
                to_first[d] = narrow(rounded(a * widen(c[d])) + rounded(-b * widen(s[d])));
                to_second[d] = narrow(rounded(b * widen(c[half + d])) + rounded(a * widen(s[half + d])));
            }
            if (to_first != first) std::memcpy(to_first + turned, first + turned, (dim - turned) * 2);
        }
    }
}

}  // extern "C"
