// Adds gradients of rows to the gradient of their table, one after the other, without a copy of the table.
#include <algorithm>

#include "cpu_team.h"
#include "cpu_vector.h"

constexpr int64_t AHEAD = 8;  // rows that are asked from memory before they are needed
constexpr int64_t LINE = 16;  // floats in a line of the cache

// Each thread adds to rows of its own, so their sums run in the order of the ids, however many threads there are.
template <class T>
static void run(float* total, int64_t width, const int64_t* ids, int64_t n, const T* grads, int64_t threads) {
    in_parallel(1, threads, [=](Team team) {
        team.share(threads, [&](int64_t mine) {
            for (int64_t i = 0; i < n; i++) {
                if (i + AHEAD < n && ids[i + AHEAD] % threads == mine)
                    for (int64_t c = 0; c < width; c += LINE) __builtin_prefetch(total + ids[i + AHEAD] * width + c, 1);
                if (ids[i] % threads != mine) continue;
                float* row = total + ids[i] * width;
                const T* grad = grads + i * width;
                each(row, width, [&](auto get) { return get(static_cast<const float*>(row)) + get(grad); });
            }
        });
    });
}

extern "C" void clear_rows(float* total, int64_t width, const int64_t* ids, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        for (int64_t c = 0; c < width && i + AHEAD < n; c += LINE) __builtin_prefetch(total + ids[i + AHEAD] * width + c, 1);
        std::fill_n(total + ids[i] * width, width, 0.0f);
    }
}

// total: (rows, width); ids: (n,); grads: (n, width), bf16 or float.
extern "C" void add_rows(float* total, int64_t width, const int64_t* ids, int64_t n, const void* grads, int64_t is_bf16,
                         int64_t threads) {
    if (is_bf16)
        run(total, width, ids, n, static_cast<const bf16*>(grads), threads);
    else
        run(total, width, ids, n, static_cast<const float*>(grads), threads);
}
