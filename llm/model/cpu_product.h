// Products of a few rows with a weight matrix that was packed into panels of columns.
//
// A panel holds NR outputs: for every input its NR weights side by side, in pairs of inputs where the processor
// multiplies pairs of bf16 numbers. A sum runs over the inputs in order, whatever the number of rows.
#pragma once
#include "cpu_team.h"
#include "cpu_vector.h"

constexpr int NR = 4 * VL;               // outputs of a panel
constexpr int MR = VL == 8 ? 2 : 6;      // rows that are multiplied at once: as many sums as there are registers
constexpr int64_t ROWS = 8 * MR;         // rows of one item of work

#ifdef HAS_BF16_DOT
template <class T>
constexpr int PAIR = sizeof(T) == 2 ? 2 : 1;
#else
template <class T>
constexpr int PAIR = 1;
#endif

template <class T>
static inline int64_t padded(int64_t k) { return (k + PAIR<T> - 1) / PAIR<T> * PAIR<T>; }
static inline int64_t panels(int64_t n) { return (n + NR - 1) / NR; }

// Copies rows c < n of `source` (n, k), numbers of type S, into columns at .. at + n of a packed matrix.
template <class T, class S>
static void pack_panel(const S* source, int64_t n, int64_t k, T* packed, int64_t at, int64_t panel) {
    const int64_t depth = padded<T>(k), begin = panel * NR;
    T* out = packed + panel * NR * depth;
    const int64_t first = begin > at ? begin : at, end = begin + NR < at + n ? begin + NR : at + n;
    for (int64_t i = 0; i < k; i += PAIR<T>)
        for (int64_t c = first; c < end; c++)
            for (int j = 0; j < PAIR<T>; j++)
                out[i * NR + (c - begin) * PAIR<T> + j] =
                    i + j < k ? narrow<T>(to_float(source[(c - at) * k + i + j])) : narrow<T>(0.0f);
}

// ---- matrices of whole numbers from -127 to 127, in 8 bits

#if defined(HAS_BF16_DOT) && defined(__AVX512VBMI__)
struct Halves {  // low and high bytes of the bf16 numbers 0 to 127
    uint8_t low[128] = {}, high[128] = {};
    constexpr Halves() {
        for (int m = 1, e = 0; m < 128; m++) {
            e += m >> e > 1;
            const int bits = (127 + e) << 7 | ((m << (7 - e)) & 127);
            low[m] = bits & 255, high[m] = bits >> 8;
        }
    }
};
alignas(64) static constexpr Halves HALVES;
#endif

// Writes n packed whole numbers (a multiple of NR) in 8 bits, as `four` and `load` read them.
static inline void squeeze(const float* from, int64_t n, int8_t* to) {
    for (int64_t i = 0; i < n; i++) to[i] = int8_t(from[i]);
}
static inline void squeeze(const bf16* from, int64_t n, int8_t* to) {
    for (int64_t i = 0; i < n; i++) {
        const int x = int(to_float(from[i]));
#if defined(HAS_BF16_DOT) && defined(__AVX512VBMI__)  // sign and size, where unpacking of bytes finds them
        to[(i & ~63) | (i >> 3 & 3) << 4 | (i >> 5 & 1) << 3 | (i & 7)] = int8_t(x < 0 ? 128 - x : x);
#else
        to[i] = int8_t(x);
#endif
    }
}

#ifdef HAS_BF16_DOT
// Reads four vectors of pairs.
static inline void four(const bf16* p, __m512bh* w) {
    for (int j = 0; j < 4; j++) w[j] = pairs(p + 32 * j);
}
static inline void four(const int8_t* p, __m512bh* w) {
#ifdef __AVX512VBMI__
    const __m512i *low = (const __m512i*)HALVES.low, *high = (const __m512i*)HALVES.high;
    for (int j = 0; j < 4; j += 2, p += 64) {
        const __m512i x = _mm512_loadu_si512(p), l = _mm512_permutex2var_epi8(low[0], x, low[1]);
        __m512i h = _mm512_permutex2var_epi8(high[0], x, high[1]);
        h = _mm512_ternarylogic_epi32(h, x, _mm512_set1_epi8(-128), 0xf8);  // h | (x & sign)
        w[j] = (__m512bh)_mm512_unpacklo_epi8(l, h), w[j + 1] = (__m512bh)_mm512_unpackhi_epi8(l, h);
    }
#else
    for (int j = 0; j < 4; j++, p += 32) w[j] = _mm512_cvtne2ps_pbh((__m512)load(p + 16), (__m512)load(p));
#endif
}
#endif

// sums (M, NR) = a (M, depth) times one panel, whose numbers W are of type T or whole ones of 8 bits
template <int M, class T, class W>
static inline void multiply(const T* a, int64_t stride, const W* panel, int64_t depth, float* sums) {
    vf total[M][4] = {};
#ifdef HAS_BF16_DOT
    if constexpr (sizeof(T) == 2) {
        for (int64_t i = 0; i < depth; i += 2, panel += 2 * NR) {
            __m512bh w[4];
            four(panel, w);
            for (int m = 0; m < M; m++) {
                int32_t pair;
                std::memcpy(&pair, a + m * stride + i, 4);
                const auto x = bits_of<__m512bh>(_mm512_set1_epi32(pair));
                for (int j = 0; j < 4; j++) total[m][j] = (vf)_mm512_dpbf16_ps((__m512)total[m][j], x, w[j]);
            }
        }
    } else
#endif
        for (int64_t i = 0; i < depth; i++, panel += NR) {
            const vf w[4] = {load(panel), load(panel + VL), load(panel + 2 * VL), load(panel + 3 * VL)};
            for (int m = 0; m < M; m++) {
                const vf x = all(to_float(a[m * stride + i]));
                for (int j = 0; j < 4; j++) total[m][j] += x * w[j];
            }
        }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) store(sums + m * NR + j * VL, total[m][j]);
}

template <class T, class W>
static inline void multiply(int rows, const T* a, int64_t stride, const W* panel, int64_t depth, float* sums) {
    switch (rows) {
        case 1: return multiply<1>(a, stride, panel, depth, sums);
        case 2: return multiply<2>(a, stride, panel, depth, sums);
        case 3: return multiply<MR == 2 ? 2 : 3>(a, stride, panel, depth, sums);
        case 4: return multiply<MR == 2 ? 2 : 4>(a, stride, panel, depth, sums);
        case 5: return multiply<MR == 2 ? 2 : 5>(a, stride, panel, depth, sums);
        case 6: return multiply<MR>(a, stride, panel, depth, sums);
    }
}

// A packed matrix of n outputs and k inputs; bias (n,) or null. `weights` holds numbers of the compute type, or with
// scales (n,) whole numbers of 8 bits, of which each stands for itself times the scale of its output.
struct Matrix {
    const void* weights;
    const float *scales, *bias;
    int64_t n, k;
};

// Calls done(row, first output, number of outputs, their values) for all parts of a (rows, stride) times a matrix.
template <class T, class F>
static inline void product(Team& team, const T* a, int64_t rows, int64_t stride, const Matrix& w, F done) {
    const int64_t blocks = (rows + ROWS - 1) / ROWS, depth = padded<T>(w.k);
    team.share(panels(w.n) * blocks, [&](int64_t item) {
        const int64_t panel = item / blocks, first = item % blocks * ROWS, at = panel * NR;
        const int64_t end = first + ROWS < rows ? first + ROWS : rows, width = w.n - at < NR ? w.n - at : NR;
        alignas(64) float sums[MR * NR];
        for (int64_t row = first; row < end; row += MR) {
            const int some = int(end - row < MR ? end - row : MR);
            if (w.scales)
                multiply(some, a + row * stride, stride, static_cast<const int8_t*>(w.weights) + at * depth, depth, sums);
            else
                multiply(some, a + row * stride, stride, static_cast<const T*>(w.weights) + at * depth, depth, sums);
            for (int m = 0; m < some; m++) {
                float* values = sums + m * NR;
                if (w.scales)
                    for (int64_t i = 0; i < width; i++) values[i] *= w.scales[at + i];
                if (w.bias)
                    for (int64_t i = 0; i < width; i++) values[i] += w.bias[at + i];
                done(row + m, at, width, values);
            }
        }
    });
}
