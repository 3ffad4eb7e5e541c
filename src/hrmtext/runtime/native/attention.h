// Attention of one head within one row, forward and backward. What it reads is in the format of its
// products' inputs; sums, softmax and what it gives are in fp32.
//
// Letters: W tokens of the row, K head width.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"
#include "pack.h"
#include "products.h"
#include "vectors.h"

// One head of a row: its tokens are `stride` apart, those of what it gives `out_stride`.
template <class E>
struct Head {
    int64_t width, first;     // W; the first token whose output is wanted
    const int64_t* visible;   // (W) first position that a token does not see
    const E *q, *k, *v;
    int64_t stride;
    float* out;
    int64_t out_stride;
    float* logsum;  // of the scores, `logsum_stride` apart; null where no backward pass will come
    int64_t logsum_stride;
};

template <class E>
struct HeadGradients {
    const E* d_out;  // as `out`
    int64_t out_stride;
    float *q, *k, *v;
    int64_t stride;
};

// Where numbers of a product's format go that are computed from `count` in fp32.
inline float* beside(float, float* numbers, int64_t, Arena&) { return numbers; }
#if defined(__AVX512BF16__)
inline Bf16* beside(Bf16, float*, int64_t count, Arena& arena) {
    return arena.take<Bf16>(count + LANES);  // a product may read beyond the last
}
#endif

// `E`: float or Bf16.
template <class E>
class RowAttention {
  public:
    RowAttention(int64_t head_dim, int64_t longest, bool is_backward, Arena& arena)
        : K(head_dim), shrink(1.0f / std::sqrt(float(head_dim))) {
        const int64_t across = columns(longest);
        packed = arena.take<E>(across * K);
        scores = arena.take<float>(longest * across);
        weights = beside(E{}, scores, longest * across, arena);
        scales = arena.take<float>(longest);
        for (int l = 0; l < LANES; ++l) lanes[l] = l;
        if (!is_backward) return;
        d_scores = arena.take<float>(longest * across);
        d_weights = beside(E{}, d_scores, longest * across, arena);
        scratch = arena.take<float>(crossed_scratch(K));
    }

    void forward(const Head<E>& h) {
        const int64_t queries = h.width - h.first, across = columns(h.width);
        const E* q = h.q + h.first * h.stride;
        pack_tokens(h.k, h);
        product(packed, q, h.stride, K, queries, blocks(across), Put{scores, across});
        for (int64_t i = 0; i < queries; ++i) {
            const int64_t seen = h.visible[h.first + i];
            const float* here = scores + i * across;
            Vec most = spread(-INFINITY);
            for (int64_t j = 0; j < seen; j += LANES) {
                const Vec score = is_seen(j, seen) ? load(here + j) : spread(-INFINITY);
                most = score > most ? score : most;
            }
            const float peak = largest(most) * shrink;
            Vec totals{};
            for (int64_t j = 0; j < across; j += LANES) {
                const Vec weight = is_seen(j, seen) ? exp_of(load(here + j) * shrink - peak) : Vec{};
                put(weights + i * across + j, weight);
                totals += weight;
            }
            const float total = sum(totals);
            scales[i] = 1.0f / total;
            if (h.logsum) h.logsum[(h.first + i) * h.logsum_stride] = peak + std::log(total);
        }
        pack_dimensions(h.v, h);
        float* out = h.out + h.first * h.out_stride;
        product(packed, weights, across, whole(h.width), queries, blocks(K),
                [&](int64_t i, int64_t at, Vec left, Vec right) {
                    store(out + i * h.out_stride + at * LANES, left * scales[i]);
                    store(out + i * h.out_stride + at * LANES + LANES, right * scales[i]);
                });
    }

    // Gradients of keys and values of all tokens, and of queries from the first wanted one.
    void backward(const Head<E>& h, const HeadGradients<E>& d) {
        const int64_t queries = h.width - h.first, across = columns(h.width);
        const E *q = h.q + h.first * h.stride, *d_out = d.d_out + h.first * d.out_stride;
        pack_tokens(h.k, h);
        product(packed, q, h.stride, K, queries, blocks(across), Put{scores, across});
        pack_tokens(h.v, h);
        product(packed, d_out, d.out_stride, K, queries, blocks(across), Put{d_scores, across});
        for (int64_t i = 0; i < queries; ++i) {
            const float* out = h.out + (h.first + i) * h.out_stride;
            Vec dots{};
            for (int64_t k = 0; k < K; k += LANES)
                dots += load(out + k) * get(d_out + i * d.out_stride + k);
            const float dot = sum(dots), logsum = h.logsum[(h.first + i) * h.logsum_stride];
            const int64_t seen = h.visible[h.first + i], at = i * across;
            for (int64_t j = 0; j < across; j += LANES) {
                const Vec score = load(scores + at + j) * shrink, d_weight = load(d_scores + at + j);
                const Vec weight = is_seen(j, seen) ? exp_of(score - logsum) : Vec{};
                put(weights + at + j, weight);
                put(d_weights + at + j, weight * (d_weight - dot) * shrink);
            }
        }
        crossed_product(weights, across, d_out, d.out_stride, queries, h.width, K, d.v, d.stride,
                        false, scratch);
        crossed_product(d_weights, across, q, h.stride, queries, h.width, K, d.k, d.stride, false,
                        scratch);
        pack_dimensions(h.k, h);
        product(packed, d_weights, across, whole(h.width), queries, blocks(K),
                Put{d.q + h.first * d.stride, d.stride});
    }

  private:
    // Columns of scores: whole pairs of blocks.
    static int64_t columns(int64_t tokens) {
        return (tokens + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
    }

    IntVec is_seen(int64_t from, int64_t seen) const { return lanes + int32_t(from) < int32_t(seen); }

    // Keys or values with tokens as columns.
    void pack_tokens(const E* x, const Head<E>& h) {
        for (int64_t j = 0; j < columns(h.width); j += LANES)
            pack_rows(x + j * h.stride, h.stride, h.width - j, K, packed + j * K);
    }

    // The same with their dimensions as columns, over `whole(W)` tokens.
    void pack_dimensions(const E* x, const Head<E>& h) {
        for (int64_t k = 0; k < K; k += LANES)
            pack_columns(x + k, h.stride, h.width, packed + k * whole(h.width));
    }

    static int64_t whole(int64_t count) { return whole_inputs(E{}, count); }

    const int64_t K;
    const float shrink;
    IntVec lanes;
    E *packed, *weights, *d_weights = nullptr;
    float *scores, *scales, *d_scores = nullptr, *scratch = nullptr;
};
