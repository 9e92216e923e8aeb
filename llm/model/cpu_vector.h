// Vectors of floats and bf16 numbers for the kernels of this folder: AVX-512, AVX2 or whatever the compiler knows.
//
// Nothing here depends on how many rows are computed together: every sum runs in one fixed order.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;  // floats in a vector
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));
typedef int8_t vb __attribute__((vector_size(VL)));

struct bf16 {
    uint16_t bits;
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define HAS_BF16_DOT 1
#endif

template <class V, class P>
static inline V bits_of(P p) {
    static_assert(sizeof(V) == sizeof(P), "equal sizes");
    V v;
    std::memcpy(&v, &p, sizeof v);
    return v;
}

// ---- single numbers

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return bits_of<float>(uint32_t(x.bits) << 16); }

template <class T>
static inline T narrow(float x);
template <>
inline float narrow<float>(float x) { return x; }
template <>
inline bf16 narrow<bf16>(float x) {  // to the nearest, ties to even
    uint32_t u = bits_of<uint32_t>(x);
    return x != x ? bf16{0x7fc0} : bf16{uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <class T>
static inline float rounded(float x) { return to_float(narrow<T>(x)); }

// ---- vectors

static inline vf all(float x) { return x - vf{}; }

static inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline vf load(const bf16* p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}
static inline vf load(const int8_t* p) {
    vb b;
    std::memcpy(&b, p, sizeof b);
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)b));
#else
    return __builtin_convertvector(b, vf);
#endif
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline void store(bf16* p, vf v) {
#ifdef HAS_BF16_DOT
    auto h = _mm512_cvtneps_pbh((__m512)v);
#else
    vu u = (vu)v, r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vh h = __builtin_convertvector(v != v ? vu{} + 0x7fc0 : r, vh);
#endif
    std::memcpy(p, &h, sizeof h);
}
template <class T>
static inline vf rounded(vf v) {
    if constexpr (sizeof(T) == 4) return v;
    bf16 h[VL];
    store(h, v);
    return load(h);
}

static inline float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < VL; i++) total += v[i];
    return total;
#endif
}
static inline float largest(vf v) {
    float m = v[0];
    for (int i = 1; i < VL; i++) m = v[i] > m ? v[i] : m;
    return m;
}

// e^x to 2 units in the last place; below -87 it stays at 1e-38, above 88 at 1e38. NaN stays NaN.
static inline vf exp(vf x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 88.0f ? all(88.0f) : x;
    const vf magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    vf t = x * 1.44269504f + magic, n = t - magic;
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vf)((vi)p + ((vi)t << 23));
}
static inline float exp1(float x) { return exp(all(x))[0]; }
static inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
static inline vf tanh(vf x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

// Calls f(i, vector width or 1) over n elements: whole vectors, then what is left by copies of a padded vector.
// `in` reads, `out` writes; both are arrays of float or bf16.
template <class T, class F>
static inline void each(T* out, int64_t n, F f) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(out + i, f([i](auto* p) { return load(p + i); }));
    if (i < n) {
        const int64_t left = n - i;
        T last[VL];
        store(last, f([i, left](auto* p) {
                  vf v{};
                  for (int64_t j = 0; j < left; j++) v[j] = to_float(p[i + j]);
                  return v;
              }));
        std::memcpy(out + i, last, left * sizeof(T));
    }
}


template <class A, class B>
static inline float dot(const A* a, const B* b, int64_t n) {
    vf total{};
    int64_t i = 0;
    for (; i + VL <= n; i += VL) total += load(a + i) * load(b + i);
    float result = sum(total);
    for (; i < n; i++) result += to_float(a[i]) * to_float(b[i]);
    return result;
}
#ifdef HAS_BF16_DOT
static inline __m512bh pairs(const bf16* p) {
    __m512bh v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <>
inline float dot<bf16, bf16>(const bf16* a, const bf16* b, int64_t n) {
    __m512 total = _mm512_setzero_ps();
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) total = _mm512_dpbf16_ps(total, pairs(a + i), pairs(b + i));
    float result = _mm512_reduce_add_ps(total);
    for (; i < n; i++) result += to_float(a[i]) * to_float(b[i]);
    return result;
}
#endif
