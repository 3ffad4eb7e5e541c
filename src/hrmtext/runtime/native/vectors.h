// Vectors of the processor's width, and what is computed on them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16, TILE_ROWS = 12;
#else
constexpr int LANES = 8, TILE_ROWS = 6;  // of 16 registers, 12 hold sums
#endif
#if defined(__AVX512BF16__)
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
static inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
static inline Vec spread(float x) { return x - Vec{}; }

// Keep a vector in a register: with few rows compilers load it anew for every product it is in.
static inline void keep(Vec& v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__AVX__)
    __asm__("" : "+x"(v));
#else
    (void)v;
#endif
}

// What products multiply: a kind of numbers in memory, LANES of them or more in a register.
template <class T>
struct Factor;

template <>
struct Factor<float> {
    typedef Vec Many;
    static Vec load(const float* p) { return ::load(p); }
    static Vec spread(float x) { return ::spread(x); }
    static void add(Vec& sum, Vec value, Vec weight) { sum += value * weight; }
};

// Numbers as `crossed_product` copies them.
template <class E>
struct Copy {
    typedef E Type;
};

// Writes a vector in the format of a product's inputs, and reads it.
static inline void put(float* p, Vec v) { store(p, v); }
static inline void put(float* p, Vec left, Vec right) { store(p, left), store(p + LANES, right); }
static inline Vec get(const float* p) { return load(p); }

typedef uint16_t Bf16;  // its bits

#if defined(__AVX512BF16__)
typedef uint32_t Pair;  // of bf16 numbers, which are multiplied and added

static inline void keep(__m512bh& v) { __asm__("" : "+v"(v)); }

template <>
struct Factor<Pair> {
    typedef __m512bh Many;
    static Many load(const Pair* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Many spread(Pair x) { return (__m512bh)_mm512_set1_epi32(int(x)); }
    static void add(Vec& sum, Many value, Many weight) {
        sum = (Vec)_mm512_dpbf16_ps((__m512)sum, weight, value);
    }
};
template <>
struct Copy<Bf16> {
    typedef Pair Type;
};

static inline void put(Bf16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
static inline void put(Bf16* p, Vec left, Vec right) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)right, (__m512)left));
}
// Two halves of LANES numbers as pairs of one of each.
static inline __m512i interleave(__m512i halves) {
    const __m512i ascending = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(ascending, _mm512_set1_epi32(LANES)), 16);
    return _mm512_permutexvar_epi16(_mm512_or_si512(ascending, high), halves);
}
static inline Vec get(const Bf16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
#endif

static inline float sum(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)  // a tree: short chains, vectorised
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
#endif
}

static inline float largest(Vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    return part[0];
#endif
}

// exp to about 1 ulp: 2^n times a polynomial of the rest, within +-ln(2)/2. At most that of 88.
static inline Vec exp_of(Vec x) {
    const Vec low = spread(-87.0f), high = spread(88.0f), log2_e = spread(1.44269504088896341f);
#if defined(__AVX512F__)
    x = (Vec)_mm512_max_ps((__m512)low, _mm512_min_ps((__m512)high, (__m512)x));  // NaN stays NaN
    const Vec n = (Vec)_mm512_roundscale_ps((__m512)(x * log2_e), 0);
#else
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec magic = spread(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
    const Vec n = (x * log2_e + magic) - magic;
#endif
    Vec r = x - n * spread(0.693359375f);
    r = r - n * spread(-2.12194440e-4f);
    Vec p = spread(1.9875691500e-4f);
    p = p * r + spread(1.3981999507e-3f);
    p = p * r + spread(8.3334519073e-3f);
    p = p * r + spread(4.1665795894e-2f);
    p = p * r + spread(1.6666665459e-1f);
    p = p * r + spread(5.0000001201e-1f);
    p = p * r * r + r + spread(1.0f);
#if defined(__AVX512F__)
    return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &power, sizeof(scale));
    return p * scale;
#endif
}

static inline Vec sigmoid(Vec x) {
    const Vec one = spread(1.0f), d = one + exp_of(-x);
#if defined(__AVX512F__)
    const Vec near = (Vec)_mm512_rcp14_ps((__m512)d);  // a division costs as much as all of exp
    return near + near * (one - d * near);
#else
    return one / d;
#endif
}

#if defined(__AVX512F__)
// 16 rows of 16 as columns: in pairs of numbers, of pairs, and of quarters of a register.
static inline void transpose(__m512 (&row)[16]) {
    __m512 mixed[16];
    for (int i = 0; i < 16; i += 2) {
        mixed[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
        mixed[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int half = 0; half < 2; ++half) {
            const __m512d a = _mm512_castps_pd(mixed[i + half]), b = _mm512_castps_pd(mixed[i + half + 2]);
            row[i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            row[i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int i = 0; i < 4; ++i) {  // quarter q of row[4g + i] is column 4q + i of rows 4g to 4g + 3
        const __m512 even = _mm512_shuffle_f32x4(row[i], row[4 + i], 0x88);
        const __m512 odd = _mm512_shuffle_f32x4(row[i], row[4 + i], 0xdd);
        const __m512 even_too = _mm512_shuffle_f32x4(row[8 + i], row[12 + i], 0x88);
        const __m512 odd_too = _mm512_shuffle_f32x4(row[8 + i], row[12 + i], 0xdd);
        row[i] = _mm512_shuffle_f32x4(even, even_too, 0x88);
        row[4 + i] = _mm512_shuffle_f32x4(odd, odd_too, 0x88);
        row[8 + i] = _mm512_shuffle_f32x4(even, even_too, 0xdd);
        row[12 + i] = _mm512_shuffle_f32x4(odd, odd_too, 0xdd);
    }
}
#endif

// Sigmoid in the format of a product's inputs. What is rounded to bf16 needs less than fp32 has: this
// is off by at most 7e-5 of its value, and rounding by 2e-3.
static inline Vec sigmoid_as(float, Vec x) { return sigmoid(x); }
#if defined(__AVX512BF16__)
static inline Vec sigmoid_as(Bf16, Vec x) {
    const Vec y = x * spread(-1.44269504088896341f);
    const Vec n = (Vec)_mm512_roundscale_ps((__m512)y, 0), r = y - n;
    Vec p = spread(9.5701e-3f);  // 2^r within +-1/2, off by 3e-6
    p = p * r + spread(5.591786e-2f);
    p = p * r + spread(0.24024745f);
    p = p * r + spread(0.69312181f);
    p = p * r + spread(0.99999926f);
    return (Vec)_mm512_rcp14_ps(_mm512_scalef_ps((__m512)p, (__m512)n) + (__m512)spread(1.0f));
}
#endif

// Rows of LANES numbers, `stride` apart, as columns: to[k * LANES + l] = from[l * stride + k]. Rows from
// `count` on are zeros.
static inline void transpose(const float* from, int64_t stride, int64_t count, float* to) {
#if defined(__AVX512F__)
    __m512 row[16];
    for (int l = 0; l < 16; ++l) row[l] = l < count ? (__m512)load(from + l * stride) : _mm512_setzero_ps();
    transpose(row);
    for (int k = 0; k < 16; ++k) store(to + k * 16, (Vec)row[k]);
#else
    for (int k = 0; k < LANES; ++k)
        for (int l = 0; l < LANES; ++l) to[k * LANES + l] = l < count ? from[l * stride + k] : 0.0f;
#endif
}

static inline uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);  // NaN stays NaN
    return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Calls work with a number of the products' format: of bf16, where that is asked for, or of fp32.
template <class Work>
void in_format([[maybe_unused]] bool bf16, const Work& work) {
#if defined(__AVX512BF16__)
    if (bf16) return work(Bf16{});
#endif
    work(float{});
}
