// Causal attention in bf16, forward and backward, one row's head at a time; scores never leave the cache.
//
// Every product is one of a few rows with a panel of 64 columns, whose pairs of numbers along the sum lie side by side:
// the processor multiplies such pairs. Sums are fp32. A query sees the keys from `low` on, up to itself.
#include "cpu_team.h"
#include "cpu_vector.h"

#ifdef HAS_BF16_DOT
#include <algorithm>
#include <limits>

constexpr int64_t NR = 64;       // columns of a panel, and queries or keys of a tile
constexpr int64_t CHUNK = 256;   // keys that the forward pass takes at a time
constexpr int MR = 6;            // rows of a product: as many sums as there are registers

struct Shape {
    int64_t rows, length, heads, dim;  // of (rows, length, heads, dim)
    int64_t window;                    // positions that are seen before one's own; -1 = all
    float scale;

    int64_t stride() const { return heads * dim; }
    int64_t padded() const { return (length + NR - 1) / NR * NR; }
    int64_t head(int64_t item) const { return item / heads * length * stride() + item % heads * dim; }
};

template <class T>
struct Room {  // memory of a thread that grows and is kept
    std::vector<T> held;
    T* get(int64_t n) {
        if (int64_t(held.size()) < n + 32) held.resize(n + 32);
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(held.data()) + 63) / 64 * 64);
    }
};

// c (M, 64) = or += a (M, depth) times a panel
template <int M, bool ADDS>
static inline void multiply(const bf16* a, int64_t stride, const bf16* panel, int64_t depth, float* c, int64_t width) {
    __m512 total[M][4];
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) total[m][j] = ADDS ? _mm512_loadu_ps(c + m * width + 16 * j) : _mm512_setzero_ps();
    for (int64_t i = 0; i < depth; i += 2, panel += 2 * NR) {
        const __m512bh w[4] = {pairs(panel), pairs(panel + 32), pairs(panel + 64), pairs(panel + 96)};
        for (int m = 0; m < M; m++) {
            int32_t pair;
            std::memcpy(&pair, a + m * stride + i, 4);
            const auto x = bits_of<__m512bh>(_mm512_set1_epi32(pair));
            for (int j = 0; j < 4; j++) total[m][j] = _mm512_dpbf16_ps(total[m][j], x, w[j]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int j = 0; j < 4; j++) _mm512_storeu_ps(c + m * width + 16 * j, total[m][j]);
}

template <bool ADDS>
static void multiply(int64_t rows, const bf16* a, int64_t stride, const bf16* panel, int64_t depth, float* c,
                     int64_t width) {
    for (; rows >= MR; rows -= MR, a += MR * stride, c += MR * width)
        multiply<MR, ADDS>(a, stride, panel, depth, c, width);
    switch (rows) {
        case 1: return multiply<1, ADDS>(a, stride, panel, depth, c, width);
        case 2: return multiply<2, ADDS>(a, stride, panel, depth, c, width);
        case 3: return multiply<3, ADDS>(a, stride, panel, depth, c, width);
        case 4: return multiply<4, ADDS>(a, stride, panel, depth, c, width);
        case 5: return multiply<5, ADDS>(a, stride, panel, depth, c, width);
    }
}

// Turns 16 rows of 16 numbers of 4 bytes into their columns.
static inline void transpose(__m512i* r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // then lane l of r[i + c] is column 4 l + c of the rows i .. i + 3
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        __m512i even[2], odd[2];
        for (int half = 0; half < 2; half++) {
            even[half] = _mm512_shuffle_i32x4(r[8 * half + c], r[8 * half + 4 + c], 0x88);
            odd[half] = _mm512_shuffle_i32x4(r[8 * half + c], r[8 * half + 4 + c], 0xdd);
        }
        t[c] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        t[12 + c] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Reads 16 positions of 32 channels and turns them into 16 pairs of channels of 16 positions; zeros behind the last.
static inline void turned_pairs(const Shape& s, const bf16* x, int64_t t, int64_t channel, __m512i* r) {
    for (int64_t i = 0; i < 16; i++)
        r[i] = t + i < s.length ? _mm512_loadu_si512(x + (t + i) * s.stride() + channel) : _mm512_setzero_si512();
    transpose(r);
}

// Panels of 64 positions of x, for sums over the channels: (panel, dim / 2, 64, 2).
static void pack_channels(const Shape& s, const bf16* x, bf16* out) {
    for (int64_t t = 0; t < s.padded(); t += 16)
        for (int64_t channel = 0; channel < s.dim; channel += 32) {
            __m512i r[16];
            turned_pairs(s, x, t, channel, r);
            bf16* to = out + t / NR * NR * s.dim + channel * NR + t % NR * 2;
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * 2 * NR, r[i]);
        }
}

// Rows of channels of x: (dim, positions).
static void turn(const Shape& s, const bf16* x, bf16* out) {
    alignas(64) uint16_t numbers[32];
    for (int i = 0; i < 32; i++) numbers[i] = uint16_t(2 * i);
    const __m512i even = _mm512_load_si512(numbers), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int64_t t = 0; t < s.padded(); t += 32)
        for (int64_t channel = 0; channel < s.dim; channel += 32) {
            __m512i low[16], high[16];
            turned_pairs(s, x, t, channel, low);
            turned_pairs(s, x, t + 16, channel, high);
            for (int i = 0; i < 16; i++) {
                bf16* to = out + (channel + 2 * i) * s.padded() + t;
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(low[i], even, high[i]));
                _mm512_storeu_si512(to + s.padded(), _mm512_permutex2var_epi16(low[i], odd, high[i]));
            }
        }
}

// Interleaves 32 numbers of two rows: out (32, 2)
static inline void interleave(const void* first, const void* second, bf16* out) {
    alignas(64) static constexpr uint16_t LOW[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi16(a, high, b));
}

// Panels of 64 channels of x, for sums over the positions: (dim / 64, positions / 2, 64, 2). Zeros behind the last.
static void pack_positions(const Shape& s, const bf16* x, bf16* out) {
    alignas(64) static const bf16 zeros[32] = {};
    for (int64_t t = 0; t < s.padded(); t += 2)
        for (int64_t c = 0; c < s.dim; c += 32)
            interleave(t < s.length ? x + t * s.stride() + c : zeros,
                       t + 1 < s.length ? x + (t + 1) * s.stride() + c : zeros,
                       out + c / NR * NR * s.padded() + t * NR + c % NR * 2);
}

// The first key that each query sees, for the queries of one row; behind the last query: none.
static void lowest_keys(const Shape& s, const int64_t* documents, int32_t* low) {
    int64_t begin = 0;
    for (int64_t t = 0; t < s.padded(); t++) {
        if (documents && t && t < s.length && documents[t] != documents[t - 1]) begin = t;
        const int64_t reach = s.window < 0 ? 0 : t - s.window;
        low[t] = int32_t(t < s.length ? std::max(begin, reach) : std::numeric_limits<int32_t>::max());
    }
}

static const int64_t* of_row(const Shape& s, const int64_t* documents, int64_t item) {
    return documents ? documents + item / s.heads * s.length : nullptr;
}

static inline vi lanes() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// ---- forward

struct Forward {
    Room<bf16> keys, values, p;
    Room<float> scores, sums;
    Room<int32_t> low;
};

// Turns a query's scores (width) of the keys first .. last, at the others anything, into weights p, 0 at the others.
// Raises `most` to the largest of its scaled scores and adds to `total`; returns the factor by which older sums shrink.
static float weigh(float* scores, bf16* p, int64_t width, int64_t first, int64_t last, float scale, float& most,
                   float& total) {
    if (first > last) {
        std::memset(p, 0, width * sizeof(bf16));
        return 1.0f;
    }
    constexpr float NONE = -std::numeric_limits<float>::infinity();
    const int64_t from = first / VL * VL, to = last / VL * VL + VL;
    std::fill(scores + from, scores + first, NONE);
    std::fill(scores + last + 1, scores + to, NONE);
    vf highest = load(scores + from);
    for (int64_t i = from + VL; i < to; i += VL) {
        const vf v = load(scores + i);
        highest = v > highest || v != v ? v : highest;
    }
    const float before = most;
    for (int j = 0; j < VL; j++) {
        const float score = highest[j] * scale;
        most = score > most || score != score ? score : most;
    }
    vf sums{};
    for (int64_t i = from; i < to; i += VL) {
        const vf e = exp(load(scores + i) * scale - most);
        sums += e;
        store(p + i, e);
    }
    std::memset(p, 0, first * sizeof(bf16));
    std::memset(p + last + 1, 0, (width - last - 1) * sizeof(bf16));
    const float shrink = before == NONE ? 0.0f : exp1(before - most);
    total = total * shrink + sum(sums);
    return shrink;
}

static void forward_head(const Shape& s, const bf16* q, const bf16* k, const bf16* v, const int64_t* documents,
                         bf16* out, float* logs) {
    static thread_local Forward room;
    const int64_t length = s.padded(), panels = s.dim / NR;
    bf16 *keys = room.keys.get(length * s.dim), *values = room.values.get(length * s.dim), *p = room.p.get(NR * CHUNK);
    float *scores = room.scores.get(NR * CHUNK), *sums = room.sums.get(NR * s.dim);
    int32_t* low = room.low.get(length);
    pack_channels(s, k, keys);
    pack_positions(s, v, values);
    lowest_keys(s, documents, low);
    for (int64_t begin = 0; begin < s.length; begin += NR) {
        const int64_t n = std::min(NR, s.length - begin);
        float most[NR], total[NR] = {};
        std::fill(most, most + NR, -std::numeric_limits<float>::infinity());
        std::memset(sums, 0, NR * s.dim * sizeof(float));
        for (int64_t key = low[begin] / NR * NR; key < begin + n; key += CHUNK) {  // the first query sees farthest back
            const int64_t width = std::min(CHUNK, begin + NR - key);
            for (int64_t at = 0; at < width; at += NR)
                multiply<false>(n, q + begin * s.stride(), s.stride(), keys + (key + at) * s.dim, s.dim, scores + at,
                                CHUNK);
            for (int64_t i = 0; i < n; i++) {
                const int64_t first = std::max<int64_t>(low[begin + i] - key, 0);
                const int64_t last = std::min(width - 1, begin + i - key);
                float* sum = sums + i * s.dim;
                const float shrink =
                    weigh(scores + i * CHUNK, p + i * CHUNK, width, first, last, s.scale, most[i], total[i]);
                if (shrink != 1.0f) each(sum, s.dim, [=](auto get) { return get(sum) * shrink; });
            }
            for (int64_t panel = 0; panel < panels; panel++)
                multiply<true>(n, p, CHUNK, values + panel * NR * length + key * NR, width, sums + panel * NR, s.dim);
        }
        for (int64_t i = 0; i < n; i++) {
            const float share = 1.0f / total[i];
            const float* sum = sums + i * s.dim;
            each(out + (begin + i) * s.stride(), s.dim, [=](auto get) { return get(sum) * share; });
            logs[begin + i] = most[i] + std::log(total[i]);
        }
    }
}

// ---- backward

struct Backward {
    Room<bf16> queries, queries_by_position, grads, grads_by_position, keys_turned, p, ds, ds_panel;
    Room<float> scores, dp, dk, dv, dq, delta;
    Room<int32_t> low;
};

// Fills p and ds (64, 64) of a tile whose rows are the keys from `key` on, its columns the queries from `begin` on.
static void slopes(const Shape& s, const float* scores, const float* dp, int64_t key, int64_t begin, const int32_t* low,
                   const float* logs, const float* delta, bf16* p, bf16* ds) {
    const bool is_whole = key + NR - 1 <= begin && low[begin + NR - 1] <= key && begin + NR <= s.length;
    for (int64_t r = 0; r < NR; r++)
        for (int64_t c = 0; c < NR; c += VL) {
            const int64_t at = r * NR + c, query = begin + c;
            vf e = exp(load(scores + at) * s.scale - load(logs + query));
            if (!is_whole) {
                vi lowest;
                std::memcpy(&lowest, low + query, sizeof lowest);
                e = lowest <= int32_t(key + r) && lanes() + int32_t(query) >= int32_t(key + r) ? e : vf{};
            }
            store(p + at, e);
            e = e * (load(dp + at) - load(delta + query)) * s.scale;
            store(ds + at, e);
        }
}

static void backward_head(const Shape& s, const bf16* grad, const bf16* q, const bf16* k, const bf16* v,
                          const bf16* out, const float* logs_of_head, const int64_t* documents, bf16* dq, bf16* dk,
                          bf16* dv) {
    static thread_local Backward room;
    const int64_t length = s.padded(), panels = s.dim / NR, numbers = length * s.dim, stride = s.stride();
    bf16 *queries = room.queries.get(numbers), *by_query = room.queries_by_position.get(numbers);
    bf16 *grads = room.grads.get(numbers), *by_grad = room.grads_by_position.get(numbers);
    bf16 *turned = room.keys_turned.get(numbers), *p = room.p.get(NR * NR), *ds = room.ds.get(NR * NR);
    bf16* ds_panel = room.ds_panel.get(NR * NR);
    float *scores = room.scores.get(NR * NR), *dp = room.dp.get(NR * NR), *dk_sum = room.dk.get(NR * s.dim);
    float *dv_sum = room.dv.get(NR * s.dim), *dq_sum = room.dq.get(numbers), *delta = room.delta.get(2 * length);
    float* logs = delta + length;
    int32_t* low = room.low.get(length);
    pack_channels(s, q, queries);
    pack_positions(s, q, by_query);
    pack_channels(s, grad, grads);
    pack_positions(s, grad, by_grad);
    turn(s, k, turned);
    lowest_keys(s, documents, low);
    for (int64_t t = 0; t < length; t++) {
        delta[t] = t < s.length ? dot(grad + t * stride, out + t * stride, s.dim) : 0.0f;
        logs[t] = t < s.length ? logs_of_head[t] : 0.0f;
    }
    std::memset(dq_sum, 0, numbers * sizeof(float));  // (tiles, dim, 64)
    for (int64_t key = 0; key < s.length; key += NR) {
        const int64_t n = std::min(NR, s.length - key);
        std::memset(dk_sum, 0, NR * s.dim * sizeof(float));
        std::memset(dv_sum, 0, NR * s.dim * sizeof(float));
        for (int64_t begin = key; begin < s.length && low[begin] <= key + n - 1; begin += NR) {
            multiply<false>(n, k + key * stride, stride, queries + begin * s.dim, s.dim, scores, NR);
            multiply<false>(n, v + key * stride, stride, grads + begin * s.dim, s.dim, dp, NR);
            slopes(s, scores, dp, key, begin, low, logs, delta, p, ds);
            for (int64_t panel = 0; panel < panels; panel++) {
                const int64_t at = panel * NR * length + begin * NR;
                multiply<true>(n, p, NR, by_grad + at, NR, dv_sum + panel * NR, s.dim);
                multiply<true>(n, ds, NR, by_query + at, NR, dk_sum + panel * NR, s.dim);
            }
            if (n < NR) std::memset(ds + n * NR, 0, (NR - n) * NR * sizeof(bf16));
            for (int64_t r = 0; r < NR; r += 2)
                for (int64_t c = 0; c < NR; c += 32)
                    interleave(ds + r * NR + c, ds + (r + 1) * NR + c, ds_panel + r * NR + 2 * c);
            multiply<true>(s.dim, turned + key, length, ds_panel, NR, dq_sum + begin * s.dim, NR);
        }
        for (int64_t i = 0; i < n; i++) {
            each(dk + (key + i) * stride, s.dim, [&, i](auto get) { return get(dk_sum + i * s.dim); });
            each(dv + (key + i) * stride, s.dim, [&, i](auto get) { return get(dv_sum + i * s.dim); });
        }
    }
    for (int64_t t = 0; t < s.length; t += 16)
        for (int64_t c = 0; c < s.dim; c += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = _mm512_loadu_si512(dq_sum + t / NR * NR * s.dim + (c + i) * NR + t % NR);
            transpose(r);
            for (int64_t i = 0; i < 16 && t + i < s.length; i++) store(dq + (t + i) * stride + c, bits_of<vf>(r[i]));
        }
}
#endif

extern "C" int64_t columns_of_panels() {
#ifdef HAS_BF16_DOT
    return NR;
#else
    return 0;
#endif
}

// q, k, v, out: (rows, length, heads, dim) bf16, dim a multiple of columns_of_panels(); logs: (rows, heads, length),
// the logarithms of the softmax's sums; documents: (rows, length) numbers that change where one begins, or null.
extern "C" void attend(int64_t rows, int64_t length, int64_t heads, int64_t dim, int64_t window, float scale,
                       const void* q, const void* k, const void* v, const int64_t* documents, void* out, float* logs,
                       int64_t threads) {
#ifdef HAS_BF16_DOT
    const Shape s{rows, length, heads, dim, window, scale};
    in_parallel(1, threads, [=](Team team) {
        team.share(rows * heads, [=](int64_t item) {
            const int64_t at = s.head(item);
            forward_head(s, (const bf16*)q + at, (const bf16*)k + at, (const bf16*)v + at,
                         of_row(s, documents, item), (bf16*)out + at, logs + item * length);
        });
    });
#endif
}

extern "C" void attend_backward(int64_t rows, int64_t length, int64_t heads, int64_t dim, int64_t window, float scale,
                                const void* grad, const void* q, const void* k, const void* v, const void* out,
                                const float* logs, const int64_t* documents, void* dq, void* dk, void* dv,
                                int64_t threads) {
#ifdef HAS_BF16_DOT
    const Shape s{rows, length, heads, dim, window, scale};
    in_parallel(1, threads, [=](Team team) {
        team.share(rows * heads, [=](int64_t item) {
            const int64_t at = s.head(item);
            backward_head(s, (const bf16*)grad + at, (const bf16*)q + at, (const bf16*)k + at, (const bf16*)v + at,
                          (const bf16*)out + at, logs + item * length, of_row(s, documents, item), (bf16*)dq + at,
                          (bf16*)dk + at, (bf16*)dv + at);
        });
    });
#endif
}
