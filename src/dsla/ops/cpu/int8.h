// Products of int4 weights with rows rounded to int8 by groups of 32 inputs: to one int8 an input with AVX2, where that gives four
// times the products of an instruction that fp32 gives, and to two with AVX-512 VNNI, where rows are as good as bfloat16 and still
// are multiplied twice as fast. Sums of a group are exact integers and groups are added in order, so that a row's results are the
// same bits whatever rows are beside it.
#pragma once

#include <cmath>

#include "int4.h"
#include "vec.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

#define DSLA_ROUNDS_ROWS
#define DSLA_VNNI

namespace dsla {

constexpr int INT8_PARTS = 2;  // int8 that an input is rounded to: 256 times the first, and the second
constexpr int INT8_ROWS = 8;   // rows of a tile

// Rounds 32 bfloat16 to 32 first and 32 second int8; of each 8 they come in the order 0 4 1 5 2 6 3 7, in which the nibbles of a
// word lie. `scale` times the whole is the rounded value, `total` is the sum of those; both are NaN where a value is infinite or
// none.
inline void quantize(const uint16_t* x, int8_t* to, float* scale, float* total) {
    constexpr float MOST = 127 * 256;
    const __m512 low = (__m512)widen(x), high = (__m512)widen(x + LANES);
    const __m512 size = _mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high));
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(low), _mm512_set1_ps(INFINITY), _CMP_LT_OQ) &
                             _mm512_cmp_ps_mask(_mm512_abs_ps(high), _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
    const float largest = _mm512_reduce_max_ps(size);
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? MOST / largest : 0.0f);
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)), second = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    *scale = finite == 0xffff ? largest / MOST : NAN;
    *total = *scale * float(_mm512_reduce_add_epi32(_mm512_add_epi32(first, second)));
    const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20, 16,  //
                                           15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i whole = _mm512_permutexvar_epi16(
        order, _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtsepi32_epi16(first)), _mm512_cvtsepi32_epi16(second), 1));
    const __m512i upper = _mm512_srai_epi16(_mm512_add_epi16(whole, _mm512_set1_epi16(128)), 8);
    store(to, _mm512_cvtepi16_epi8(upper));
    store(to + GROUP, _mm512_cvtepi16_epi8(_mm512_sub_epi16(whole, _mm512_slli_epi16(upper, 8))));
}

// y[M][16] = x [M, k] w^T of a panel of 16 outputs; scales and totals [M, k / 32].
template <int M>
void tile_int8(const int8_t* x, const float* scales, const float* totals, const uint32_t* panel, int64_t k, float* y) {
    const int64_t groups = k / GROUP;
    vf sums[M] = {};
    for (int64_t g = 0; g < groups; g++, panel += GROUP_WORDS) {
        __m512i acc[M][INT8_PARTS];
        UNROLL
        for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
        for (int c = 0; c < GROUP_WORDS / LANES; c++) fetch(panel + c * LANES);
        UNROLL
        for (int c = 0; c < 4; c++) {
            const __m512i words = load<__m512i>(panel + c * LANES);
            UNROLL
            for (int i = 0; i < 2; i++) {
                const __m512i weights = _mm512_and_si512(i ? _mm512_srli_epi32(words, 4) : words, _mm512_set1_epi8(15));
                UNROLL
                for (int m = 0; m < M; m++) {
                    const int8_t* four = x + (m * groups + g) * GROUP * INT8_PARTS + c * 8 + i * 4;
                    UNROLL
                    for (int part = 0; part < INT8_PARTS; part++)
                        acc[m][part] = _mm512_dpbusd_epi32(acc[m][part], weights,
                                                           _mm512_set1_epi32(load<int32_t>(four + part * GROUP)));
                }
            }
        }
        const Grid grid(panel + 4 * LANES);
        UNROLL
        for (int m = 0; m < M; m++) {
            const vf whole = (vf)_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(acc[m][0], 8), acc[m][1]));
            sums[m] += grid.scale * scales[m * groups + g] * whole + grid.least * totals[m * groups + g];
        }
    }
    UNROLL
    for (int m = 0; m < M; m++) store(y + m * LANES, sums[m]);
}

}  // namespace dsla

#elif defined(__AVX2__)

#define DSLA_ROUNDS_ROWS

namespace dsla {

constexpr int INT8_PARTS = 1;  // int8 that an input is rounded to
constexpr int INT8_ROWS = 4;   // rows of a tile

inline __m256 widen_8(const uint16_t* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
}

// Rounds 32 bfloat16 to int8; of each 8 they come in the order 0 4 1 5 2 6 3 7, in which the nibbles of a word lie.
// `scale` times them are the rounded values, `total` is the sum of those; both are NaN where a value is infinite or none.
inline void quantize(const uint16_t* x, int8_t* to, float* scale, float* total) {
    __m256 values[4], most = _mm256_setzero_ps(), infinite = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
        values[i] = widen_8(x + 8 * i);
        const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), values[i]);
        most = _mm256_max_ps(most, size);
        infinite = _mm256_or_ps(infinite, _mm256_cmp_ps(size, _mm256_set1_ps(INFINITY), _CMP_NLT_UQ));
    }
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    half = _mm_max_ss(half, _mm_movehdup_ps(half));
    const float largest = _mm_cvtss_f32(half), inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
    __m256i bits[4], sums = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        bits[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i], _mm256_set1_ps(inverse)));
        sums = _mm256_add_epi32(sums, bits[i]);
    }
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(bits[0], bits[1]), _mm256_packs_epi32(bits[2], bits[3]));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i order = _mm256_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,  //
                                           0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    store(to, _mm256_shuffle_epi8(bytes, order));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1));
    *scale = _mm256_movemask_ps(infinite) ? NAN : largest / 127.0f;
    *total = *scale * float(_mm_cvtsi128_si32(sum));
}

// y[M][16] = x [M, k] w^T of a panel of 16 outputs as `linear.cpp` describes it; scales and totals [M, k / 32].
// Sixteen products of at most 15 * 127 fit into int16.
template <int M>
void tile_int8(const int8_t* x, const float* scales, const float* totals, const uint32_t* panel, int64_t k, float* y) {
    const __m256i low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int64_t groups = k / GROUP;
    __m256 sums[M][2] = {};
    for (int64_t g = 0; g < groups; g++, panel += GROUP_WORDS) {
        __m256i acc[M][2];
        UNROLL
        for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
        UNROLL
        for (int c = 0; c < 4; c++) {
            const __m256i words[2] = {load<__m256i>(panel + c * LANES), load<__m256i>(panel + c * LANES + 8)};
            UNROLL
            for (int i = 0; i < 2; i++) {
                __m256i weights[2];
                UNROLL
                for (int h = 0; h < 2; h++)
                    weights[h] = _mm256_and_si256(i ? _mm256_srli_epi32(words[h], 4) : words[h], low_bits);
                UNROLL
                for (int m = 0; m < M; m++) {
                    const __m256i four = _mm256_set1_epi32(load<int32_t>(x + m * k + g * GROUP + c * 8 + i * 4));
                    UNROLL
                    for (int h = 0; h < 2; h++)
                        acc[m][h] = _mm256_add_epi16(acc[m][h], _mm256_maddubs_epi16(weights[h], four));
                }
            }
        }
        const uint16_t* parameters = reinterpret_cast<const uint16_t*>(panel + 4 * LANES);
        UNROLL
        for (int h = 0; h < 2; h++) {
            const __m256 scale = widen_8(parameters + 8 * h), least = widen_8(parameters + LANES + 8 * h);
            UNROLL
            for (int m = 0; m < M; m++) {
                const __m256 whole = _mm256_cvtepi32_ps(_mm256_madd_epi16(acc[m][h], ones));
                const __m256 scaled = scale * _mm256_set1_ps(scales[m * groups + g]);
                sums[m][h] = sums[m][h] + scaled * whole + least * _mm256_set1_ps(totals[m * groups + g]);
            }
        }
    }
    UNROLL
    for (int m = 0; m < M; m++)
        UNROLL
        for (int h = 0; h < 2; h++) store(y + m * LANES + 8 * h, sums[m][h]);
}

}  // namespace dsla

#endif
