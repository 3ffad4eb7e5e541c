// The head's cross-entropy and its gradients on a CPU, of all logits of a step at once: softmax in fp32,
// products in fp32 or bf16.
//
// Letters: S supervised tokens, D hidden size, V vocabulary.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "arena.h"
#include "pack.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

extern "C" {

struct LossTask {
    int64_t tokens, hidden, vocab, threads;  // S, D, V; D and V in whole pairs of vectors
    int64_t bf16;                            // products multiply in bf16, else in fp32
    float scale;                             // of the gradients
    const float *states, *weight;            // (S, D), (V, D)
    const int64_t* labels;                   // (S)
    float* losses;                           // (S), unscaled
    uint8_t* correct;                        // (S): the label is the first of the highest logits
    float *d_states, *d_weight;              // (S, D), (V, D); both null where none are wanted
};
}

template <class E>
class Loss {
  public:
    Loss(const LossTask& head, Arena arena) : h(head), S(h.tokens), D(h.hidden), V(h.vocab) {
        packed = arena.take<E>(V * D);
        states = arena.take<E>(S * (D + BETWEEN));
        if (h.d_states) {
            transposed = arena.take<E>(V * D);
            d_logits = arena.take<E>(S * (V + BETWEEN));
        }
        logits = arena.take<float>(h.threads * NEAR_ROWS * V);
        scratch = arena.take<float>(h.threads * crossed_scratch(D));
        used = arena.used();
    }

    void run(int64_t thread, Barrier& barrier) {
        pack<E>(h.weight, V, D, false, in_order, thread, h.threads, packed);
        if (h.d_states) pack<E>(h.weight, V, D, true, in_order, thread, h.threads, transposed);
        barrier.wait();
        const Range mine = part(S, thread, h.threads);
        for (int64_t at = mine.begin; at < mine.end; at += NEAR_ROWS)
            rows(at, std::min(NEAR_ROWS, mine.end - at), logits + thread * NEAR_ROWS * V);
        if (!h.d_weight) return;
        barrier.wait();
        const Range blocks = part(V / LANES, thread, h.threads);
        const int64_t first = blocks.begin * LANES;
        crossed_product(d_logits + first, V + BETWEEN, states, D + BETWEEN, S, blocks.end * LANES - first, D,
                        h.d_weight + first * D, D, false, scratch + thread * crossed_scratch(D));
    }

    int64_t used;  // floats

  private:
    void rows(int64_t at, int64_t count, float* sums) {
        for (int64_t row = at; row < at + count; ++row)
            for (int64_t i = 0; i < D; i += LANES)
                put(states + row * (D + BETWEEN) + i, load(h.states + row * D + i));
        product<>(static_cast<const E*>(packed), static_cast<const E*>(states + at * (D + BETWEEN)), D + BETWEEN,
                  D, count, blocks(V), Put{sums, V});
        for (int64_t row = 0; row < count; ++row) softmax(at + row, sums + row * V);
        if (h.d_states)
            product<>(static_cast<const E*>(transposed),
                      static_cast<const E*>(d_logits + at * (V + BETWEEN)), V + BETWEEN, V, count, blocks(D),
                      Put{h.d_states + at * D, D});
    }

    void softmax(int64_t token, float* row) {
        Vec most = load(row);
        for (int64_t i = LANES; i < V; i += LANES) {
            const Vec other = load(row + i);
            most = other > most ? other : most;
        }
        const int64_t label = h.labels[token];
        const float peak = largest(most), wanted = row[label];
        h.correct[token] = wanted == peak && std::find(row, row + label, peak) == row + label;
        Vec totals{};
        for (int64_t i = 0; i < V; i += LANES) {
            const Vec weight = exp_of(load(row + i) - peak);
            store(row + i, weight);
            totals += weight;
        }
        const float total = sum(totals);
        h.losses[token] = std::log(total) - (wanted - peak);
        if (!h.d_states) return;
        const float factor = h.scale / total;
        E* to = d_logits + token * (V + BETWEEN);
        row[label] -= total;
        for (int64_t i = 0; i < V; i += LANES) put(to + i, load(row + i) * factor);
    }

    static constexpr int64_t BETWEEN = 32;  // rows, against strides of powers of two

    const LossTask& h;
    const int64_t S, D, V;
    E *packed, *states, *transposed = nullptr, *d_logits = nullptr;
    float *logits, *scratch;
};

// Of the supervised tokens, those of a row together: sum of the losses, tokens that are right, rows without
// a wrong one, rows.
inline void sum_up(const LossTask& head, const int64_t* row_of, int64_t rows, double* sums) {
    double loss = 0.0;
    int64_t right = 0, wrong_rows = 0, last_wrong = -1;
    for (int64_t t = 0; t < head.tokens; ++t) {
        loss += head.losses[t];
        right += head.correct[t];
        if (head.correct[t] || row_of[t] == last_wrong) continue;
        last_wrong = row_of[t];
        ++wrong_rows;
    }
    sums[0] = loss, sums[1] = double(right), sums[2] = double(rows - wrong_rows), sums[3] = double(rows);
}
