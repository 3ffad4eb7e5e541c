// Adam-atan2 and the average of the weights, element by element, in one pass over the memory; and how
// large an update was.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "threads.h"
#include "vectors.h"

extern "C" {

struct Numbers {
    float decay;            // 1 - lr * weight decay
    float one_minus_beta1, beta2, one_minus_beta2;
    float rate;             // lr / (1 - beta1^t)
    float correction;       // 1 / sqrt(1 - beta2^t)
    float one_minus_ema;
};

struct Arrays {
    float *weight, *first, *second, *average;  // average: null where none is kept
};

struct Parameter {
    Arrays arrays;
    const float* gradient;
    int64_t count;
};

struct Moments {
    const float *weight, *first, *second;
    int64_t count;
    float correction;
};

int64_t hrm_optimizer_lanes() { return LANES; }
}

namespace {

// Elements from which a thread of its own pays.
constexpr int64_t MIN_OWN = 1 << 14;
// Parts that are summed apart.
constexpr int64_t MOST_PARTS = 64;

Vec root(Vec x) {
    for (int l = 0; l < LANES; ++l) x[l] = __builtin_sqrtf(x[l]);  // one instruction, vectorised
    return x;
}

Vec magnitude(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

// atan2(y, x) of x >= 0, to about 2 units in the last place; 0 of (0, 0). The polynomial was fitted for
// this: least relative error of the arc tangent up to tan(pi / 8).
Vec atan2_of(Vec y, Vec x) {
    const Vec up = magnitude(y);
    const IntVec is_steep = up > x;
    const Vec least = is_steep ? x : up, most = is_steep ? up : x;
    const IntVec is_wide = least > most * spread(0.41421356f);
    const Vec over = is_wide ? least - most : least, under = is_wide ? least + most : most;
    const Vec z = over / (under == Vec{} ? spread(1.0f) : under), z2 = z * z;
    Vec p = spread(-0.06083385f);
    p = p * z2 + spread(0.10595972f);
    p = p * z2 + spread(-0.14243844f);
    p = p * z2 + spread(0.19998489f);
    p = p * z2 + spread(-0.33333316f);
    Vec angle = z + z * z2 * p;
    angle = is_wide ? angle + spread(0.78539816f) : angle;
    angle = is_steep ? spread(1.57079633f) - angle : angle;
    return (Vec)((IntVec)angle | ((IntVec)y & IntVec(spread(-0.0f))));
}

// One vector, by its gradient.
void update(const Arrays& a, int64_t i, Vec g, const Numbers& n) {
    const Vec old = load(a.first + i);
    const Vec m = old + (g - old) * n.one_minus_beta1;
    const Vec v = load(a.second + i) * n.beta2 + g * g * n.one_minus_beta2;
    const Vec w = load(a.weight + i) * n.decay - atan2_of(m, root(v) * n.correction) * n.rate;
    store(a.first + i, m);
    store(a.second + i, v);
    store(a.weight + i, w);
    if (!a.average) return;
    const Vec average = load(a.average + i);
    store(a.average + i, average + (w - average) * n.one_minus_ema);
}

// The last elements, fewer than a vector.
void update_rest(const Parameter& p, int64_t from, const Numbers& n) {
    float rest[4][LANES] = {};
    float* const arrays[] = {p.arrays.weight, p.arrays.first, p.arrays.second, p.arrays.average};
    for (int k = 0; k < 4; ++k)
        if (arrays[k]) std::copy(arrays[k] + from, arrays[k] + p.count, rest[k]);
    float gradient[LANES] = {};
    std::copy(p.gradient + from, p.gradient + p.count, gradient);
    update({rest[0], rest[1], rest[2], rest[3]}, 0, load(gradient), n);
    for (int k = 0; k < 4; ++k)
        if (arrays[k]) std::copy(rest[k], rest[k] + (p.count - from), arrays[k] + from);
}

int64_t worthwhile(int64_t count, int64_t threads) {
    const int64_t worth = count / MIN_OWN;
    return worth < 1 ? 1 : worth < threads ? worth : threads;
}

// Sum of the squares of value(i), vectors from element i on, over `count`; in fp32 over no more than BLOCK
// at a time. `value` gives zeros beyond `count`.
template <class Value>
double squares(int64_t from, int64_t count, const Value& value) {
    constexpr int64_t BLOCK = 1 << 10;
    double total = 0.0;
    for (const int64_t end = from + count; from < end; from += BLOCK) {
        const int64_t to = std::min(end, from + BLOCK);
        Vec sums{};
        for (int64_t i = from; i < to; i += LANES) {
            const Vec x = value(i, to);
            sums += x * x;
        }
        total += sum(sums);
    }
    return total;
}

// The numbers from i on, zeros from `end` on.
Vec load_until(const float* x, int64_t i, int64_t end) {
    if (i + LANES <= end) return load(x + i);
    float rest[LANES] = {};
    std::copy(x + i, x + end, rest);
    return load(rest);
}

// One sum of squares for each of `num` counts, the same whatever the number of threads: value(n, i, end).
template <class Value>
void squares_on_threads(const int64_t* counts, int64_t num, double* found, int64_t threads,
                        const Value& value) {
    std::vector<int64_t> firsts(num + 1);  // parts, of all
    for (int64_t n = 0; n < num; ++n) firsts[n + 1] = firsts[n] + worthwhile(counts[n], MOST_PARTS);
    std::vector<double> sums(firsts[num]);
    threads = std::max<int64_t>(1, std::min(threads, firsts[num]));
    on_threads(threads, [&](int64_t thread) {
        const Range mine = part(firsts[num], thread, threads);
        int64_t n = 0;
        for (int64_t p = mine.begin; p < mine.end; ++p) {
            while (firsts[n + 1] <= p) ++n;
            const Range of = part(counts[n], p - firsts[n], firsts[n + 1] - firsts[n]);
            sums[p] = squares(of.begin, of.end - of.begin,
                              [&](int64_t i, int64_t end) { return value(n, i, end); });
        }
    });
    for (int64_t n = 0; n < num; ++n)
        found[n] = std::accumulate(&sums[firsts[n]], &sums[0] + firsts[n + 1], 0.0);
}

}  // namespace

// Of `num` parameters the squared norms of atan2(first, sqrt(second) * correction), then those of the weights.
extern "C" void hrm_update_squares(const Moments* all, int64_t num, double* found, int64_t threads) {
    std::vector<int64_t> counts(2 * num);
    for (int64_t n = 0; n < 2 * num; ++n) counts[n] = all[n % num].count;
    squares_on_threads(counts.data(), 2 * num, found, threads, [=](int64_t n, int64_t i, int64_t end) {
        const Moments& one = all[n % num];
        if (n >= num) return load_until(one.weight, i, end);
        const Vec m = load_until(one.first, i, end), v = load_until(one.second, i, end);
        return atan2_of(m, root(v) * one.correction);
    });
}

// Squared norms of `num` tensors.
extern "C" void hrm_squares(const float* const* tensors, const int64_t* counts, int64_t num,
                            double* found, int64_t threads) {
    squares_on_threads(counts, num, found, threads, [=](int64_t n, int64_t i, int64_t end) {
        return load_until(tensors[n], i, end);
    });
}

// A step of `num` parameters.
extern "C" void hrm_adam_atan2(const Parameter* parameters, int64_t num, const Numbers* numbers,
                               int64_t threads) {
    const Numbers n = *numbers;
    int64_t all = 0;
    for (int64_t at = 0; at < num; ++at) all += parameters[at].count;
    threads = worthwhile(all, threads);
    on_threads(threads, [&](int64_t thread) {
        for (int64_t at = 0; at < num; ++at) {
            const Parameter p = parameters[at];
            const int64_t whole = p.count / LANES;
            const Range mine = part(whole, thread, threads);
            for (int64_t i = mine.begin * LANES; i < mine.end * LANES; i += LANES)
                update(p.arrays, i, load(p.gradient + i), n);
            if (thread == 0 && p.count % LANES) update_rest(p, whole * LANES, n);
        }
    });
}

// The same of a table whose gradient is that of `given` rows, ascending, and zero elsewhere. `width` is a
// multiple of the vector's.
extern "C" void hrm_adam_atan2_rows(float* weight, const float* gradient, const int64_t* given,
                                    int64_t num_given, int64_t rows, int64_t width, float* first,
                                    float* second, float* average, const Numbers* numbers,
                                    int64_t threads) {
    const Arrays all{weight, first, second, average};
    const Numbers n = *numbers;
    threads = worthwhile(rows * width, threads);
    on_threads(threads, [&](int64_t thread) {
        const Range mine = part(rows, thread, threads);
        int64_t next = std::lower_bound(given, given + num_given, mine.begin) - given;
        for (int64_t row = mine.begin; row < mine.end; ++row) {
            const bool has_gradient = next < num_given && given[next] == row;
            const float* g = has_gradient ? gradient + next++ * width : nullptr;
            for (int64_t i = 0; i < width; i += LANES)
                update(all, row * width + i, g ? load(g + i) : Vec{}, n);
        }
    });
}
