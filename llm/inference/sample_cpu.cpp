// Draws one token per row from logits: what llm/inference/sampling.py defines, by passes over numbers in the cache.
//
// Probabilities and their sums are doubles. Nothing is sorted but the few tokens around the two places that matter:
// where top_p ends, and where the draw falls.
#include <algorithm>
#include <limits>
#include <vector>

#include "../model/cpu_team.h"
#include "../model/cpu_vector.h"

constexpr int DL = VL / 2;  // doubles in a vector
typedef double vd __attribute__((vector_size(4 * VL)));
typedef int64_t vl __attribute__((vector_size(4 * VL)));
typedef float half_vf __attribute__((vector_size(2 * VL)));

constexpr int64_t BROKEN = -1;
constexpr int64_t PART = 64;         // tokens whose probabilities are summed before the draw is looked for among them
constexpr int64_t BUCKETS = 1024;    // of tokens by their distance from the best one
constexpr float PER_NAT = 16.0f;     // buckets per unit of that distance; the last one holds all that is farther

// e^x for x <= 0, to 2 units in the last place; 0 below -708.
static inline vd exp(vd x) {
    const vd magic = vd{} + 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
    const vd low = x < -708.0 ? vd{} - 708.0 : x;
    const vd t = low * 1.4426950408889634 + magic, n = t - magic;
    vd r = low - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    const vd square = r * r;
    vd p = 1.26177193074810590878e-4 * square + 3.02994407707441961300e-2;
    p = (p * square + 9.99999999999999999910e-1) * r;
    vd q = 3.00198505138664455042e-6 * square + 2.52448340349684104192e-3;
    q = (q * square + 2.27265548208155028766e-1) * square + 2.00000000000000000005;
    const vd e = 1.0 + 2.0 * (p / (q - p));
    return x < -708.0 ? vd{} : (vd)((vl)e + ((vl)t << 52));
}

struct Token {
    float z;
    int64_t id;
    bool operator<(const Token& other) const { return z > other.z || (z == other.z && id < other.id); }  // best first
};

struct Row {
    std::vector<float> z;        // logits over temperature; behind them -inf up to a whole part
    std::vector<double> weight;  // e^(z - best)
    std::vector<Token> some;
    int64_t vocab;
    float best;
    double min_p;  // tokens whose weight is less are not drawn

    // Divides by the temperature and finds the largest; returns whether all are numbers and one is the largest.
    bool read(const float* logits, int64_t n, float temperature) {
        vocab = n;
        z.assign((n + PART - 1) / PART * PART, -std::numeric_limits<float>::infinity());
        std::copy(logits, logits + n, z.begin());
        vf most = all(-std::numeric_limits<float>::infinity());
        vi broken{};
        for (size_t i = 0; i < z.size(); i += VL) {
            const vf v = load(&z[i]) / temperature;
            store(&z[i], v);
            broken |= v != v;
            most = v > most ? v : most;
        }
        best = largest(most);
        for (int i = 0; i < VL; i++)
            if (broken[i]) return false;
        return std::isfinite(best);
    }

    double cut(double w) const { return w < min_p ? 0.0 : w; }

    // Fills in the weights of all tokens, those below min_p included; returns their sum.
    double weigh() {
        weight.resize(z.size());
        vd total{};
        for (size_t i = 0; i < z.size(); i += DL) {
            half_vf part;
            std::memcpy(&part, &z[i], sizeof part);
            const vd e = exp(__builtin_convertvector(part, vd) - double(best));
            std::memcpy(&weight[i], &e, sizeof e);
            total += e;
        }
        double sum = 0;
        for (int i = 0; i < DL; i++) sum += total[i];
        return sum;
    }

    double weigh(float value) const { return exp(vd{} + (double(value) - double(best)))[0]; }

    int64_t draw_from_all(double draw) {
        double total = weigh();
        if (min_p > 0) {
            total = 0;
            for (double& w : weight) total += w = cut(w);
        }
        double left = draw * total;
        int64_t last = 0;
        for (int64_t at = 0; at < int64_t(z.size()); at += PART) {
            double part = 0;
            for (int64_t i = at; i < at + PART; i++) part += weight[i];
            if (part > left) {
                for (int64_t i = at; i < at + PART; left -= weight[i++]) {
                    if (weight[i] > left) return i;
                    if (weight[i] > 0) last = i;
                }
                return last;
            }
            if (part > 0) last = at + PART - 1;
            left -= part;
        }
        while (last > 0 && (last >= vocab || weight[last] == 0)) last--;
        return last;
    }

    // Puts the k best tokens into `some`, best first.
    void find_best(int64_t k) {
        const size_t room = 2 * k + 64;
        auto shorten = [&] {
            if (int64_t(some.size()) >= k) {
                std::nth_element(some.begin(), some.begin() + (k - 1), some.end());
                some.resize(k);
            }
        };
        some.clear();
        float least = -std::numeric_limits<float>::infinity();
        bool is_full = false;  // then only a token above `least` can be among the best
        for (int64_t at = 0; at < vocab; at += VL) {
            const vi above = load(&z[at]) > least;
            if (is_full && std::all_of(reinterpret_cast<const int32_t*>(&above), reinterpret_cast<const int32_t*>(&above) + VL,
                                       [](int32_t x) { return !x; }))
                continue;
            for (int64_t i = at; i < std::min(at + VL, vocab); i++)
                if (!is_full || z[i] > least) some.push_back({z[i], i});
            if (some.size() + VL > room || (!is_full && int64_t(some.size()) >= k)) {
                shorten();
                is_full = true;
                least = some[k - 1].z;  // nth_element puts the last of the k best there
            }
        }
        shorten();
        std::sort(some.begin(), some.end());
    }

    // Draws from `some`, best first, as far as they hold the share top_p of their sum.
    int64_t draw_from_best(double top_p, double draw) {
        double total = 0, kept = 0;
        weight.clear();
        for (const Token& token : some) weight.push_back(weigh(token.z)), total += weight.back();
        size_t n = 0;
        for (; n < some.size() && (n == 0 || kept < top_p * total) && cut(weight[n]) > 0; n++) kept += weight[n];
        return pick(n, draw * kept);
    }

    // Returns the token of the first n of `some` at which the sum of weights passes `left`.
    int64_t pick(size_t n, double left) const {
        size_t last = 0;
        for (size_t i = 0; i < n; left -= weight[i++]) {
            if (weight[i] > left) return some[i].id;
            if (weight[i] > 0) last = i;
        }
        return some[last].id;
    }

    static int64_t bucket(float distance) {
        const float at = distance * PER_NAT;
        return at < float(BUCKETS - 1) ? int64_t(at) : BUCKETS - 1;
    }

    // Puts the tokens of a bucket into `some`, best first, and their weights beside them.
    void open(int64_t index) {
        some.clear();
        for (int64_t i = 0; i < vocab; i++)
            if (bucket(best - z[i]) == index) some.push_back({z[i], i});
        std::sort(some.begin(), some.end());
        weight.clear();
        for (const Token& token : some) weight.push_back(cut(weigh(token.z)));
    }

    int64_t draw_from_top_p(double top_p, double draw) {
        const double total = weigh(), goal = top_p * total;
        double sums[BUCKETS] = {}, before = 0;
        for (int64_t i = 0; i < vocab; i++) sums[bucket(best - z[i])] += cut(weight[i]);
        int64_t end = 0;
        while (end < BUCKETS - 1 && before + sums[end] < goal) before += sums[end++];
        open(end);
        double kept = before;
        size_t n = 0;
        for (; n < some.size() && (kept < goal || (n == 0 && end == 0)); n++) kept += weight[n];
        double left = draw * kept;
        int64_t index = 0;
        for (; index < end && sums[index] <= left; index++) left -= sums[index];
        if (index < end) {
            open(index);
            n = some.size();
        }
        if (n == 0) {  // rounding led past all that is left: its last token
            for (index = end; index > 0 && !(sums[index - 1] > 0); index--) continue;
            if (index == 0) return BROKEN;
            open(index - 1);
            n = some.size();
            left = std::numeric_limits<double>::infinity();
        }
        return pick(n, left);
    }
};

struct Settings {  // of every row
    const float* temperature;  // 0: the most likely token
    const int64_t* top_k;      // 0: all
    const double *top_p, *min_p, *draws;
};

static int64_t sample_row(Row& row, const float* logits, int64_t vocab, const Settings& s, int64_t i) {
    const bool is_greedy = s.temperature[i] <= 0;
    if (!row.read(logits, vocab, is_greedy ? 1.0f : s.temperature[i])) return BROKEN;
    if (is_greedy) return std::find(row.z.begin(), row.z.end(), row.best) - row.z.begin();
    row.min_p = s.min_p[i];
    if (s.top_k[i] > 0 && s.top_k[i] < vocab) {
        row.find_best(s.top_k[i]);
        return row.draw_from_best(s.top_p[i], s.draws[i]);
    }
    return s.top_p[i] < 1 ? row.draw_from_top_p(s.top_p[i], s.draws[i]) : row.draw_from_all(s.draws[i]);
}

// Draws from logits (n, vocab), rows `stride` numbers apart, into ids (n,).
extern "C" void sample(const float* logits, int64_t n, int64_t vocab, int64_t stride, const Settings* settings, int64_t* ids,
                       int64_t threads) {
    in_parallel(1, threads, [&](Team team) {
        Row row;
        team.share(n, [&](int64_t i) { ids[i] = sample_row(row, logits + i * stride, vocab, *settings, i); });
    });
}
