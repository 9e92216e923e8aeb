// The passes of Muon over memory, around its matrix products: each number is read and written once a pass.
#include "../model/cpu_team.h"
#include "../model/cpu_vector.h"

constexpr int64_t ROWS = 16;      // of one item of work
constexpr int64_t COLUMNS = 128;  // of one item of work, where sums run down the columns

static inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Calls f(matrix, row) for all rows of n matrices.
template <class F>
static void rows_of(int64_t n, int64_t rows, int64_t threads, F f) {
    in_parallel(1, threads, [=](Team team) {
        const int64_t items = parts(rows, ROWS);
        team.share(n * items, [&](int64_t item) {
            const int64_t first = item % items * ROWS;
            for (int64_t row = first; row < rows && row < first + ROWS; row++) f(item / items, row);
        });
    });
}

template <class T>
static void look_ahead(float* const* grads, float* const* buffers, T* out, int64_t n, int64_t rows, int64_t cols,
                       float momentum, float length, int64_t threads) {
    rows_of(n, rows, threads, [=](int64_t matrix, int64_t row) {
        static thread_local std::vector<float> room;
        if (int64_t(room.size()) < cols) room.resize(cols);
        const float *grad = grads[matrix] + row * cols, *ahead = room.data();
        float* buffer = buffers[matrix] + row * cols;
        each(buffer, cols, [&](auto get) {
            const vf old = get(buffer);
            return old + (get(grad) - old) * (1.0f - momentum);
        });
        each(room.data(), cols, [&](auto get) {
            const vf average = get(buffer);
            return average - (average - get(grad)) * (1.0f - momentum);
        });
        const float norm = std::sqrt(dot(ahead, ahead, cols)), least = 1e-10f;
        const float divisor = (norm < least ? least : norm) * length;
        each(out + (matrix * rows + row) * cols, cols, [&](auto get) { return get(ahead) / divisor; });
    });
}

template <class T>
static void mean_squares(const T* update, float* out, int64_t n, int64_t rows, int64_t cols, bool of_rows,
                         int64_t threads) {
    if (of_rows)
        return rows_of(n, rows, threads, [=](int64_t matrix, int64_t row) {
            const T* x = update + (matrix * rows + row) * cols;
            vf total{};
            int64_t i = 0;
            for (; i + VL <= cols; i += VL) total += load(x + i) * load(x + i);
            float result = sum(total);
            for (; i < cols; i++) result += to_float(x[i]) * to_float(x[i]);
            out[matrix * rows + row] = result / cols;
        });
    in_parallel(1, threads, [=](Team team) {
        const int64_t items = parts(cols, COLUMNS);
        team.share(n * items, [&](int64_t item) {
            const int64_t first = item % items * COLUMNS, width = std::min(COLUMNS, cols - first);
            float total[COLUMNS] = {};
            for (int64_t row = 0; row < rows; row++) {
                const T* x = update + (item / items * rows + row) * cols + first;
                each(total, width, [&](auto get) { return get(total) + get(x) * get(x); });
            }
            for (int64_t i = 0; i < width; i++) out[item / items * cols + first + i] = total[i] / rows;
        });
    });
}

template <class T>
static void scaled(const T* update, const float* factors, float* step, int64_t n, int64_t rows, int64_t cols,
                   bool of_rows, int64_t threads) {
    rows_of(n, rows, threads, [=](int64_t matrix, int64_t row) {
        const int64_t at = (matrix * rows + row) * cols;
        const float *of_columns = factors + matrix * cols, of_row = factors[of_rows ? matrix * rows + row : 0];
        each(step + at, cols, [&](auto get) { return get(update + at) * (of_rows ? all(of_row) : get(of_columns)); });
    });
}

extern "C" {
// buffers = lerp(buffers, grads, 1 - momentum); out = rows of lerp(grads, buffers, momentum), of norm 1 / length.
void muon_look_ahead(float* const* grads, float* const* buffers, void* out, int64_t is_bf16, int64_t n, int64_t rows,
                     int64_t cols, float momentum, float length, int64_t threads) {
    if (is_bf16)
        look_ahead(grads, buffers, static_cast<bf16*>(out), n, rows, cols, momentum, length, threads);
    else
        look_ahead(grads, buffers, static_cast<float*>(out), n, rows, cols, momentum, length, threads);
}

// out: (n, rows) or (n, cols) means of the squares of update (n, rows, cols).
void muon_mean_squares(const void* update, int64_t is_bf16, float* out, int64_t n, int64_t rows, int64_t cols,
                       int64_t of_rows, int64_t threads) {
    if (is_bf16)
        mean_squares(static_cast<const bf16*>(update), out, n, rows, cols, of_rows, threads);
    else
        mean_squares(static_cast<const float*>(update), out, n, rows, cols, of_rows, threads);
}

// step = update (n, rows, cols) times factors (n, rows) or (n, cols).
void muon_scaled(const void* update, int64_t is_bf16, const float* factors, float* step, int64_t n, int64_t rows,
                 int64_t cols, int64_t of_rows, int64_t threads) {
    if (is_bf16)
        scaled(static_cast<const bf16*>(update), factors, step, n, rows, cols, of_rows, threads);
    else
        scaled(static_cast<const float*>(update), factors, step, n, rows, cols, of_rows, threads);
}

// weights += step, and decay those that the step shrinks or leaves.
void muon_apply(float* const* weights, const float* step, int64_t n, int64_t rows, int64_t cols, float decay,
                int64_t threads) {
    rows_of(n, rows, threads, [=](int64_t matrix, int64_t row) {
        float* w = weights[matrix] + row * cols;
        const float* s = step + (matrix * rows + row) * cols;
        each(w, cols, [&](auto get) {
            const vf weight = get(w), added = get(s);
            return weight + (added - (added * weight <= 0.0f ? weight : vf{}) * decay);
        });
    });
}
}
