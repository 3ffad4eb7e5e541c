// All calls of the stacks of a recurrence, one after the other, by threads that keep to their rows: they
// meet only to add up the gradients of weights.
//
// Letters as in block.h, and B blocks of a stack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "block.h"

extern "C" {

// One call: a stack's blocks over the sum of what it reads, and the norm at its exit.
struct Call {
    int64_t first_block;  // of the stack, among all
    int64_t selects;      // its last block gives only the outputs that are wanted
    const float *left, *right;  // (T, D), whose sum goes in; right may be null
    int64_t left_step;  // floats from one row of `left` to the next: D, or 0 where all are alike
    float* flow;        // (B + 1) x (T, D): what goes into each block, what comes out of the last
    int64_t flow_step;  // floats from one to the next; 0: in place, where no backward pass will come
    float* out;         // (T, D), or (S, D); may be `left` or `right`
    const Saved* saved; // (B); null where no backward pass will come
};

// Its backward pass.
struct CallBackward {
    int64_t call;
    const float *d_out, *d_other;  // gradients of the output, added up; one may be null
    float *d_left, *d_right;  // of what it read, where wanted: put there, or added; may be `d_out`
    int64_t adds_left, adds_right;
};

struct Recurrence {
    int64_t num_blocks, blocks_per_stack, num_calls;
    const Block* blocks;
    const Rows *rows, *selected;  // `selected`: with the outputs that are wanted
    float* d_flow;      // 2 x (T, D): gradients between blocks, and behind the last
    float* const* d_weights;  // four of each block, as hrm_block_backward has them
};
}

constexpr auto nothing = [](const Piece&) {};

// Adds up what threads computed each for themselves.
class Sums {
  public:
    explicit Sums(int64_t threads) : barrier_{int(threads)}, parts_(size_t(threads)) {}

    // To be called by all threads; `own`, of whole vectors, is free again afterwards.
    // `own` is `inside` of the block; `to`: of each of its weights.
    void collect(int64_t thread, const float* own, const Block& block, float* const* to, bool adds) {
        parts_[size_t(thread)] = own;
        barrier_.wait();
        const auto at = weight_bounds(block);
        for (size_t weight = 0; weight < 4; ++weight)
            add_up(thread, at[weight], at[weight + 1] - at[weight], to[weight], adds);
        barrier_.wait();
    }

  private:
    void add_up(int64_t thread, int64_t from, int64_t count, float* to, bool adds) const {
        const Range mine = part(count / LANES, thread, int64_t(parts_.size()));
        for (int64_t i = mine.begin * LANES; i < mine.end * LANES; i += LANES) {
            Vec sum = load(parts_[0] + from + i);
            for (size_t other = 1; other < parts_.size(); ++other) sum += load(parts_[other] + from + i);
            store(to + i, adds ? load(to + i) + sum : sum);
        }
    }

    Barrier barrier_;
    std::vector<const float*> parts_;
};

// A thread's way through all calls.
template <class E>
class Walk {
  public:
    Walk(const Recurrence& recurrence, const Call* calls, int64_t thread, bool is_backward,
         Arena arena)
        : m(recurrence), calls(calls), thread(thread), D(m.blocks[0].hidden),
          worker(m.blocks[0], *m.rows, is_backward, arena) {}

    void forward() {
        for (int64_t i = 0; i < m.num_calls; ++i) {
            forward(calls[i]);
            if (!calls[i].selects) clear_padding(calls[i].out);
        }
    }

    // `steps`: of the calls that carry gradient, the last call first.
    void backward(const CallBackward* steps, int64_t count, Sums& sums) {
        for (int64_t i = 0; i < count; ++i) {
            clear_padding(steps[i].d_left);
            clear_padding(steps[i].d_right);
        }
        std::vector<bool> begun(size_t(m.num_blocks));
        for (int64_t i = 0; i < count; ++i) backward(calls[steps[i].call], steps[i], sums, begun);
    }

  private:
    void forward(const Call& call) {
        for (int64_t at = 0; at < m.blocks_per_stack; ++at) {
            const bool is_first = at == 0, is_last = at + 1 == m.blocks_per_stack;
            float* x = call.flow + at * call.flow_step;
            float* y = x + call.flow_step;
            take(call, at);
            worker.forward(
                thread, x, y, [&](const Piece& p) { if (is_first) add_up(call, p, x); },
                [&](const Piece& p) { if (is_last) exit_norm(p, y, call.out); });
        }
    }

    void backward(const Call& call, const CallBackward& step, Sums& sums, std::vector<bool>& begun) {
        for (int64_t at = m.blocks_per_stack; at-- > 0;) {
            const bool is_first = at == 0, is_last = at + 1 == m.blocks_per_stack;
            const float* x = call.flow + at * call.flow_step;
            float* d_x = m.d_flow;
            // Outputs may be fewer than tokens: their gradients have a place of their own.
            float* d_y = is_last ? d_x + m.rows->tokens * D : d_x;
            take(call, at);
            worker.backward(
                thread, x, d_y, d_x,
                [&](const Piece& p) {
                    if (is_last) exit_norm_backward(step, p, x + call.flow_step, d_y);
                },
                [&](const Piece& p) {
                    if (is_first) hand_on(p, d_x, step.d_left, step.adds_left);
                    if (is_first) hand_on(p, d_x, step.d_right, step.adds_right);
                });
            const size_t block = size_t(call.first_block + at);
            sums.collect(thread, worker.weights, m.blocks[block], m.d_weights + 4 * block, begun[block]);
            begun[block] = true;
        }
    }

    void take(const Call& call, int64_t at) {
        const bool selects = call.selects && at + 1 == m.blocks_per_stack;
        worker.take(m.blocks[call.first_block + at], selects ? *m.selected : *m.rows,
                    call.saved ? call.saved[at] : Saved{});
    }

    void add_up(const Call& call, const Piece& p, float* x) const {
        for (int64_t token = p.first; token < p.first + p.count; ++token) {
            const float* left = call.left + token * call.left_step;
            const float* right = call.right ? call.right + token * D : nullptr;
            for (int64_t i = 0; i < D; i += LANES)
                store(x + token * D + i, right ? load(left + i) + load(right + i) : load(left + i));
        }
    }

    // What is behind the last row of a state or of its gradient.
    void clear_padding(float* rows) const {
        if (thread != 0 || !rows) return;
        std::fill(rows + m.rows->starts[m.rows->rows] * D, rows + m.rows->tokens * D, 0.0f);
    }

    void exit_norm(const Piece& p, const float* y, float* out) const {
        const int64_t end = (p.first_output + p.outputs) * D;
        for (int64_t at = p.first_output * D; at < end; at += D) {
            const float factor = norm_factor(y + at, D, eps());
            for (int64_t i = at; i < at + D; i += LANES) store(out + i, load(y + i) * factor);
        }
    }

    void exit_norm_backward(const CallBackward& step, const Piece& p, const float* y, float* d_y) const {
        const int64_t begin = p.first_output * D, end = begin + p.outputs * D;
        const float* d_out = step.d_out ? step.d_out : step.d_other;
        if (step.d_out && step.d_other) {
            for (int64_t i = begin; i < end; i += LANES)
                store(d_y + i, load(step.d_out + i) + load(step.d_other + i));
            d_out = d_y;
        }
        for (int64_t at = begin; at < end; at += D)
            norm_backward(y + at, d_out + at, d_y + at, D, eps());
    }

    void hand_on(const Piece& p, const float* d_x, float* to, bool adds) const {
        if (!to) return;
        const int64_t end = (p.first + p.count) * D;
        for (int64_t i = p.first * D; i < end; i += LANES)
            store(to + i, adds ? load(to + i) + load(d_x + i) : load(d_x + i));
    }

    float eps() const { return m.blocks[0].eps; }

    const Recurrence& m;
    const Call* calls;
    const int64_t thread, D;
    Worker<E> worker;
};
