// One pass of the network over a few new tokens: embedding, all blocks over the key/value cache, logits.
//
// It stands in for `GPT.forward` with a cache, without gradients, on a CPU. Numbers are rounded to the compute type T
// (float or bf16) where the torch model rounds. No sum depends on which other tokens are computed in the same call.
// llm/model/decode_cpu.py owns all memory and describes it by the structs of cpu_model.h.
#include <algorithm>
#include <limits>
#include <vector>

#include "cpu_model.h"

constexpr int64_t BLOCK = 64;  // keys whose scores are held at a time
constexpr float FLOAT_EPS = std::numeric_limits<float>::epsilon();

static int64_t wide(int64_t n) { return (n + 31) / 32 * 32; }  // whole cache lines, zeros behind the row's end

// Memory of one call, in numbers of T: every part has room for `capacity` tokens.
template <class T>
struct Scratch {
    T *x, *x0, *middle, *before, *normed, *qkv, *attended, *inner, *low, *grams;
    int64_t c, all_heads, heads, four_c, low_width, gram_width, total;

    Scratch(const Model& m, int64_t capacity, void* memory)
        : c(wide(m.n_embd)), all_heads(wide((m.n_head + 2 * m.n_kv_head) * m.head_dim)),
          heads(wide(m.n_head * m.head_dim)), four_c(wide(4 * m.n_embd)),
          low_width(wide(m.low * sizeof(float) / sizeof(T))), gram_width(m.parts ? c : 0), total(0) {
        auto part = [&](int64_t width) {
            T* start = static_cast<T*>(memory) + total;
            total += capacity * width;
            return start;
        };
        x = part(c), x0 = part(c), middle = part(c), before = part(c), normed = part(c);
        qkv = part(all_heads), attended = part(heads), inner = part(four_c), low = part(low_width);
        grams = part(gram_width);
    }
};

template <class T>
struct Pass {
    const Model& m;
    const Batch& b;
    const Scratch<T> s;
    Team team;
    std::vector<int64_t> groups;  // first token of each group that reads its prefix together, and the end of the last
    std::vector<int64_t> starts;  // place among its row's own tokens of the first new token of each token's row
    const int64_t d, kv_dim;
    static constexpr int64_t LINE = 64 / sizeof(T);  // numbers of a cache line

    Pass(const Model& model, const Batch& batch, int64_t threads)
        : m(model), b(batch), s(model, batch.capacity, batch.scratch), team{}, d(model.head_dim),
          kv_dim(model.n_kv_head * model.head_dim) {
        const int64_t most = std::clamp<int64_t>(b.n * m.n_kv_head / (4 * threads), 1, 64);
        for (int64_t i = 0; i < b.n; i++)
            if (i == 0 || prefix(i) < 0 || prefix(i) != prefix(i - 1) || i - groups.back() >= most) groups.push_back(i);
        groups.push_back(b.n);
        for (int64_t i = 0; i < b.n; i++) starts.push_back(i > 0 && row(i) == row(i - 1) ? starts[i - 1] : b.at[i]);
    }

    int64_t row(int64_t i) const { return b.rows ? b.rows[i] : i; }
    int64_t prefix(int64_t i) const { return b.prefix ? b.prefix[row(i)] : -1; }
    int64_t before(int64_t i) const { return prefix(i) < 0 ? 0 : b.lengths[prefix(i)]; }
    int64_t position(int64_t i) const { return before(i) + b.at[i]; }
    // First of the thin matrices of a token's adapter from the one with number `which` of a layer on; null: it has none.
    const Thin* thin(int64_t i, int64_t layer, int64_t which) const {
        if (!b.adapters || !b.adapters[i]) return nullptr;
        return m.adapters[b.adapters[i] - 1].thin + layer * PER_LAYER + which;
    }
    float* low(int64_t i) const { return reinterpret_cast<float*>(s.low + i * s.low_width); }
    T* place(void* cache, const Layer& layer, int64_t i, int64_t head) const {
        const Part& p = b.parts[layer.part];
        return static_cast<T*>(cache) + layer.index * p.layer_stride + row(i) * p.row_stride + head * p.head_stride;
    }

    // Number of the turn in which a token is written and attends. Tokens of one turn overwrite nothing that they see.
    static int64_t turn(const Part& p, int64_t start, int64_t at) {
        auto number = [&](int64_t j) { return j < p.places ? 0 : (j - p.places) / p.spare + 1; };
        return number(at) - number(start);
    }
    int64_t turn(const Layer& layer, int64_t i) const { return turn(b.parts[layer.part], starts[i], b.at[i]); }
    static int64_t turns(const Batch& b, const std::vector<int64_t>& starts, const Part& p) {
        int64_t most = 0;
        for (int64_t i = 0; i < b.n; i++) most = std::max(most, turn(p, starts[i], b.at[i]));
        return most + 1;
    }

    // ---- parts of a row

    void norm(const T* x, const float* const weight[2], T* y) const {
        const int64_t n = m.n_embd;
        if (!weight[0]) return rms_norm(x, n, y);
        vf v{};
        float total = 0, square = 0;
        int64_t i = 0;
        for (; i + VL <= n; i += VL) v += load(x + i);
        for (total = sum(v); i < n; i++) total += to_float(x[i]);
        const float mean = total / n;
        v = vf{};
        for (i = 0; i + VL <= n; i += VL) v += (load(x + i) - mean) * (load(x + i) - mean);
        for (square = sum(v); i < n; i++) square += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
        const float scale = 1.0f / std::sqrt(square / n + m.norm_eps);
        each(y, n, [&](auto get) { return (get(x) - mean) * scale * get(weight[0]) + get(weight[1]); });
    }

    static void rms_norm(const T* x, int64_t n, T* y) {
        float square = 0;
        vf v{};
        int64_t i = 0;
        for (; i + VL <= n; i += VL) v += load(x + i) * load(x + i);
        for (square = sum(v); i < n; i++) square += to_float(x[i]) * to_float(x[i]);
        const float scale = 1.0f / std::sqrt(square / n + FLOAT_EPS);
        each(y, n, [&](auto get) { return get(x) * scale; });
    }

    template <class F>
    void with_table(const void* table, int64_t row, int64_t width, F f) const {
        if (m.has_bf16_tables)
            f(static_cast<const bf16*>(table) + row * width);
        else
            f(static_cast<const float*>(table) + row * width);
    }

    float channel_gate(const T* x, const float* weight, int64_t channels) const {
        const float z = rounded<T>(dot(x, weight, channels));
        return rounded<T>(sigmoid(all(z))[0]);
    }

    // ---- low-rank adapters

    // Keeps what `count` thin matrices of token i's adapter make of x, in place `slot`.
    void shrunk(int64_t i, int64_t slot, int64_t layer, int64_t which, int64_t count, const T* x) const {
        const Thin* w = thin(i, layer, which);
        float* to = low(slot);
        for (int64_t j = 0; w && j < count; to += w[j++].rank) shrink(w[j], x, to);
    }

    // Adds to outputs at .. at + width of a large matrix what the adapter makes of the numbers in place `slot`.
    void widened(int64_t i, int64_t slot, int64_t layer, int64_t which, int64_t count, int64_t at, int64_t width,
                 float* y) const {
        const Thin* w = thin(i, layer, which);
        const float* from = low(slot);
        for (int64_t j = 0; w && j < count; from += w[j++].rank) widen(w[j], from, at, width, y);
    }

    // Adds to a row y (n,) of a table, that of token i, what the adapter has for it.
    template <class Y>
    void add_row(int64_t i, int64_t layer, int64_t which, Y* y) const {
        const Thin* w = thin(i, layer, which);
        if (!w) return;
        thread_local std::vector<float> picked;
        picked.resize(w->rank);
        for (int64_t r = 0; r < w->rank; r++) picked[r] = w->down[r * w->k + b.ids[i]];
        widen(*w, picked.data(), 0, w->n, y);
    }

    // ---- phases

    void embed(int64_t i, T* x, T* normed) const {
        const int64_t n = m.n_embd;
        with_table(m.wte, b.ids[i], n, [&](auto token) {
            if (m.is_gpt2)
                with_table(m.wpe, position(i), n, [&](auto at) { each(x, n, [&](auto get) { return get(token) + get(at); }); });
            else
                each(normed, n, [&](auto get) { return get(token); });
        });
        add_row(i, m.n_layer, EMBEDDING, m.is_gpt2 ? x : normed);
        if (!m.is_gpt2) rms_norm(normed, n, x);
    }

    // Adds to a token some of the embedding of the token before it, which `earlier` holds (null: there is none).
    void smear(const T* own, const T* earlier, T* x) const {
        const float gate = rounded<T>(m.smear * channel_gate(own, m.smear_gate, m.smear_channels));
        if (!earlier) return void(std::copy(own, own + m.n_embd, x));
        each(x, m.n_embd, [&](auto get) { return get(own) + rounded<T>(gate * get(earlier)); });
    }

    // Id of the token `back` places before token i, in this call or before it.
    int64_t id_before(int64_t i, int64_t back) const {
        int64_t here = 0;
        while (here < back && here < i && row(i - here - 1) == row(i)) here++;
        return here == back ? b.ids[i - back] : b.last_ids[row(i) * b.n_last + b.n_last - (back - here)];
    }

    // Sums the rows of the n-grams that end in a token, as llm/model/ngrams.py chooses them.
    void sum_grams(int64_t i, T* y) const {
        const int64_t width = m.n_embd / m.parts, nothing = m.vocab;
        int64_t line[3] = {b.ids[i], nothing, nothing};
        for (int64_t k = 1; k <= b.n_last && line[k - 1] != m.bos && line[k - 1] != nothing; k++) line[k] = id_before(i, k);
        for (int64_t part = 0; part < m.parts; part++) {
            T* to = y + part * width;
            bool is_first = true;
            for (int64_t n = 2; n <= 3; n++) {
                if (!m.grams[n - 2]) continue;
                int64_t mixed = 0;
                for (int64_t k = 0; k < n; k++) mixed += line[k] * m.factors[part * 3 + k];
                with_table(m.grams[n - 2], part * m.gram_rows + mixed % m.prime % m.gram_rows, width, [&](auto found) {
                    each(to, width, [&](auto get) { return is_first ? get(found) : get(to) + get(found); });
                });
                is_first = false;
            }
        }
    }

    void remember_ids() {
        team.share(b.n, [&](int64_t i) {
            if (i + 1 < b.n && row(i + 1) == row(i)) return;
            int64_t newest[3];
            for (int64_t k = 0; k < b.n_last; k++) newest[b.n_last - 1 - k] = id_before(i, k);
            std::copy_n(newest, b.n_last, b.last_ids + row(i) * b.n_last);
        });
    }

    void begin() {
        if (m.parts) {
            team.share(b.n, [&](int64_t i) { sum_grams(i, s.grams + i * s.c); });
            remember_ids();
        }
        T* target = m.smear_gate ? s.before : s.x;
        team.share(b.n, [&](int64_t i) { embed(i, target + i * s.c, s.normed + i * s.c); });
        if (!m.smear_gate) return;
        const int64_t n = m.n_embd;
        T* last = static_cast<T*>(b.last_embed);
        team.share(b.n, [&](int64_t i) {
            const bool follows = i > 0 && row(i - 1) == row(i);
            const T* earlier = follows ? s.before + (i - 1) * s.c : position(i) > 0 ? last + row(i) * n : nullptr;
            smear(s.before + i * s.c, earlier, s.x + i * s.c);
        });
        team.share(b.n, [&](int64_t i) {
            if (i + 1 == b.n || row(i + 1) != row(i)) std::copy_n(s.before + i * s.c, n, last + row(i) * n);
        });
    }

    void enter(const Layer& layer, int64_t index) {
        const float r = layer.residual, a = layer.x0;
        team.share(b.n, [&](int64_t i) {
            T *x = s.x + i * s.c, *x0 = s.x0 + i * s.c;
            if (index == 0) std::copy_n(x, m.n_embd, x0);
            if (m.has_scalars)
                each(x, m.n_embd, [&](auto get) { return rounded<T>(r * get(x)) + rounded<T>(a * get(x0)); });
            if (m.parts) {
                const T* sum = s.grams + i * s.c;
                each(x, m.n_embd, [&](auto get) { return get(static_cast<const T*>(x)) + rounded<T>(layer.grams * get(sum)); });
            }
            norm(x, layer.norm_1, s.normed + i * s.c);
            shrunk(i, i, index, QUERIES, 3, s.normed + i * s.c);
        });
    }

    // Rotates and norms a head by the angles of a position.
    void rotate(T* head, int64_t at) const {
        const float *cos = m.cos + at * (d / 2), *sin = m.sin + at * (d / 2);
        T turned[1024], *low = head, *high = head + d / 2;
        each(turned, d / 2, [&](auto get) { return rounded<T>(get(low) * get(cos)) + rounded<T>(get(high) * get(sin)); });
        each(turned + d / 2, d / 2,
             [&](auto get) { return rounded<T>(get(high) * get(cos)) - rounded<T>(get(low) * get(sin)); });
        rms_norm(turned, d, head);
    }

    // Finishes queries, keys and values of a token.
    void remember(const Layer& layer, int64_t index, int64_t i) const {
        T *q = s.qkv + i * s.all_heads, *k = q + m.n_head * d, *v = k + kv_dim;
        const T* x = s.normed + i * s.c;
        auto mix = [&](auto table) {
            for (int64_t h = 0; h < m.n_kv_head; h++) {
                const float gate =
                    rounded<T>(m.gate_range * channel_gate(x, layer.gate + h * m.gate_channels, m.gate_channels));
                T* head = v + h * d;
                auto value = table + h * d;
                each(head, d, [&](auto get) { return get(head) + rounded<T>(gate * rounded<T>(get(value))); });
            }
        };
        if (layer.values)
            with_table(layer.values, b.ids[i], kv_dim, [&](auto table) {
                const Thin* w = thin(i, index, TABLE);
                if (!w || !w->rank) return mix(table);
                thread_local std::vector<float> own;
                own.resize(kv_dim);
                for (int64_t c = 0; c < kv_dim; c++) own[c] = to_float(table[c]);
                add_row(i, index, TABLE, own.data());
                mix(static_cast<const float*>(own.data()));
            });
        for (int64_t h = 0; h < m.n_head + m.n_kv_head && !m.is_gpt2; h++) rotate(q + h * d, position(i));
    }

    const T* keys_of(int64_t i) const { return s.qkv + i * s.all_heads + m.n_head * d; }
    T* last_keys(const Layer& layer, int64_t i) const {
        return static_cast<T*>(b.last_keys) + (row(i) * b.n_offset + layer.offset) * kv_dim;
    }

    // Stores keys and values of a token in the cache. With an offset its keys have half of those of the token before it.
    void keep(const Layer& layer, int64_t i) const {
        const Part& p = b.parts[layer.part];
        const T *k = keys_of(i), *v = k + kv_dim, *slow = k;
        if (layer.offset >= 0 && position(i) > 0)
            slow = i > 0 && row(i - 1) == row(i) ? keys_of(i - 1) : last_keys(layer, i);
        const int64_t at = b.at[i] % p.places * p.place_stride, quarter = slow == k ? d : d / 4;
        for (int64_t h = 0; h < m.n_kv_head; h++) {
            for (int64_t c = 0; c < d; c += quarter)
                std::copy_n((c / quarter % 2 ? slow : k) + h * d + c, quarter, place(p.k, layer, i, h) + at + c);
            std::copy_n(v + h * d, d, place(p.v, layer, i, h) + at);
        }
    }

    struct Softmax {  // of one query over the keys so far: largest score, sum of e^(score - largest), weighted values
        float largest, total;
        float* values;
    };

    struct Keys {  // `count` <= BLOCK keys and values side by side; from the one with number `split` on, `back` earlier
        const T *k, *v;
        int64_t stride, count, split, back;
    };

    // Lets a query see more keys.
    void see(Softmax& state, const T* q, const Keys& keys) const {
        alignas(64) float p[BLOCK];
        const int64_t stride = keys.stride, count = keys.count, end = (count + VL - 1) / VL * VL;
        const T *k = keys.k, *v = keys.v;
        for (int64_t j = 0, stop = keys.split; j < count; stop = count, k -= keys.back * stride, v -= keys.back * stride)
            for (; j < stop; j++) {
                for (int64_t c = 0; c < d; c += LINE) __builtin_prefetch(v + j * stride + c);
                p[j] = m.scale * dot(q, k + j * stride, d);
            }
        vf most = all(state.largest), sums{};
        for (int64_t j = count; j < end; j++) p[j] = -std::numeric_limits<float>::infinity();
        for (int64_t j = 0; j < end; j += VL) most = load(p + j) > most ? load(p + j) : most;
        const float top = largest(most), shrink = exp1(state.largest - top);
        for (int64_t j = 0; j < end; j += VL) store(p + j, exp(load(p + j) - top));
        for (int64_t j = count; j < end; j++) p[j] = 0;
        for (int64_t j = 0; j < end; j += VL) sums += load(p + j);
        state.largest = top, state.total = state.total * shrink + sum(sums);
        int64_t c = 0;
        for (; c + 4 * VL <= d; c += 4 * VL) add_values<4>(state.values + c, p, keys, c, shrink);
        for (; c + VL <= d; c += VL) add_values<1>(state.values + c, p, keys, c, shrink);
        for (; c < d; c++) {
            float value = state.values[c] * shrink;
            for (int64_t j = 0; j < count; j++)
                value += p[j] * to_float(keys.v[(j < keys.split ? j : j - keys.back) * stride + c]);
            state.values[c] = value;
        }
    }

    template <int N>
    static void add_values(float* sums, const float* p, const Keys& keys, int64_t at, float shrink) {
        vf total[N];
        const int64_t stride = keys.stride;
        const T* v = keys.v + at;
        for (int c = 0; c < N; c++) total[c] = load(sums + c * VL) * shrink;
        for (int64_t j = 0, stop = keys.split; j < keys.count; stop = keys.count, v -= keys.back * stride)
            for (; j < stop; j++)
                for (int c = 0; c < N; c++) total[c] += p[j] * load(v + j * stride + c * VL);
        for (int c = 0; c < N; c++) store(sums + c * VL, total[c]);
    }

    // Attention of the tokens of a turn in a group with one prefix, for the query heads of one key/value head.
    void attend(const Layer& layer, int64_t group, int64_t head, int64_t now) const {
        const int64_t first = groups[group], end = groups[group + 1], per_kv = m.n_head / m.n_kv_head;
        bool has_turn = false;  // the rows of a group may be in different ones
        for (int64_t i = first; i < end && !has_turn; i++) has_turn = turn(layer, i) == now;
        if (!has_turn) return;
        thread_local std::vector<float> memory;
        memory.assign((end - first) * per_kv * d, 0.0f);
        std::vector<Softmax> states((end - first) * per_kv);
        for (size_t j = 0; j < states.size(); j++)
            states[j] = {-std::numeric_limits<float>::infinity(), 0, memory.data() + j * d};
        auto query = [&](int64_t i, int64_t h) { return s.qkv + i * s.all_heads + (head * per_kv + h) * d; };
        auto start = [&](int64_t i) { return layer.window < 0 ? 0 : std::max<int64_t>(0, position(i) - layer.window); };
        if (prefix(first) >= 0) {
            const PrefixPart& p = b.shared[prefix(first) * b.n_parts + layer.part];
            const int64_t from = ((layer.index * m.n_kv_head + head) * p.room - p.first) * d, length = before(first);
            const T *k = static_cast<const T*>(p.k) + from, *v = static_cast<const T*>(p.v) + from;
            auto keys = [&](int64_t low, int64_t count) { return Keys{k + low * d, v + low * d, d, count, count, 0}; };
            for (int64_t at = p.first / BLOCK * BLOCK; at < length; at += BLOCK)
                for (int64_t i = first; i < end; i++) {
                    const int64_t low = std::max(at, start(i)), count = std::min(at + BLOCK, length) - low;
                    for (int64_t h = 0; h < per_kv && count > 0 && turn(layer, i) == now; h++)
                        see(states[(i - first) * per_kv + h], query(i, h), keys(low, count));
                }
        }
        const Part& p = b.parts[layer.part];
        const int64_t stride = p.place_stride;
        for (int64_t i = first; i < end; i++) {
            if (turn(layer, i) != now) continue;
            const T *k = place(p.k, layer, i, head), *v = place(p.v, layer, i, head);
            for (int64_t at = std::max<int64_t>(0, start(i) - before(i)); at <= b.at[i]; at += BLOCK) {
                const int64_t count = std::min(BLOCK, b.at[i] + 1 - at), from = at % p.places;
                const int64_t split = std::min(count, p.places - from);
                const Keys keys{k + from * stride, v + from * stride, stride, count, split, p.places};
                for (int64_t h = 0; h < per_kv; h++) see(states[(i - first) * per_kv + h], query(i, h), keys);
            }
            for (int64_t h = 0; h < per_kv; h++) {
                const Softmax& state = states[(i - first) * per_kv + h];
                const float scale = 1.0f / state.total;
                each(s.attended + i * s.heads + (head * per_kv + h) * d, d,
                     [&](auto get) { return get(static_cast<const float*>(state.values)) * scale; });
            }
        }
    }

    // Adds the product with a matrix to the residual stream; `which` of a layer's thin matrices go with it.
    void add(const T* a, int64_t stride, const Matrix& w, int64_t index, int64_t which) {
        if (b.adapters) team.share(b.n, [&](int64_t i) { shrunk(i, i, index, which, 1, a + i * stride); });
        product(team, a, b.n, stride, w, [&](int64_t i, int64_t at, int64_t width, float* y) {
            widened(i, i, index, which, 1, at, width, y);
            T* x = s.x + i * s.c + at;
            each(x, width, [&](auto get) { return get(static_cast<const T*>(x)) + rounded<T>(get(y)); });
        });
    }

    void block(const Layer& layer, int64_t index) {
        enter(layer, index);
        product(team, s.normed, b.n, s.c, layer.qkv, [&](int64_t i, int64_t at, int64_t width, float* y) {
            widened(i, i, index, QUERIES, 3, at, width, y);
            each(s.qkv + i * s.all_heads + at, width, [&](auto get) { return get(y); });
        });
        const int64_t all = turns(b, starts, b.parts[layer.part]);
        const bool is_offset = layer.offset >= 0;  // a token's keys then wait for those of the token before it
        team.share(b.n, [&](int64_t i) {
            remember(layer, index, i);
            if (!is_offset && turn(layer, i) == 0) keep(layer, i);
        });
        if (is_offset)
            team.share(b.n, [&](int64_t i) { if (turn(layer, i) == 0) keep(layer, i); });
        for (int64_t now = 0; now < all; now++) {
            if (now > 0)
                team.share(b.n, [&](int64_t i) { if (turn(layer, i) == now) keep(layer, i); });
            team.share((groups.size() - 1) * m.n_kv_head,
                       [&](int64_t j) { attend(layer, j / m.n_kv_head, j % m.n_kv_head, now); });
        }
        if (is_offset)
            team.share(b.n, [&](int64_t i) {
                if (i + 1 == b.n || row(i + 1) != row(i)) std::copy_n(keys_of(i), kv_dim, last_keys(layer, i));
            });
        add(s.attended, s.heads, layer.out, index, OUT);
        team.share(b.n, [&](int64_t i) {
            norm(s.x + i * s.c, layer.norm_2, s.normed + i * s.c);
            shrunk(i, i, index, FC, 1, s.normed + i * s.c);
        });
        product(team, s.normed, b.n, s.c, layer.fc, [&](int64_t i, int64_t at, int64_t width, float* y) {
            widened(i, i, index, FC, 1, at, width, y);
            each(s.inner + i * s.four_c + at, width, [&](auto get) {
                const vf h = rounded<T>(get(y)), positive = h < 0.0f ? vf{} : h;
                const vf u = 0.7978845608f * (h + 0.044715f * h * h * h);
                return m.is_gpt2 ? h * sigmoid(2.0f * u) : positive * positive;
            });
        });
        add(s.inner, s.four_c, layer.proj, index, PROJ);
        if (index == m.middle)
            team.share(b.n, [&](int64_t i) { std::copy_n(s.x + i * s.c, m.n_embd, s.middle + i * s.c); });
    }

    void end() {
        auto token = [&](int64_t j) { return b.outputs ? b.outputs[j] : j; };
        team.share(b.n_outputs, [&](int64_t j) {
            const int64_t i = token(j);
            const T *x = s.x + i * s.c, *middle = s.middle + i * s.c;
            T* y = s.x0 + j * s.c;
            if (m.middle >= 0)
                each(y, m.n_embd, [&](auto get) { return get(x) - rounded<T>(m.backout * get(middle)); });
            norm(m.middle >= 0 ? y : x, m.final_norm, s.normed + j * s.c);
            shrunk(i, j, m.n_layer, HEAD, 1, s.normed + j * s.c);
        });
        product(team, s.normed, b.n_outputs, s.c, m.head, [&](int64_t j, int64_t at, int64_t width, float* y) {
            widened(token(j), j, m.n_layer, HEAD, 1, at, width, y);
            each(b.logits + j * m.vocab + at, width, [&](auto get) {
                const vf z = rounded<T>(get(y));
                return m.softcap > 0 ? m.softcap * tanh(z / m.softcap) : z;
            });
        });
    }

    void run() {
        begin();
        for (int64_t i = 0; i < m.n_layer; i++) block(m.layers[i], i);
        if (b.n_outputs) end();
    }
};

// ---- what Python calls

template <class T>
static void run(const Model& m, const Batch& b, int64_t threads) {
    const Pass<T> pass(m, b, threads);
    int64_t phases = 10;
    for (int64_t i = 0; i < m.n_layer; i++) phases += 11 + 2 * pass.turns(b, pass.starts, b.parts[m.layers[i].part]);
    in_parallel(phases, threads, [&](Team team) {
        Pass<T> own(pass);
        own.team = team;
        own.run();
    });
}

// Number of the first token that would read or write outside the memory, or -1.
static int64_t first_outside(const Model& m, const Batch& b) {
    for (int64_t i = 0; i < b.n; i++) {
        const int64_t row = b.rows ? b.rows[i] : i, at = b.at[i];
        if (row < 0 || row >= b.cache_rows || b.ids[i] < 0 || b.ids[i] >= m.table_rows) return i;
        if (at < 0 || at >= b.room) return i;
        if (b.adapters && (b.adapters[i] < 0 || b.adapters[i] > m.n_adapters)) return i;
        const int64_t prefix = b.prefix ? b.prefix[row] : -1;
        if (prefix < -1 || prefix >= b.n_prefixes || (prefix >= 0 && b.lengths[prefix] < 0)) return i;
        if (at + (prefix < 0 ? 0 : b.lengths[prefix]) >= m.seq_len) return i;
    }
    return -1;
}

extern "C" {

int64_t struct_bytes(int64_t which) {
    return which == 0 ? sizeof(Matrix) : which == 1 ? sizeof(Layer) : which == 2 ? sizeof(Model)
         : which == 3 ? sizeof(Part) : which == 4 ? sizeof(PrefixPart) : which == 5 ? sizeof(Batch) : sizeof(Thin);
}

int64_t packed_numbers(int64_t n, int64_t k, int64_t is_bf16) {
    return panels(n) * NR * (is_bf16 ? padded<bf16>(k) : padded<float>(k));
}

int64_t scratch_bytes(const Model* m, int64_t capacity) {
    return m->is_bf16 ? 2 * Scratch<bf16>(*m, capacity, nullptr).total : 4 * Scratch<float>(*m, capacity, nullptr).total;
}

// Packs `source` (n, k) into the columns from `at` on.
void pack(const void* source, int64_t from_bf16, int64_t n, int64_t k, void* packed, int64_t to_bf16, int64_t at,
          int64_t threads) {
    auto work = [&](auto* from, auto* to) {
        in_parallel(1, threads, [&](Team team) {
            const int64_t first = at / NR;
            team.share(panels(at + n) - first, [&](int64_t j) { pack_panel(from, n, k, to, at, first + j); });
        });
    };
    auto into = [&](auto* from) { to_bf16 ? work(from, static_cast<bf16*>(packed)) : work(from, static_cast<float*>(packed)); };
    from_bf16 ? into(static_cast<const bf16*>(source)) : into(static_cast<const float*>(source));
}

// Writes n packed whole numbers from -127 to 127 in 8 bits.
void to_int8(const void* packed, int64_t is_bf16, int64_t n, void* out) {
    auto* to = static_cast<int8_t*>(out);
    is_bf16 ? squeeze(static_cast<const bf16*>(packed), n, to) : squeeze(static_cast<const float*>(packed), n, to);
}

// Computes the batch. Returns -1, or the number of a token that lies outside of what there is; then nothing is written.
int64_t decode(const Model* m, const Batch* b, int64_t threads) {
    const int64_t wrong = first_outside(*m, *b);
    if (wrong >= 0) return wrong;
    m->is_bf16 ? run<bf16>(*m, *b, threads) : run<float>(*m, *b, threads);
    return -1;
}
}
