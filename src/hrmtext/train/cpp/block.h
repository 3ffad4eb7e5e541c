// A block of an HRM on a CPU, forward and backward, over packed rows in fp32; its products may multiply in
// bf16, and add in fp32. SwiGLU's inputs are kept in that format.
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
#include "attention.h"
#include "norms.h"
#include "pack.h"
#include "products.h"
#include "threads.h"
#include "vectors.h"

extern "C" {

struct Block {
    int64_t hidden, heads, head_dim, mlp;
    int64_t bf16;  // packed weights are bf16 pairs, else fp32
    float eps;
    void *gqkv, *o, *gate_up, *down;  // packed; gate_up alternates blocks of gate and of up
    void *gqkv_t, *o_t, *gate_up_t, *down_t;  // transposed, packed; gate_up in its order
};

struct Rows {
    int64_t tokens, outputs, rows, longest, threads;
    int64_t piece;      // tokens that a thread takes through the block at a time, at least a row
    int64_t first_row;  // of the first thread; rows go round, the last is followed by row 0
    const int64_t* starts;   // (R + 1) in the stream; behind the last is padding, which passes through
    const int64_t* visible;  // (T) first position of its row that a token does not see
    const int64_t* select;   // (S) tokens whose output is wanted, ascending; null: all
    const int64_t* bounds;   // (threads + 1) rows of each thread, counted from `first_row`
    const float *cos, *sin;  // (T, K); the first half of the sines is negated
};

// For the backward pass; all null where none will come.
struct Saved {
    float* gqkv;      // (T, 4A + GAP): gate, queries and keys as they were rotated, values
    float* attended;  // (T, A + GAP), before the gate; from each row's first output on
    float* logsum;    // (T, N) of the scores; likewise
    float* middle;    // (S, D + GAP), behind attention
    void* gate_up;    // (S * 2M), in the format of the products' inputs and in the order of their tiles
};

struct Gradients {
    float *gqkv, *o, *gate_up, *down;  // as the weights, (outputs, inputs), one behind the other
};
}

// Between rows: widths are mostly multiples of a large power of two, which would put what is read
// together into a few sets of the cache.
constexpr int64_t GAP = 16;

// What a product takes of rows in fp32: the same, or rounded into `into`.
inline const float* operand(const float* x, int64_t, int64_t, int64_t, float*) { return x; }
#if defined(__AVX512BF16__)
inline const Bf16* operand(const float* x, int64_t stride, int64_t rows, int64_t columns, Bf16* into) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < columns; i += LANES)
            put(into + row * stride + i, load(x + row * stride + i));
    return into;
}
#endif

// Has two vectors at hand that will be written.
inline void fetch_two(const float* x) {
    __builtin_prefetch(x, 1);
    __builtin_prefetch(x + LANES, 1);
}

// The parts of a buffer that holds one gradient of each weight.
inline Gradients inside(const Block& b, float* memory) {
    const int64_t A = b.heads * b.head_dim;
    Gradients d;
    d.gqkv = memory;
    d.o = d.gqkv + 4 * A * b.hidden;
    d.gate_up = d.o + A * b.hidden;
    d.down = d.gate_up + 2 * b.mlp * b.hidden;
    return d;
}

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
          D(block.hidden), M(block.mlp), wide(4 * A + GAP), attn(A + GAP), flow(D + GAP),
          both(2 * M + GAP), inner(M + GAP), attention(K, rows.longest, is_backward, arena) {
        const int64_t most = std::max(r.longest, r.piece);  // tokens at a time
        normed = arena.take<E>(most * flow);
        gated = arena.take<E>(most * attn);
        act = arena.take<E>(r.piece * inner);
        if (!is_backward) {
            own_gqkv = arena.take<float>(most * wide);
            own_attended = arena.take<float>(most * attn);
            own_middle = arena.take<float>(most * flow);
        } else {
            d_gate_up = arena.take<E>(r.piece * both);
            rounded = arena.take<E>(most * std::max(wide, flow));
            d_normed = arena.take<float>(most * flow);
            d_middle = arena.take<float>(most * flow);
            d_attended = arena.take<float>(most * attn);
            d_gqkv = arena.take<float>(most * wide);
            weights = arena.take<float>(weight_count(b));
            scratch = arena.take<float>(crossed_scratch(std::max({D, A, M})));
        }
        used = arena.used();
    }

    static int64_t weight_count(const Block& b) {
        return b.hidden * (5 * b.heads * b.head_dim + 3 * b.mlp);
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
    // Whole rows, as many as have `piece` tokens together, or one.
    template <class Work>
    void in_pieces(int64_t thread, const Work& work) {
        const int64_t all = r.bounds[thread + 1];
        for (int64_t at = r.bounds[thread]; at < all; at += end_row - first_row) {
            first_row = (r.first_row + at) % r.rows;
            const int64_t last = std::min(r.rows, first_row + all - at);
            for (end_row = first_row + 1; end_row < last; ++end_row)
                if (r.starts[end_row + 1] - r.starts[first_row] > r.piece) break;
            first = r.starts[first_row];
            count = r.starts[end_row] - first;
            first_output = outputs_before(first);
            outputs = outputs_before(first + count) - first_output;
            gqkv = s.gqkv ? s.gqkv + first * wide : own_gqkv;
            attended = s.gqkv ? s.attended + first * attn : own_attended;
            middle = s.gqkv ? s.middle + first_output * flow : own_middle;
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
        product(weight(b.gqkv), normed, flow, D, count, blocks(4 * A),
                Fetching(Put{gqkv, wide}, [&](int64_t row, int64_t at) {
                    fetch_two(gqkv + row * wide + at * LANES);
                }));
        rotate_all(gqkv, false);
        for (int64_t row = first_row; row < end_row; ++row)
            for (int64_t n = 0; n < b.heads; ++n) attention.forward(head(row, n));
        gate_outputs();
        product(weight(b.o), gated, attn, A, outputs, blocks(D),
                Fetching([&](int64_t row, int64_t at, Vec left, Vec right) {
                    at *= LANES;
                    const float* from = x + token(row) * D + at;
                    store(middle + row * flow + at, load(from) + left);
                    store(middle + row * flow + at + LANES, load(from + LANES) + right);
                }, [&](int64_t row, int64_t at) { fetch_two(middle + row * flow + at * LANES); }));
        // A long row goes through the rest in pieces too.
        for (int64_t from = 0; from < outputs; from += r.piece)
            feed_forward(from, std::min(r.piece, outputs - from), y + from * D);
    }

    // The SwiGLU of some outputs.
    void feed_forward(int64_t from, int64_t rows, float* y) {
        const float* x = middle + from * flow;
        E* kept = gate_up ? gate_up + from * 2 * M : nullptr;
        norm_rows(x, flow, rows);
        product(weight(b.gate_up), normed, flow, D, rows, blocks(2 * M),
                Fetching([&](int64_t row, int64_t at, Vec gate, Vec up) {
                    at = at / 2 * LANES;
                    put(act + row * inner + at, gate * sigmoid_as(E{}, gate) * up);
                    if (!kept) return;
                    E* here = kept + (at * rows + row * LANES) * 2;
                    put(here, gate);
                    put(here + LANES, up);
                }, [&](int64_t row, int64_t at) {
                    if (kept) __builtin_prefetch(kept + (at / 2 * LANES * rows + row * LANES) * 2, 1);
                }));
        product(weight(b.down), act, inner, M, rows, blocks(D),
                Fetching([&](int64_t row, int64_t at, Vec left, Vec right) {
                    at *= LANES;
                    store(y + row * D + at, load(x + row * flow + at) + left);
                    store(y + row * D + at + LANES, load(x + row * flow + at + LANES) + right);
                }, [&](int64_t row, int64_t at) { fetch_two(y + row * D + at * LANES); }));
    }

    void backward_piece(const float* x, const float* d_y, float* d_x, const Gradients& d, bool adds) {
        for (int64_t from = 0; from == 0 || from < outputs; from += r.piece)
            feed_forward_backward(from, std::min(r.piece, outputs - from), d_y + from * D, d,
                                  adds || from > 0);
        gate_outputs();
        const E* d_sum = operand(d_middle, flow, outputs, D, rounded);
        crossed_product(d_sum, flow, gated, attn, outputs, D, A, d.o, A, adds, scratch);
        if (r.select)  // the others get nothing through gate and attention
            for (int64_t t = 0; t < count; ++t) {
                std::fill(d_attended + t * attn, d_attended + t * attn + A, 0.0f);
                std::fill(d_gqkv + t * wide, d_gqkv + t * wide + 2 * A, 0.0f);
            }
        auto through_output = [&](int64_t row, int64_t at, Vec d_gated) {
            const int64_t t = token(row);
            const Vec open = sigmoid_as(E{}, load(gqkv + t * wide + at));
            store(d_attended + t * attn + at, d_gated * open);
            store(d_gqkv + t * wide + at,
                  d_gated * load(attended + t * attn + at) * open * (spread(1.0f) - open));
        };
        product(weight(b.o_t), d_sum, flow, D, outputs, blocks(A),
                [&](int64_t row, int64_t at, Vec left, Vec right) {
                    through_output(row, at * LANES, left);
                    through_output(row, at * LANES + LANES, right);
                });
        for (int64_t row = first_row; row < end_row; ++row)
            for (int64_t n = 0; n < b.heads; ++n) {
                const int64_t from = r.starts[row] - first;
                float* d_q = d_gqkv + from * wide + A + n * K;  // keys and values are A apart
                attention.backward(head(row, n), {d_attended + from * attn + n * K, attn, d_q,
                                                  d_q + A, d_q + 2 * A, wide});
            }
        rotate_all(d_gqkv, true);
        norm_rows(x, D, count);
        const E* d_projected = operand(d_gqkv, wide, count, 4 * A, rounded);
        crossed_product(d_projected, wide, normed, flow, count, 4 * A, D, d.gqkv, D, adds, scratch);
        product(weight(b.gqkv_t), d_projected, wide, 4 * A, count, blocks(D), Put{d_normed, flow});
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
        const E* kept = gate_up + from * 2 * M;
        auto through_gate = [&](int64_t row, int64_t at, Vec d_act) {
            const E* here = kept + (at * rows + row * LANES) * 2;
            const Vec gate = get(here), up = get(here + LANES);
            const Vec open = sigmoid_as(E{}, gate), silu = gate * open;
            put(act + row * inner + at, silu * up);
            put(d_gate_up + row * both + at,
                d_act * up * open * (spread(1.0f) + gate * (spread(1.0f) - open)));
            put(d_gate_up + row * both + M + at, d_act * silu);
        };
        const E* d_out = operand(d_y, D, rows, D, rounded);
        product(weight(b.down_t), d_out, D, D, rows, blocks(M),
                Fetching([&](int64_t row, int64_t at, Vec left, Vec right) {
                    through_gate(row, at * LANES, left);
                    through_gate(row, at * LANES + LANES, right);
                }, [&](int64_t row, int64_t at) {
                    __builtin_prefetch(kept + (at * LANES * rows + row * LANES) * 2);
                    __builtin_prefetch(kept + ((at + 1) * LANES * rows + row * LANES) * 2);
                }));
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

    static const E* weight(const void* packed) { return static_cast<const E*>(packed); }

    void norm_rows(const float* x, int64_t stride, int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) {
            const float* here = x + row * stride;
            const float factor = norm_factor(here, D, b.eps);
            for (int64_t i = 0; i < D; i += LANES)
                put(normed + row * flow + i, load(here + i) * factor);
        }
    }

    // Queries and keys in (T, 4A); `back` turns the other way.
    void rotate_all(float* projected, bool back) const {
        for (int64_t t = 0; t < count; ++t)
            for (int64_t n = 0; n < 2 * b.heads; ++n)
                rotate(projected + t * wide + A + n * K, first + t, back);
    }

    // Both halves of x, a head's width, by the tables of a token.
    void rotate(float* x, int64_t at, bool back) const {
        const int64_t half = K / 2;
        const float *cos = r.cos + at * K, *sin = r.sin + at * K;
        const float *left_sin = sin + (back ? half : 0), *right_sin = sin + (back ? 0 : half);
        int64_t i = 0;
        for (; i + LANES <= half; i += LANES) {
            const Vec left = load(x + i), right = load(x + half + i);
            store(x + i, left * load(cos + i) + right * load(left_sin + i));
            store(x + half + i, right * load(cos + half + i) + left * load(right_sin + i));
        }
        for (; i < half; ++i) {
            const float left = x[i], right = x[half + i];
            x[i] = left * cos[i] + right * left_sin[i];
            x[half + i] = right * cos[half + i] + left * right_sin[i];
        }
    }

    // sigmoid(gate) * attended of the piece's outputs.
    void gate_outputs() {
        for (int64_t row = 0; row < outputs; ++row) {
            const int64_t t = token(row);
            for (int64_t i = 0; i < A; i += LANES)
                put(gated + row * attn + i,
                    sigmoid_as(E{}, load(gqkv + t * wide + i)) * load(attended + t * attn + i));
        }
    }

    Head head(int64_t row, int64_t n) const {
        const int64_t start = r.starts[row], end = r.starts[row + 1], from = start - first;
        const float* q = gqkv + from * wide + A + n * K;  // keys and values are A apart
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
    RowAttention<E> attention;
    E *normed, *gated, *act, *d_gate_up = nullptr, *rounded = nullptr;
    float *own_gqkv = nullptr, *own_attended = nullptr, *own_middle = nullptr;
    float *d_normed = nullptr, *d_middle = nullptr, *d_attended = nullptr, *d_gqkv = nullptr;
    float* scratch = nullptr;

    // Of the piece: its rows, tokens and outputs, and where its values are.
    int64_t first_row, end_row, first, count, first_output, outputs;
    float *gqkv, *attended, *middle;
    E* gate_up;
};
