// Sixteen floats at a time, by the compiler's vector extensions: one source for AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace dsla {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));

typedef uint16_t vh __attribute__((vector_size(64)));
typedef uint16_t vh16 __attribute__((vector_size(32)));

constexpr int LANES = 16;

template <typename V>
inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}

template <typename V>
inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof(V));
}

inline vf splat(float x) { return vf{} + x; }
inline vu splat(uint32_t x) { return vu{} + x; }

// The other half of every 16, 8 and 4 lanes.
inline vf swap_8(vf v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
inline vf swap_4(vf v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
inline vf swap_2(vf v) { return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }

inline float sum(vf v) {
    v += swap_8(v);
    v += swap_4(v);
    v += swap_2(v);
    return v[0] + v[1];
}

inline vf maximum(vf a, vf b) { return a > b ? a : b; }

inline float maximum(vf v) {
    v = maximum(v, swap_8(v));
    v = maximum(v, swap_4(v));
    v = maximum(v, swap_2(v));
    return v[0] > v[1] ? v[0] : v[1];
}

// bfloat16 is the upper half of a float.
inline float widen(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline uint16_t narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 64);
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline vf widen(const uint16_t* from) {
#if defined(__AVX512BF16__)
    return (vf)((vu)_mm512_cvtepu16_epi32(load<__m256i>(from)) << 16);
#else
    return (vf)(__builtin_convertvector(load<vh16>(from), vu) << 16);
#endif
}

inline vh16 upper_halves(vu x) {
#if defined(__AVX512BF16__)
    return (vh16)_mm512_cvtepi32_epi16((__m512i)(x >> 16));
#else
    return __builtin_convertvector(x >> 16, vh16);
#endif
}

inline void narrow(uint16_t* to, vf x) {
#if defined(__AVX512BF16__)
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &y, 32);
#else
    for (int i = 0; i < LANES; i++) to[i] = narrow(x[i]);
#endif
}

// sum[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1] of 16 pairs of bfloat16.
inline vf dot_pairs(vf sum, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (vf)(a << 16) * (vf)(b << 16);
    return sum + (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
#endif
}

// pairs[0] = a0 b0 a1 b1 ... a15 b15, pairs[1] = a16 b16 ... a31 b31.
inline void interleave(vh a, vh b, vu* pairs) {
    pairs[0] = (vu)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                           11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
    pairs[1] = (vu)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                                           57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}

// Sums of 16 vectors, lane i from vector i.
inline vf sums(const vf* v) {
#if defined(__AVX512BF16__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = (__m512)v[i];
    for (int i = 0; i < 8; i++)
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        a[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    for (int i = 0; i < 2; i++)
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
    return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(b[0], b[1], 0x88), _mm512_shuffle_f32x4(b[0], b[1], 0xdd));
#else
    vf total = {};
    for (int i = 0; i < 16; i++) total[i] = sum(v[i]);
    return total;
#endif
}

// e^x, relative error below 2e-7; 0 below -87, x at most 88.
inline vf exponential(vf x) {
    vi vanishes = x < -87.0f;
    x = maximum(x, splat(-87.0f));
    vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, held in the low bits
    vi n = (vi)shifted - 0x4b400000;
    vf whole = shifted - 12582912.0f;
    vf r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return vanishes ? vf{} : y * (vf)((n + 127) << 23);
}

}  // namespace dsla
