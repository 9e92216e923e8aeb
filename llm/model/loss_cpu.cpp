// Losses of rows of logits, and in place of the logits their gradients, in two passes over each row.
#include "cpu_team.h"
#include "cpu_vector.h"

constexpr int64_t ROWS = 8;           // of one item of work
constexpr float LARGEST_CAP = 70.0f;  // e^z of a logit within this cap needs no maximum subtracted

struct Bound {  // of logits x: z = cap tanh((x + shift) / width); cap 0 = none
    float cap, width, shift;
};

struct Sum {
    float total, most;  // sum of e^(z - most)
};

// Calls f(first element, number of elements) for whole vectors of a row of n, then for what is left.
template <class F>
static inline void vectors(int64_t n, F f) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) f(i, VL);
    if (i < n) f(i, int(n - i));
}

template <class T>
static inline vf some(const T* p, int n, float rest) {
    if (n == VL) return load(p);
    vf v = all(rest);
    for (int i = 0; i < n; i++) v[i] = to_float(p[i]);
    return v;
}

// Fills `slopes` with e^(z - most) dz/dx for logits x and z by their bound, or z = x without one.
template <class T>
static Sum read(const T* x, int64_t n, const Bound bound, float* slopes) {
    const float cap = bound.cap, width = bound.width, shift = bound.shift, steep = cap / width;
    float most_z = 0.0f;
    if (!(cap > 0.0f && cap <= LARGEST_CAP)) {
        vf most = all(to_float(x[0]));
        vectors(n, [&](int64_t i, int count) {
            const vf v = some(x + i, count, to_float(x[0]));
            most = v > most || v != v ? v : most;
        });
        most_z = largest(most);
        if (cap > 0.0f) most_z = cap * std::tanh((most_z + shift) / width);
    }
    vf total{};
    vectors(n, [&](int64_t i, int count) {
        vf z = some(x + i, count, 0.0f), slope = all(1.0f);
        if (cap > 0.0f) {
            const vf rest = 2.0f / (exp((z + shift) * (2.0f / width)) + 1.0f);  // 1 - tanh
            slope = rest * (2.0f - rest) * steep;
            z = cap - cap * rest;
        }
        const vf e = exp(z - most_z), f = e * slope;
        if (count == VL) {
            total += e;
            store(slopes + i, f);
        } else {
            for (int j = 0; j < count; j++) total[j] += e[j], slopes[i + j] = f[j];
        }
    });
    return {sum(total), most_z};
}

template <class T>
static void run(T* logits, int64_t rows, int64_t n, const int64_t* goals, const float* scales, Bound bound,
                float* losses, int64_t threads) {
    in_parallel(1, threads, [=](Team team) {
        static thread_local std::vector<float> room;
        if (int64_t(room.size()) < n + VL) room.resize(n + VL);
        float* slopes = room.data();
        team.share((rows + ROWS - 1) / ROWS, [&](int64_t item) {
            for (int64_t row = item * ROWS; row < rows && row < (item + 1) * ROWS; row++) {
                T* x = logits + row * n;
                const int64_t goal = goals[row];
                const float at = to_float(x[goal]), cap = bound.cap;
                const float t = cap > 0.0f ? std::tanh((at + bound.shift) / bound.width) : 0.0f;
                const auto [total, most] = read(x, n, bound, slopes);
                losses[row] = std::log(total) + most - (cap > 0.0f ? cap * t : at);
                if (!scales) continue;
                const float factor = scales[row] / total, of_goal = slopes[goal] * factor;
                each(x, n, [&](auto get) { return get(slopes) * factor; });
                const float slope = cap > 0.0f ? (1.0f - t * t) * (cap / bound.width) : 1.0f;
                x[goal] = narrow<T>(of_goal - scales[row] * slope);
            }
        });
    });
}

// logits: (rows, n), overwritten with the gradients of sum(losses * scales) unless scales is null; cap: 0 = none.
extern "C" void row_losses(void* logits, int64_t is_bf16, int64_t rows, int64_t n, const int64_t* goals,
                           const float* scales, float cap, float width, float shift, float* losses, int64_t threads) {
    const Bound bound{cap, width, shift};
    if (is_bf16)
        run(static_cast<bf16*>(logits), rows, n, goals, scales, bound, losses, threads);
    else
        run(static_cast<float*>(logits), rows, n, goals, scales, bound, losses, threads);
}
