// AdamW of those numbers that have a gradient other than 0, in one pass over a table's rows, or over all of it.
#include "../model/cpu_team.h"
#include "../model/cpu_vector.h"

constexpr int64_t ROWS = 256;       // of one item of work
constexpr int64_t AHEAD = 8;        // rows whose numbers are asked from memory before they are needed
constexpr int64_t NUMBERS = 4096;   // of one item of work without rows
constexpr int64_t LINE = 16;        // floats in a line of the cache

struct Adam {
    float keep, lr, beta1, beta2, eps, bias1, bias2;  // keep: 1 - lr x decay; bias: 1 - beta^step
};

struct Table {
    const float* grad;
    float *weight, *mean, *square;
};

static inline vf root(vf x) {
    for (int i = 0; i < VL; i++) x[i] = std::sqrt(x[i]);
    return x;
}

static inline void update(const Table& t, int64_t at, const Adam& a) {
    const vf g = load(t.grad + at), w = load(t.weight + at), m = load(t.mean + at), v = load(t.square + at);
    const vf mean = m + (g - m) * (1.0f - a.beta1), square = v + (g * g - v) * (1.0f - a.beta2);
    const vf moved = w * a.keep - a.lr * (mean / a.bias1 / (root(square / a.bias2) + a.eps));
    const auto seen = g != vf{};
    store(t.weight + at, seen ? moved : w);
    store(t.mean + at, seen ? mean : m);
    store(t.square + at, seen ? square : v);
}

// Updates n numbers from `at` on. Vectors without a gradient are not written.
static void update(const Table& t, int64_t at, int64_t n, const Adam& a) {
    const int64_t end = at + n;
    for (; at + VL <= end; at += VL) {
        const auto seen = load(t.grad + at) != vf{};
        bool any = false;
        for (int i = 0; i < VL; i++) any |= seen[i] != 0;
        if (any) update(t, at, a);
    }
    if (at == end) return;
    float rest[4][VL] = {};
    const size_t bytes = (end - at) * sizeof(float);
    const float* all[4] = {t.grad, t.weight, t.mean, t.square};
    for (int i = 0; i < 4; i++) std::memcpy(rest[i], all[i] + at, bytes);
    update({rest[0], rest[1], rest[2], rest[3]}, 0, a);
    std::memcpy(t.weight + at, rest[1], bytes), std::memcpy(t.mean + at, rest[2], bytes);
    std::memcpy(t.square + at, rest[3], bytes);
}

static inline void ask(const Table& t, int64_t at, int64_t n) {
    for (int64_t i = at; i < at + n; i += LINE) {
        __builtin_prefetch(t.grad + i), __builtin_prefetch(t.weight + i, 1);
        __builtin_prefetch(t.mean + i, 1), __builtin_prefetch(t.square + i, 1);
    }
}

// rows: n different rows of tables of a width, or null, for all n numbers of tables.
extern "C" void row_adamw(const float* grad, float* weight, float* mean, float* square, const int64_t* rows, int64_t n,
                          int64_t width, float keep, float lr, float beta1, float beta2, float eps, float bias1,
                          float bias2, int64_t threads) {
    const Table t{grad, weight, mean, square};
    const Adam a{keep, lr, beta1, beta2, eps, bias1, bias2};
    const int64_t size = rows ? ROWS : NUMBERS;
    in_parallel(1, threads, [=](Team team) {
        team.share((n + size - 1) / size, [&](int64_t item) {
            const int64_t first = item * size, end = std::min(n, first + size);
            if (!rows) return update(t, first, end - first, a);
            for (int64_t i = first; i < end; i++) {
                if (i + AHEAD < n) ask(t, rows[i + AHEAD] * width, width);
                update(t, rows[i] * width, width, a);
            }
        });
    });
}
