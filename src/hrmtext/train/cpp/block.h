// A block of an HRM on a CPU, forward and backward, over packed rows in fp32; its products may multiply in
// bf16, and add in fp32. What is kept for the backward pass of projections is in that format.
//
// Letters: T tokens of the stream, S those whose output is wanted, R rows, D hidden size, N heads,
// K head width, A = N * K, M SwiGLU width, W tokens of a row.
//
// Threads take whole rows and share nothing that is written but the sum of the weights' gradients.
// Weights come packed, as products.h says; for gradients of inputs also transposed and packed.

#pragma once

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "around.h"
#include "attention.h"
#include "layout.h"
#include "norms.h"
#include "pack.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

// Some rows of a thread: their tokens and outputs, both counted from the first of all.
struct Piece {
    int64_t first, count, first_output, outputs;
};

// A thread's rows on their way through a block, some at a time: what is between the products of some
// stays near. `E`: the format of the products' inputs, float or Bf16.
template <class E>
class Worker {
  public:
    // `block`: of the size of all that it will compute.
    Worker(const Block& block, const Rows& rows, bool is_backward, Arena arena)
        : b(block), r(rows), A(block.heads * block.head_dim), K(block.head_dim),
          D(block.hidden), M(block.mlp), wide(4 * A + LINE_GAP<E>), attn(A + GAP), flow(D + GAP),
          both(2 * M + LINE_GAP<E>), inner(M + LINE_GAP<E>), chunk(r.piece + r.piece / 2),
          attention(K, rows.longest, is_backward, arena) {
        const int64_t most = std::max(r.longest, r.piece + (r.longest + 1) / 2);  // tokens at once
        normed = arena.take<E>(most * flow);
        gated = arena.take<E>(most * attn);
        chosen = arena.take<E>(most * flow);
        act = arena.take<E>(chunk * inner);
        if (!is_backward) {
            own_gqkv = arena.take<E>(most * wide);
            own_attended = arena.take<float>(most * attn);
            own_middle = arena.take<float>(most * flow);
        } else {
            d_gate_up = arena.take<E>(chunk * both);
            rounded = arena.take<E>(most * flow);
            d_normed = arena.take<float>(most * flow);
            d_middle = arena.take<float>(most * flow);
            d_attended = arena.take<E>(most * attn);
            d_gqkv = arena.take<float>(most * wide);
            d_projected = arena.take<E>(most * wide);
            d_chosen = arena.take<E>(most * wide);
            weights = arena.take<float>(weight_count(b));
            scratch = arena.take<float>(crossed_scratch(std::max({D, A, M})));
        }
        used = arena.used();
    }

    static int64_t weight_count(const Block& b) {
        return weight_bounds(b)[4];
    }

    // The block that is computed next; `saved` of nulls where no backward pass will come.
    void take(const Block& block, const Rows& rows, const Saved& saved) {
        b = block;
        r = rows;
        s = saved;
    }

    // Calls before(piece), computes the piece, and calls after(piece).
    template <class Before, class After>
    void forward(int64_t thread, const float* x, float* y, const Before& before, const After& after) {
        in_pieces(thread, [&](const Piece& piece) {
            before(piece);
            forward_piece(x + first * D, y + first_output * D);
            after(piece);
        });
    }

    // The same. Gradients of the weights by this thread's rows, if it has any, are put into `weights`.
    template <class Before, class After>
    void backward(int64_t thread, const float* x, const float* d_y, float* d_x, const Before& before,
                  const After& after) {
        const Gradients d = inside(b, weights);
        bool adds = false;
        in_pieces(thread, [&](const Piece& piece) {
            before(piece);
            backward_piece(x + first * D, d_y + first_output * D, d_x + first * D, d, adds);
            after(piece);
            adds = true;
        });
        if (!adds) std::fill(weights, weights + weight_count(b), 0.0f);
    }

    float* weights = nullptr;  // a thread's own gradients of the weights
    int64_t used;              // floats of a thread's memory

  private:
    // Whole rows, at least one, whose end is near to `piece` tokens.
    template <class Work>
    void in_pieces(int64_t thread, const Work& work) {
        const int64_t all = r.bounds[thread + 1];
        for (int64_t at = r.bounds[thread]; at < all; at += end_row - first_row) {
            first_row = (r.first_row + at) % r.rows;
            const int64_t last = std::min(r.rows, first_row + all - at);
            for (end_row = first_row + 1; end_row < last; ++end_row)
                if ((r.starts[end_row] + r.starts[end_row + 1]) / 2 - r.starts[first_row] > r.piece) break;
            first = r.starts[first_row];
            count = r.starts[end_row] - first;
            first_output = outputs_before(first);
            outputs = outputs_before(first + count) - first_output;
            gqkv = s.gqkv ? static_cast<E*>(s.gqkv) + first * wide : own_gqkv;
            attended = s.gqkv ? s.attended + first * attn : own_attended;
            middle = s.gqkv ? s.middle + first_output * flow : own_middle;
            d_own = r.select ? d_chosen : d_projected;
            gate_up = s.gqkv ? static_cast<E*>(s.gate_up) + first_output * 2 * M : nullptr;
            work(Piece{first, count, first_output, outputs});
        }
    }

    int64_t outputs_before(int64_t token) const {
        return r.select ? std::lower_bound(r.select, r.select + r.outputs, token) - r.select : token;
    }

    // The token of an output; both are counted from the piece's first.
    int64_t token(int64_t output) const {
        return r.select ? r.select[first_output + output] - first : output;
    }

    void forward_piece(const float* x, float* y) {
        norm_rows(x, D, count);
        project();
        for (int64_t row = first_row; row < end_row; ++row)
            for (int64_t n = 0; n < b.heads; ++n) attention.forward(head(row, n));
        gate_outputs();
        product(weight(b.o), gated, attn, A, outputs, blocks(D),
                AddTo{x, D, r.select ? r.select + first_output : nullptr, first, middle, flow});
        // A long row goes through the rest in pieces too.
        for (int64_t from = 0; from < outputs; from += chunk)
            feed_forward(from, std::min(chunk, outputs - from), y + from * D);
    }

    // Gate, queries and keys, rotated, and values of the piece; gates and queries only where they are
    // wanted.
    void project() {
        const int64_t own = 2 * A / LANES, all = 4 * A / LANES;
        if (!r.select) return project(normed, count, Range{0, all}, nullptr);
        project(chosen_rows(), outputs, Range{0, own}, r.select + first_output);
        project(normed, count, Range{own, all}, nullptr);
        // Queries between wanted ones are computed too: of zeros, not of what the memory held.
        for (int64_t row = first_row; row < end_row; ++row) {
            const int64_t end = r.starts[row + 1], last = outputs_before(end);
            for (int64_t output = outputs_before(r.starts[row]); output < last; ++output) {
                const int64_t next = output + 1 < last ? r.select[output + 1] : end;
                for (int64_t t = r.select[output] + 1; t < next; ++t)
                    std::fill_n(gqkv + (t - first) * wide + A, A, E{});
            }
        }
    }

    // Blocks [range) of it of rows of `x`: of all tokens, or of those that are listed.
    void project(const E* x, int64_t rows, Range range, const int64_t* tokens) {
        E* const to = gqkv;
        const Rotation turn = rotation();
        const int64_t stride = wide, begin = first;
        const Order order(b);
        product(weight(b.gqkv), x, flow, D, rows, range,
                Fetching([=](int64_t row, int64_t at, Vec left, Vec right) {
                    const int64_t t = tokens ? tokens[row] - begin : row, angle = order.angle(at);
                    if (angle >= 0) turn(left, right, begin + t, angle);
                    put(to + t * stride + at * LANES, left, right);
                }, [=](int64_t row, int64_t at) {
                    const int64_t t = tokens ? tokens[row] - begin : row;
                    __builtin_prefetch(to + t * stride + at * LANES, 1);
                }));
    }

    Rotation rotation() const { return {r.positions, r.cos, r.sin + K / 2, K}; }

    // The normed rows of the piece's outputs, one behind the other.
    const E* chosen_rows() {
        for (int64_t row = 0; row < outputs; ++row)
            std::copy_n(normed + token(row) * flow, D, chosen + row * flow);
        return chosen;
    }

    // The SwiGLU of some outputs.
    void feed_forward(int64_t from, int64_t rows, float* y) {
        const float* x = middle + from * flow;
        E *const kept = gate_up ? gate_up + from * 2 * M : nullptr, *const inside = act;
        const int64_t stride = inner;
        norm_rows(x, flow, rows);
        product(weight(b.gate_up), normed, flow, D, rows, blocks(2 * M),
                Fetching([=](int64_t row, int64_t at, Vec gate, Vec up) {
                    at /= 2;
                    put(inside + row * stride + at * LANES, gate * sigmoid_as(E{}, gate) * up);
                    if (kept) put(kept + (at * rows + row) * 2 * LANES, gate, up);
                }, [=](int64_t row, int64_t at) {
                    if (kept) __builtin_prefetch(kept + (at / 2 * rows + row) * 2 * LANES, 1);
                }));
        product(weight(b.down), act, inner, M, rows, blocks(D), AddTo{x, flow, nullptr, 0, y, D});
    }

    void backward_piece(const float* x, const float* d_y, float* d_x, const Gradients& d, bool adds) {
        for (int64_t from = 0; from == 0 || from < outputs; from += chunk)
            feed_forward_backward(from, std::min(chunk, outputs - from), d_y + from * D, d,
                                  adds || from > 0);
        gate_outputs();
        const E* d_sum = operand(d_middle, flow, outputs, D, rounded);
        crossed_product(d_sum, flow, gated, attn, outputs, D, A, d.o, A, adds, scratch);
        if (r.select)  // the others get nothing through attention
            for (int64_t t = 0; t < count; ++t) std::fill_n(d_attended + t * attn, A, E{});
        through_output(d_sum);
        for (int64_t row = first_row; row < end_row; ++row)
            for (int64_t n = 0; n < b.heads; ++n) {
                const int64_t from = r.starts[row] - first;
                float* d_q = d_gqkv + from * wide + A + n * K;  // keys and values are A apart
                attention.backward(head(row, n), {d_attended + from * attn + n * K, attn, d_q,
                                                  d_q + A, d_q + 2 * A, wide});
            }
        turn_back();
        norm_rows(x, D, count);
        through_projection(d.gqkv, adds);
        for (int64_t t = 0; t < count; ++t)
            norm_backward(x + t * D, d_normed + t * flow, d_x + t * D, D, b.eps);
        for (int64_t row = 0; row < outputs; ++row) {
            float* to = d_x + token(row) * D;
            for (int64_t i = 0; i < D; i += LANES)
                store(to + i, load(to + i) + load(d_middle + row * flow + i));
        }
    }

    // Its backward pass: `d_middle` of those outputs, and the gradients of its weights.
    void feed_forward_backward(int64_t from, int64_t rows, const float* d_y, const Gradients& d,
                               bool adds) {
        const float* x = middle + from * flow;
        const E* d_out = operand(d_y, D, rows, D, rounded);
        through_gate(gate_up + from * 2 * M, d_out, rows);
        crossed_product(d_out, D, act, inner, rows, D, M, d.down, M, adds, scratch);
        norm_rows(x, flow, rows);
        crossed_product(d_gate_up, both, normed, flow, rows, 2 * M, D, d.gate_up, D, adds,
                        scratch);
        product(weight(b.gate_up_t), d_gate_up, both, 2 * M, rows, blocks(D),
                Put{d_normed, flow});
        for (int64_t row = 0; row < rows; ++row) {
            float* here = d_middle + (from + row) * flow;
            norm_backward(x + row * flow, d_normed + row * flow, here, D, b.eps);
            for (int64_t i = 0; i < D; i += LANES)
                store(here + i, load(here + i) + load(d_y + row * D + i));
        }
    }

    // Of the gradient behind the output's projection: that of what was attended to and of the gate.
    void through_output(const E* d_sum) {
        const int64_t* const tokens = r.select ? r.select + first_output : nullptr;
        const int64_t begin = first, stride = wide, out_stride = attn;
        const E* const from = gqkv;
        const float* const out = attended;
        E *const d_out = d_attended, *const d_gates = d_own;
        auto through = [=](int64_t t, int64_t at, Vec d_gated, Vec& d_gate) {
            const Vec open = sigmoid_as(E{}, get(from + t * stride + at));
            d_gate = d_gated * load(out + t * out_stride + at) * open * (spread(1.0f) - open);
            return d_gated * open;
        };
        product(weight(b.o_t), d_sum, flow, D, outputs, blocks(A),
                [=](int64_t row, int64_t at, Vec left, Vec right) {
                    const int64_t t = tokens ? tokens[row] - begin : row;
                    at *= LANES;
                    Vec d_left, d_right;
                    left = through(t, at, left, d_left);
                    right = through(t, at + LANES, right, d_right);
                    put(d_out + t * out_stride + at, left, right);
                    put(d_gates + row * stride + at, d_left, d_right);
                });
    }

    // Of the gradient behind SwiGLU: that of its inputs, and again what it gave.
    void through_gate(const E* kept, const E* d_out, int64_t rows) {
        const int64_t act_stride = inner, stride = both, size = M;
        E *const given = act, *const d_in = d_gate_up;
        struct Parts {
            Vec act, d_gate, d_up;
        };
        auto through = [=](int64_t row, int64_t block, Vec d_act) {
            const E* here = kept + (block * rows + row) * 2 * LANES;
            const Vec gate = get(here), up = get(here + LANES);
            const Vec open = sigmoid_as(E{}, gate), silu = gate * open;
            const Vec slope = open * (spread(1.0f) + gate * (spread(1.0f) - open));
            return Parts{silu * up, d_act * up * slope, d_act * silu};
        };
        product(weight(b.down_t), d_out, D, D, rows, blocks(M),
                Fetching([=](int64_t row, int64_t at, Vec left, Vec right) {
                    const Parts one = through(row, at, left), two = through(row, at + 1, right);
                    at *= LANES;
                    put(given + row * act_stride + at, one.act, two.act);
                    put(d_in + row * stride + at, one.d_gate, two.d_gate);
                    put(d_in + row * stride + size + at, one.d_up, two.d_up);
                }, [=](int64_t row, int64_t at) {
                    __builtin_prefetch(kept + (at * rows + row) * 2 * LANES);
                    __builtin_prefetch(kept + ((at + 1) * rows + row) * 2 * LANES);
                }));
    }

    static const E* weight(const void* packed) { return static_cast<const E*>(packed); }

    void norm_rows(const float* x, int64_t stride, int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) {
            const float* here = x + row * stride;
            const float factor = norm_factor(here, D, b.eps);
            for (int64_t i = 0; i < D; i += 2 * LANES)
                put(normed + row * flow + i, load(here + i) * factor, load(here + i + LANES) * factor);
        }
    }

    // The gradients of queries and keys before they were rotated, and of values, in the weight's order.
    void turn_back() {
        for (int64_t row = 0; row < outputs; ++row) turn_back(token(row), A, d_own + row * wide);
        for (int64_t t = 0; t < count; ++t) {
            turn_back(t, 2 * A, d_projected + t * wide);
            for (int64_t i = 3 * A; i < 4 * A; i += 2 * LANES)
                put(d_projected + t * wide + i, load(d_gqkv + t * wide + i),
                    load(d_gqkv + t * wide + i + LANES));
        }
    }

    // All heads of a token, of queries or of keys, which begin at a column.
    void turn_back(int64_t t, int64_t column, E* to) const {
        const int64_t half = K / 2, end = column + A;
        const float* from = d_gqkv + t * wide;
        const Rotation turn = rotation();
        for (int64_t head = column; head < end; head += 2 * half)
            for (int64_t i = 0; i < half; i += LANES) {
                Vec left = load(from + head + 2 * i), right = load(from + head + 2 * i + LANES);
                turn(left, right, first + t, i, true);
                put(to + head + i, left);
                put(to + head + half + i, right);
            }
    }

    // `d_normed`, and the gradient of the weight of gate, queries, keys and values.
    void through_projection(float* d_weight, bool adds) {
        const E* const w = weight(b.gqkv_t);
        if (!r.select) {
            crossed_product(d_projected, wide, normed, flow, count, 4 * A, D, d_weight, D, adds, scratch);
            product(w, d_projected, wide, 4 * A, count, blocks(D), Put{d_normed, flow});
            return;
        }
        const E *d_others = d_projected + 2 * A, *x = chosen_rows();
        crossed_product(d_own, wide, x, flow, outputs, 2 * A, D, d_weight, D, adds, scratch);
        crossed_product(d_others, wide, normed, flow, count, 2 * A, D, d_weight + 2 * A * D, D, adds,
                        scratch);
        product_of(w, d_projected, wide, 4 * A, Range{2 * A, 4 * A}, count, blocks(D),
                   Put{d_normed, flow});
        float* const to = d_normed;
        const int64_t* const tokens = r.select + first_output;
        const int64_t begin = first, stride = flow;
        product_of(w, d_own, wide, 4 * A, Range{0, 2 * A}, outputs, blocks(D),
                   [=](int64_t row, int64_t at, Vec left, Vec right) {
                       float* here = to + (tokens[row] - begin) * stride + at * LANES;
                       store(here, load(here) + left);
                       store(here + LANES, load(here + LANES) + right);
                   });
    }

    // sigmoid(gate) * attended of the piece's outputs.
    void gate_outputs() {
        for (int64_t row = 0; row < outputs; ++row) {
            const int64_t t = token(row);
            for (int64_t i = 0; i < A; i += LANES)
                put(gated + row * attn + i,
                    sigmoid_as(E{}, get(gqkv + t * wide + i)) * load(attended + t * attn + i));
        }
    }

    Head<E> head(int64_t row, int64_t n) const {
        const int64_t start = r.starts[row], end = r.starts[row + 1], from = start - first;
        const E* q = gqkv + from * wide + A + n * K;  // keys and values are A apart
        int64_t wanted = start;  // the first token that gives an output
        if (r.select) {
            const int64_t output = outputs_before(start);
            wanted = output < outputs_before(end) ? r.select[output] : end;
        }
        float* logsum = s.gqkv ? s.logsum + start * b.heads + n : nullptr;
        return {end - start, wanted - start, r.visible + start, q, q + A, q + 2 * A, wide,
                attended + from * attn + n * K, attn, logsum, b.heads};
    }

    Block b;
    Rows r;
    Saved s{};
    const int64_t A, K, D, M;
    const int64_t wide, attn, flow, both, inner;  // from a row to the next
    const int64_t chunk;  // outputs that go through SwiGLU together
    RowAttention<E> attention;
    E *normed, *gated, *act, *d_gate_up = nullptr, *rounded = nullptr, *own_gqkv = nullptr;
    E* chosen;  // normed rows of the outputs
    E *d_attended = nullptr, *d_projected = nullptr;  // the latter of gate, queries, keys and values;
    E* d_chosen = nullptr;  // of the first two where only some tokens are outputs, by output
    float *own_attended = nullptr, *own_middle = nullptr;
    float *d_normed = nullptr, *d_middle = nullptr, *d_gqkv = nullptr;
    float* scratch = nullptr;

    // Of the piece: its rows, tokens and outputs, and where its values are.
    int64_t first_row, end_row, first, count, first_output, outputs;
    float *attended, *middle;
    E *gqkv, *gate_up, *d_own;  // the last: where the gradients of gates and queries are
};
