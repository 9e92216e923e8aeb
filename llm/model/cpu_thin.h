// Products of a token's row with thin matrices, which are added to those of large ones: low-rank adapters, in fp32.
#pragma once
#include "cpu_vector.h"

// down (rank, k), or of a table its `k` rows side by side, and up (rank, n): outputs first .. first + n of the large
// matrix. rank 0: there is none.
struct Thin {
    const float *down, *up;
    int64_t rank, k, n, first;
};

// low (rank,) = down times x
template <class T>
static inline void shrink(const Thin& w, const T* x, float* low) {
    for (int64_t r = 0; r < w.rank; r++) low[r] = dot(x, w.down + r * w.k, w.k);
}

// Adds up times low (rank,) to `values`, which are outputs at .. at + width of the large matrix.
template <class T>
static inline void widen(const Thin& w, const float* low, int64_t at, int64_t width, T* values) {
    const int64_t begin = at > w.first ? at : w.first, end = at + width < w.first + w.n ? at + width : w.first + w.n;
    if (begin >= end) return;
    T* out = values + begin - at;
    const float* up = w.up + begin - w.first;
    each(out, end - begin, [&](auto get) {
        vf total = get(static_cast<const T*>(out));
        for (int64_t r = 0; r < w.rank; r++) total += low[r] * get(up + r * w.n);
        return total;
    });
}
