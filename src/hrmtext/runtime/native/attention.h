// Attention of one head within one row, forward and backward, in fp32.
//
// Letters: W tokens of the row, K head width.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"
#include "products.h"
#include "vectors.h"

// One head of a row: its tokens are `stride` apart, those of what it gives `out_stride`.
struct Head {
    int64_t width, first;     // W; the first token whose output is wanted
    const int64_t* visible;   // (W) first position that a token does not see
    const float *q, *k, *v;
    int64_t stride;
    float* out;
    int64_t out_stride;
    float* logsum;  // of the scores, `logsum_stride` apart; null where no backward pass will come
    int64_t logsum_stride;
};

struct HeadGradients {
    const float* d_out;  // as `out`
    int64_t out_stride;
    float *q, *k, *v;
    int64_t stride;
};

class RowAttention {
  public:
    RowAttention(int64_t head_dim, int64_t longest, bool is_backward, Arena& arena)
        : K(head_dim), shrink(1.0f / std::sqrt(float(head_dim))) {
        packed = arena.take<float>(columns(longest) * K);
        scores = arena.take<float>(longest * columns(longest));
        scales = arena.take<float>(longest);
        if (!is_backward) return;
        packed_too = arena.take<float>(columns(longest) * K);
        d_scores = arena.take<float>(longest * columns(longest));
        scratch = arena.take<float>(crossed_scratch(K));
    }

    void forward(const Head& h) {
        const int64_t queries = h.width - h.first, across = columns(h.width);
        pack_tokens(h.k, h, packed);
        product(packed, h.q + h.first * h.stride, h.stride, K, queries, blocks(across),
                [&](int64_t i, int64_t at, Vec left, Vec right) {
                    store(scores + i * across + at * LANES, left * shrink);
                    store(scores + i * across + at * LANES + LANES, right * shrink);
                });
        for (int64_t i = 0; i < queries; ++i) {
            float* here = scores + i * across;
            hide(here, h.visible[h.first + i], across, -INFINITY);
            Vec most = load(here);
            for (int64_t j = LANES; j < across; j += LANES) {
                const Vec other = load(here + j);
                most = other > most ? other : most;
            }
            const float peak = largest(most);
            Vec totals{};
            for (int64_t j = 0; j < across; j += LANES) {
                const Vec score = load(here + j);
                const Vec weight = score == spread(-INFINITY) ? Vec{} : exp_of(score - peak);
                store(here + j, weight);
                totals += weight;
            }
            const float total = sum(totals);
            scales[i] = 1.0f / total;
            if (h.logsum) h.logsum[(h.first + i) * h.logsum_stride] = peak + std::log(total);
        }
        pack_dimensions(h.v, h, packed);
        float* out = h.out + h.first * h.out_stride;
        product(packed, scores, across, h.width, queries, blocks(K),
                [&](int64_t i, int64_t at, Vec left, Vec right) {
                    store(out + i * h.out_stride + at * LANES, left * scales[i]);
                    store(out + i * h.out_stride + at * LANES + LANES, right * scales[i]);
                });
    }

    // Gradients of keys and values of all tokens, and of queries from the first wanted one.
    void backward(const Head& h, const HeadGradients& d) {
        const int64_t queries = h.width - h.first, across = columns(h.width);
        const float* q = h.q + h.first * h.stride;
        const float* d_out = d.d_out + h.first * d.out_stride;
        pack_tokens(h.k, h, packed);
        product(packed, q, h.stride, K, queries, blocks(across), Put{scores, across});
        pack_tokens(h.v, h, packed_too);
        product(packed_too, d_out, d.out_stride, K, queries, blocks(across), Put{d_scores, across});
        for (int64_t i = 0; i < queries; ++i) {
            const float* out = h.out + (h.first + i) * h.out_stride;
            Vec dots{};
            for (int64_t k = 0; k < K; k += LANES) dots += load(out + k) * load(d_out + i * d.out_stride + k);
            const float dot = sum(dots), logsum = h.logsum[(h.first + i) * h.logsum_stride];
            float *p = scores + i * across, *d_p = d_scores + i * across;
            for (int64_t j = 0; j < across; j += LANES) {
                const Vec weight = exp_of(load(p + j) * shrink - logsum);
                store(p + j, weight);
                store(d_p + j, weight * (load(d_p + j) - dot) * shrink);
            }
            hide(p, h.visible[h.first + i], across, 0.0f);
            hide(d_p, h.visible[h.first + i], across, 0.0f);
        }
        crossed_product(scores, across, d_out, d.out_stride, queries, h.width, K, d.v, d.stride,
                        false, scratch);
        crossed_product(d_scores, across, q, h.stride, queries, h.width, K, d.k, d.stride, false,
                        scratch);
        pack_dimensions(h.k, h, packed);
        product(packed, d_scores, across, h.width, queries, blocks(K),
                Put{d.q + h.first * d.stride, d.stride});
    }

  private:
    // Columns of scores: whole pairs of blocks.
    static int64_t columns(int64_t tokens) {
        return (tokens + 2 * LANES - 1) / (2 * LANES) * 2 * LANES;
    }

    static void hide(float* row, int64_t seen, int64_t across, float with) {
        std::fill(row + seen, row + across, with);
    }

    // Keys or values with tokens as columns, (W / LANES, K, LANES).
    void pack_tokens(const float* x, const Head& h, float* to) const {
        for (int64_t j = 0; j < columns(h.width); j += LANES)
            for (int64_t k = 0; k < K; k += LANES)
                transpose(x + j * h.stride + k, h.stride, h.width - j, to + (j * K + k * LANES));
    }

    // The same with their dimensions as columns, (K / LANES, W, LANES).
    void pack_dimensions(const float* x, const Head& h, float* to) const {
        for (int64_t k = 0; k < K; k += LANES)
            for (int64_t j = 0; j < h.width; ++j)
                store(to + (k / LANES * h.width + j) * LANES, load(x + j * h.stride + k));
    }

    const int64_t K;
    const float shrink;
    float *packed, *scores, *scales, *packed_too = nullptr, *d_scores = nullptr, *scratch = nullptr;
};
