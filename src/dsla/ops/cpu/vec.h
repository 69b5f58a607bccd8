// Sixteen floats at a time, by the compiler's vector extensions: one source for AVX-512, AVX2 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dsla {

constexpr int LANES = 16;

typedef uint16_t vh16 __attribute__((vector_size(32)));

// An array that begins with a cache line: vectors and rows of tiles that cross two of them are read at half the speed.
template <typename T>
struct LineAllocator {
    typedef T value_type;
    static constexpr std::align_val_t LINE{64};

    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
    void deallocate(T* at, size_t) { ::operator delete(at, LINE); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};
template <typename T>
using Array = std::vector<T, LineAllocator<T>>;

// Before loops over arrays of vectors: rolled, they would keep the arrays in memory.
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)

constexpr bool WIDE_REGISTERS = true;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(64)));

// The same bits as another type.
template <typename V, typename W>
inline V as(W x) {
    return (V)x;
}

inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }

// The other half of every 16, 8 and 4 lanes.
inline vf swap_8(vf v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }
inline vf swap_4(vf v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
inline vf swap_2(vf v) { return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }

// Each of the first 16 / S lanes S times.
template <int S>
inline vf repeated(vf v) {
    return __builtin_shufflevector(v, v, 0, 1 / S, 2 / S, 3 / S, 4 / S, 5 / S, 6 / S, 7 / S, 8 / S, 9 / S, 10 / S, 11 / S,
                                   12 / S, 13 / S, 14 / S, 15 / S);
}

// pairs[0] = a0 b0 a1 b1 ... a15 b15, pairs[1] = a16 b16 ... a31 b31.
inline void interleave(vh a, vh b, vu* pairs) {
    pairs[0] = (vu)__builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                           11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
    pairs[1] = (vu)__builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25,
                                           57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}

#else

constexpr bool WIDE_REGISTERS = false;

// Compilers keep vectors that are longer than a register in memory, at several times the cost; two halves they keep in two.
template <typename H, typename S>
struct Halves {
    H low, high;

    S& operator[](int i) { return reinterpret_cast<S*>(this)[i]; }
    S operator[](int i) const { return reinterpret_cast<const S*>(this)[i]; }
    Halves operator-() const { return {-low, -high}; }

#define BOTH(OP)                                                                                        \
    friend Halves operator OP(Halves a, Halves b) { return {a.low OP b.low, a.high OP b.high}; }        \
    friend Halves operator OP(Halves a, S b) { return {a.low OP b, a.high OP b}; }                      \
    friend Halves operator OP(S a, Halves b) { return {a OP b.low, a OP b.high}; }                      \
    Halves& operator OP##=(Halves b) { return *this = *this OP b; }                                     \
    Halves& operator OP##=(S b) { return *this = *this OP b; }
    BOTH(+) BOTH(-) BOTH(*) BOTH(/)
#undef BOTH

    friend Halves operator&(Halves a, S b) { return {a.low & b, a.high & b}; }
    friend Halves operator|(Halves a, S b) { return {a.low | b, a.high | b}; }
    friend Halves operator<<(Halves a, int n) { return {a.low << n, a.high << n}; }
    friend Halves operator>>(Halves a, int n) { return {a.low >> n, a.high >> n}; }
};

typedef float hf __attribute__((vector_size(32)));
typedef int32_t hi __attribute__((vector_size(32)));
typedef uint32_t hu __attribute__((vector_size(32)));

typedef Halves<hf, float> vf;
typedef Halves<hi, int32_t> vi;
typedef Halves<hu, uint32_t> vu;
typedef Halves<vh16, uint16_t> vh;

template <typename V, typename W>
inline V as(W x) {
    return {(decltype(V::low))x.low, (decltype(V::high))x.high};
}

inline vi operator<(vf a, float b) { return {a.low < b, a.high < b}; }
inline vi operator<(vi a, int32_t b) { return {a.low < b, a.high < b}; }
inline vi operator>(vf a, vf b) { return {a.low > b.low, a.high > b.high}; }
inline vi operator>(vi a, int32_t b) { return {a.low > b, a.high > b}; }

inline vf select(vi mask, vf a, vf b) { return {mask.low ? a.low : b.low, mask.high ? a.high : b.high}; }

inline hf swap_4(hf v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3); }
inline hf swap_2(hf v) { return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5); }

inline vf swap_8(vf v) { return {v.high, v.low}; }
inline vf swap_4(vf v) { return {swap_4(v.low), swap_4(v.high)}; }
inline vf swap_2(vf v) { return {swap_2(v.low), swap_2(v.high)}; }

template <int S>
inline vf repeated(vf v) {
    if (S == 1) return v;
    const hf x = v.low;
    return {__builtin_shufflevector(x, x, 0, 1 / S, 2 / S, 3 / S, 4 / S, 5 / S, 6 / S, 7 / S),
            __builtin_shufflevector(x, x, 8 / S % 8, 9 / S % 8, 10 / S % 8, 11 / S % 8, 12 / S % 8, 13 / S % 8, 14 / S % 8,
                                    15 / S % 8)};
}

inline vu interleave(vh16 a, vh16 b) {
    return {(hu)__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            (hu)__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
}

inline void interleave(vh a, vh b, vu* pairs) {
    pairs[0] = interleave(a.low, b.low);
    pairs[1] = interleave(a.high, b.high);
}

#endif

template <typename V>
inline V load(const void* from) {
    V v;
    // Halves one by one: copied as one object, they would pass through memory.
    if constexpr (sizeof(V) == 64 && !WIDE_REGISTERS) {
        std::memcpy(&v.low, from, 32);
        std::memcpy(&v.high, static_cast<const char*>(from) + 32, 32);
    } else {
        std::memcpy(&v, from, sizeof(V));
    }
    return v;
}

template <typename V>
inline void store(void* to, V v) {
    if constexpr (sizeof(V) == 64 && !WIDE_REGISTERS) {
        std::memcpy(to, &v.low, 32);
        std::memcpy(static_cast<char*>(to) + 32, &v.high, 32);
    } else {
        std::memcpy(to, &v, sizeof(V));
    }
}

inline vu splat(uint32_t x) { return vu{} + x; }
inline vf splat(float x) {
    uint32_t bits;  // of a float, 0 + x would not be the same as x
    std::memcpy(&bits, &x, 4);
    return as<vf>(splat(bits));
}

inline float sum(vf v) {
    v += swap_8(v);
    v += swap_4(v);
    v += swap_2(v);
    return v[0] + v[1];
}

inline vf maximum(vf a, vf b) { return select(a > b, a, b); }

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
#if defined(__AVX512F__)
    return as<vf>((vu)_mm512_cvtepu16_epi32(load<__m256i>(from)) << 16);
#elif defined(__AVX2__)
    const vu bits{(hu)_mm256_cvtepu16_epi32(load<__m128i>(from)), (hu)_mm256_cvtepu16_epi32(load<__m128i>(from + LANES / 2))};
    return as<vf>(bits << 16);
#else
    vu bits;
    for (int i = 0; i < LANES; i++) bits[i] = uint32_t(from[i]) << 16;
    return as<vf>(bits);
#endif
}

inline vh16 upper_halves(vu x) {
#if defined(__AVX512F__)
    return (vh16)_mm512_cvtepi32_epi16((__m512i)(x >> 16));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)(x >> 16).low, (__m256i)(x >> 16).high);
    return (vh16)_mm256_permute4x64_epi64(packed, 0xd8);
#else
    vh16 y;
    for (int i = 0; i < LANES; i++) y[i] = uint16_t(x[i] >> 16);
    return y;
#endif
}

inline void narrow(uint16_t* to, vf x) {
#if defined(__AVX512BF16__)
    __m256bh y = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &y, 32);
#else
    const vu bits = as<vu>(x);
    const vu rounded = bits + (bits >> 16 & 1u) + 0x7fffu, quiet = bits | 0x400000u;
    const vi is_nan = as<vi>(bits & 0x7fffffffu) > 0x7f800000;
    store(to, upper_halves(as<vu>(select(is_nan, as<vf>(quiet), as<vf>(rounded)))));
#endif
}

// sum[i] += a[2i] b[2i] + a[2i + 1] b[2i + 1] of 16 pairs of bfloat16.
inline vf dot_pairs(vf sum, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += as<vf>(a << 16) * as<vf>(b << 16);
    return sum + as<vf>(a & 0xffff0000u) * as<vf>(b & 0xffff0000u);
#endif
}

// What rows that are multiplied again and again are kept in: bfloat16 where the processor multiplies pairs of those, else floats.
#if defined(__AVX512BF16__)
typedef uint16_t Element;
inline void put_elements(Element* to, vf x) { narrow(to, x); }
inline void put_row(Element* to, const uint16_t* from, int64_t n) { std::memcpy(to, from, n * 2); }
#else
typedef float Element;
inline void put_elements(Element* to, vf x) { store(to, x); }
inline void put_row(Element* to, const uint16_t* from, int64_t n) {
    for (int64_t d = 0; d < n; d += LANES) store(to + d, widen(from + d));
}
#endif

// 32 bfloat16 as they are multiplied with Elements, and sum += their products with those at x, two to a lane.
#if defined(__AVX512BF16__)
typedef vu Multiplied;
inline Multiplied multiplied(const uint16_t* from) { return load<vu>(from); }
inline vf dot(vf sum, const Element* x, Multiplied w) { return dot_pairs(sum, load<vu>(x), w); }
#else
struct Multiplied {
    vf low, high;
};
inline Multiplied multiplied(const uint16_t* from) { return {widen(from), widen(from + LANES)}; }
inline vf dot(vf sum, const Element* x, Multiplied w) {
    sum += load<vf>(x) * w.low;
    return sum + load<vf>(x + LANES) * w.high;
}
#endif

// sum[i] += x[0] w[2i] + x[1] w[2i + 1] of 16 pairs w of bfloat16.
inline vf dot_pair(vf sum, const Element* x, vu w) {
#if defined(__AVX512BF16__)
    return dot_pairs(sum, splat(load<uint32_t>(x)), w);
#else
    sum += x[0] * as<vf>(w << 16);
    return sum + x[1] * as<vf>(w & 0xffff0000u);
#endif
}

#if defined(__AVX512F__)

// Lane i of row j goes to lane j of row i.
inline void transpose(vu* rows) {
    __m512i a[16], b[16];
    UNROLL
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
    UNROLL
    for (int i = 0; i < 16; i += 4)
        UNROLL
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    // b[4 r + c], 128 bits number l: column 4 l + c of rows 4 r ... 4 r + 3.
    UNROLL
    for (int c = 0; c < 4; c++) {
        const __m512i even_low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd_low = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
        rows[c] = (vu)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
        rows[8 + c] = (vu)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        rows[4 + c] = (vu)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        rows[12 + c] = (vu)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

#endif

// Sums of 16 vectors, lane i from vector i.
inline vf sums(const vf* v) {
#if defined(__AVX512F__)
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
#elif defined(__AVX2__)
    hf total[2];
    for (int half = 0; half < 2; half++) {
        __m256 a[8], b[4];
        for (int i = 0; i < 8; i++) a[i] = (__m256)(v[8 * half + i].low + v[8 * half + i].high);
        for (int i = 0; i < 4; i++) b[i] = _mm256_hadd_ps(a[2 * i], a[2 * i + 1]);
        const __m256 first = _mm256_hadd_ps(b[0], b[1]), second = _mm256_hadd_ps(b[2], b[3]);
        total[half] = (hf)_mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
    }
    return {total[0], total[1]};
#else
    vf total = {};
    for (int i = 0; i < 16; i++) total[i] = sum(v[i]);
    return total;
#endif
}

// e^x, relative error below 2e-7; 0 below -87, x at most 88; what is no number stays none.
inline vf exponential(vf x) {
    const vi vanishes = x < -87.0f;
    x = select(vanishes, splat(-87.0f), x);
    vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, held in the low bits
    const vi n = as<vi>(shifted) - 0x4b400000;
    vf whole = shifted - 12582912.0f;
    vf r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vf y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return select(vanishes, vf{}, y * as<vf>((n + 127) << 23));
}

constexpr float LOG2_E = 1.44269504f;

// 2^x of x up to about 0, for weights that are rounded to bfloat16: relative error below 3e-6; 0 from below -125 on, and what is no
// number stays none.
inline vf power_of_two(vf x) {
#if defined(__AVX512F__)
    const vf whole = (x + 12582912.0f) - 12582912.0f, f = x - whole;
    vf y = splat(9.570101699e-3f);
    y = y * f + 5.591786030e-2f;
    y = y * f + 2.402474483e-1f;
    y = y * f + 6.931218147e-1f;
    y = y * f + 9.999992614e-1f;
    const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
    return (vf)_mm512_maskz_scalef_ps(counts, (__m512)y, (__m512)whole);
#else
    return exponential(x * 0.693147181f);
#endif
}

}  // namespace dsla
