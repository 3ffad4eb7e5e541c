// A block of an HRM on a CPU, forward and backward, over packed rows in fp32; its products with weights
// and their gradients may multiply in bf16, and add in fp32.
//
// Letters: T tokens of the stream, S those whose output is wanted, R rows, D hidden size, N heads,
// K head width, A = N * K, M SwiGLU width, W tokens of a row.
//
// Threads take whole rows and share nothing that is written but the sum of the weights' gradients.
// Weights come packed, as products.h says; for gradients of inputs also transposed and packed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

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
    const int64_t* starts;   // (R + 1) in the stream; behind the last is padding, which passes through
    const int64_t* visible;  // (T) first position of its row that a token does not see
    const int64_t* select;   // (S) tokens whose output is wanted, ascending; null: all
    const int64_t* bounds;         // (threads + 1) rows of each thread
    const int64_t* output_bounds;  // (threads + 1) outputs of each thread
    const float *cos, *sin;  // (T, K); the first half of the sines is negated
};

struct Saved {
    float* gqkv;      // (T, 4A + GAP): gate, queries and keys as they were rotated, values
    float* attended;  // (T, A + GAP), before the gate
    float* logsum;    // (T, N) of the scores
    float* middle;    // (S, D + GAP), behind attention
    float* gate_up;   // (S, 2M + GAP); null where no backward pass will come
};

struct Gradients {
    float *gqkv, *o, *gate_up, *down;  // as the weights, (outputs, inputs)
};

int64_t hrm_block_lanes() { return LANES; }
int64_t hrm_block_has_bf16() { return HAS_BF16; }
}

namespace {

// Between rows: widths are mostly multiples of a large power of two, which would put what is read
// together into a few sets of the cache.
constexpr int64_t GAP = 16;

// Outputs that go through SwiGLU together: what is between its products stays near.
constexpr int64_t PIECE = CROSSED_PIECE;

int64_t padded(int64_t count) { return (count + 31) / 32 * 32; }

// Where everything of one thread is in the caller's memory.
struct Layout {
    int64_t normed, gated, act, d_gate_up, d_normed, d_middle, d_attended, d_gqkv, rounded;
    int64_t packed, scores, scales, weights, scratch;
    Layout(const Block& b, const Rows& r, bool is_backward) {
        const int64_t A = b.heads * b.head_dim, T = most(r), back = is_backward ? T : 0;
        normed = padded(T * (b.hidden + GAP));
        gated = padded(T * (A + GAP));
        act = padded(PIECE * (b.mlp + GAP));
        d_gate_up = padded(is_backward ? PIECE * (2 * b.mlp + GAP) : 0);
        d_normed = padded(back * (b.hidden + GAP));
        d_middle = padded(back * (b.hidden + GAP));
        d_attended = padded(back * (A + GAP));
        d_gqkv = padded(back * (4 * A + GAP));
        rounded = b.bf16 ? padded(back * (std::max(4 * A, b.hidden) + GAP)) : 0;
        packed = padded(columns(r.longest) * b.head_dim);
        scores = padded(r.longest * columns(r.longest));
        scales = padded(r.longest + 2 * LANES);
        weights = is_backward ? padded(weight_count(b)) : 0;
        const int64_t columns_too = std::max({b.hidden, A, b.mlp, b.head_dim});
        scratch = is_backward ? padded(crossed_scratch(columns_too)) : 0;
    }
    // Tokens of the thread that has most.
    static int64_t most(const Rows& r) {
        int64_t found = 0;
        for (int64_t t = 0; t < r.threads; ++t)
            found = std::max(found, r.starts[r.bounds[t + 1]] - r.starts[r.bounds[t]]);
        return found;
    }
    static int64_t columns(int64_t tokens) { return (tokens + 2 * LANES - 1) / (2 * LANES) * 2 * LANES; }
    static int64_t weight_count(const Block& b) {
        return b.hidden * (5 * b.heads * b.head_dim + 3 * b.mlp);
    }
    int64_t total() const {
        return normed + gated + act + d_gate_up + d_normed + d_middle + d_attended + d_gqkv +
               rounded + 2 * packed + 2 * scores + scales + weights + scratch;
    }
};

// Puts a product's sums into (rows, columns).
struct Put {
    float* out;
    int64_t columns;
    void operator()(int64_t row, int64_t block, Vec left, Vec right) const {
        store(out + row * columns + block * LANES, left);
        store(out + row * columns + block * LANES + LANES, right);
    }
};

// What a product takes of rows in fp32: the same, or rounded into `into`.
const float* operand(const float* x, int64_t, int64_t, int64_t, float*) { return x; }
#if defined(__AVX512BF16__)
const Bf16* operand(const float* x, int64_t stride, int64_t rows, int64_t columns, Bf16* into) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < columns; i += LANES)
            put(into + row * stride + i, load(x + row * stride + i));
    return into;
}
#endif

// `E`: the format of the products' inputs, float or Bf16.
template <class E>
class Worker {
  public:
    Worker(const Block& block, const Rows& rows, const Saved& saved, int64_t thread, float* memory,
           bool is_backward)
        : b(block), r(rows), s(saved), A(block.heads * block.head_dim), K(block.head_dim),
          D(block.hidden), M(block.mlp), wide(4 * A + GAP), attn(A + GAP), flow(D + GAP),
          both(2 * M + GAP), inner(M + GAP) {
        const Layout layout(block, rows, is_backward);
        memory += thread * layout.total();
        auto take = [&](int64_t count) {
            float* here = memory;
            memory += count;
            return here;
        };
        auto take_input = [&](int64_t count) { return reinterpret_cast<E*>(take(count)); };
        normed = take_input(layout.normed);
        gated = take_input(layout.gated);
        act = take_input(layout.act);
        d_gate_up = take_input(layout.d_gate_up);
        rounded = take_input(layout.rounded);
        d_normed = take(layout.d_normed);
        d_middle = take(layout.d_middle);
        d_attended = take(layout.d_attended);
        d_gqkv = take(layout.d_gqkv);
        packed = take(layout.packed);
        packed_too = take(layout.packed);
        scores = take(layout.scores);
        d_scores = take(layout.scores);
        scales = take(layout.scales);
        weights = take(layout.weights);
        scratch = take(layout.scratch);
        first_row = r.bounds[thread];
        end_row = r.bounds[thread + 1];
        first = r.starts[first_row];
        count = r.starts[end_row] - first;
        first_output = r.output_bounds[thread];
        outputs = r.output_bounds[thread + 1] - first_output;
    }

    void forward(const float* x, float* y) {
        norm_rows(x + first * D, D, count);
        float* gqkv = s.gqkv + first * wide;
        product(weight(b.gqkv), normed, flow, D, count, blocks(4 * A), Put{gqkv, wide});
        for (int64_t t = 0; t < count; ++t)
            for (int64_t n = 0; n < b.heads; ++n) {
                rotate(gqkv + t * wide + A + n * K, first + t, false);
                rotate(gqkv + t * wide + 2 * A + n * K, first + t, false);
            }
        for (int64_t row = first_row; row < end_row; ++row)
            for (int64_t n = 0; n < b.heads; ++n) attend(row, n);
        gate_outputs();
        float* middle = s.middle + first_output * flow;
        product(weight(b.o), gated, attn, A, outputs, blocks(D),
                [&](int64_t row, int64_t at, Vec left, Vec right) {
                    at *= LANES;
                    const float* from = x + token(row) * D + at;
                    store(middle + row * flow + at, load(from) + left);
                    store(middle + row * flow + at + LANES, load(from + LANES) + right);
                });
        y += first_output * D;
        for (int64_t from = 0; from < outputs; from += PIECE)
            feed_forward(from, std::min(PIECE, outputs - from), y + from * D);
    }

    void backward(const float* x, const float* d_y, float* d_x, const Gradients& d) {
        d_y += first_output * D;
        for (int64_t from = 0; from == 0 || from < outputs; from += PIECE)
            feed_forward_backward(from, std::min(PIECE, outputs - from), d_y + from * D, d);
        gate_outputs();
        const E* d_sum = operand(d_middle, flow, outputs, D, rounded);
        crossed_product(d_sum, flow, gated, attn, outputs, D, A, d.o, A, false, scratch);
        if (r.select) {  // the others get nothing through gate and attention
            std::fill(d_attended, d_attended + count * attn, 0.0f);
            for (int64_t t = 0; t < count; ++t)
                std::fill(d_gqkv + t * wide, d_gqkv + t * wide + A, 0.0f);
        }
        auto through_output = [&](int64_t row, int64_t at, Vec d_gated) {
            const int64_t t = token(row);
            const Vec open = sigmoid(load(s.gqkv + t * wide + at));
            store(d_attended + (t - first) * attn + at, d_gated * open);
            store(d_gqkv + (t - first) * wide + at,
                  d_gated * load(s.attended + t * attn + at) * open * (spread(1.0f) - open));
        };
        product(weight(b.o_t), d_sum, flow, D, outputs, blocks(A),
                [&](int64_t row, int64_t at, Vec left, Vec right) {
                    through_output(row, at * LANES, left);
                    through_output(row, at * LANES + LANES, right);
                });
        for (int64_t row = first_row; row < end_row; ++row)
            for (int64_t n = 0; n < b.heads; ++n) attend_backward(row, n);
        for (int64_t t = 0; t < count; ++t)
            for (int64_t n = 0; n < b.heads; ++n) {
                rotate(d_gqkv + t * wide + A + n * K, first + t, true);
                rotate(d_gqkv + t * wide + 2 * A + n * K, first + t, true);
            }
        norm_rows(x + first * D, D, count);
        const E* d_projected = operand(d_gqkv, wide, count, 4 * A, rounded);
        crossed_product(d_projected, wide, normed, flow, count, 4 * A, D, d.gqkv, D, false, scratch);
        product(weight(b.gqkv_t), d_projected, wide, 4 * A, count, blocks(D), Put{d_normed, flow});
        for (int64_t t = 0; t < count; ++t)
            norm_backward(x + (first + t) * D, d_normed + t * flow, d_x + (first + t) * D, D, b.eps);
        for (int64_t row = 0; row < outputs; ++row) {
            float* to = d_x + token(row) * D;
            for (int64_t i = 0; i < D; i += LANES)
                store(to + i, load(to + i) + load(d_middle + row * flow + i));
        }
    }

    float* weights;  // gradients of the weights by this thread's rows

  private:
    // The SwiGLU of some outputs.
    void feed_forward(int64_t from, int64_t rows, float* y) {
        const float* middle = s.middle + (first_output + from) * flow;
        float* gate_up = s.gate_up + (first_output + from) * both;
        norm_rows(middle, flow, rows);
        product(weight(b.gate_up), normed, flow, D, rows, blocks(2 * M),
                [&](int64_t row, int64_t at, Vec gate, Vec up) {
                    at = at / 2 * LANES;
                    put(act + row * inner + at, gate * sigmoid(gate) * up);
                    if (!s.gate_up) return;
                    store(gate_up + row * both + at, gate);
                    store(gate_up + row * both + M + at, up);
                });
        product(weight(b.down), act, inner, M, rows, blocks(D),
                [&](int64_t row, int64_t at, Vec left, Vec right) {
                    at *= LANES;
                    const float* from_middle = middle + row * flow + at;
                    store(y + row * D + at, load(from_middle) + left);
                    store(y + row * D + at + LANES, load(from_middle + LANES) + right);
                });
    }

    // Its backward pass: `d_middle` of those outputs, and more for the gradients of its weights.
    void feed_forward_backward(int64_t from, int64_t rows, const float* d_y, const Gradients& d) {
        const float* middle = s.middle + (first_output + from) * flow;
        const float* gate_up = s.gate_up + (first_output + from) * both;
        auto through_gate = [&](int64_t row, int64_t at, Vec d_act) {
            const Vec gate = load(gate_up + row * both + at);
            const Vec up = load(gate_up + row * both + M + at);
            const Vec open = sigmoid(gate), silu = gate * open;
            put(act + row * inner + at, silu * up);
            put(d_gate_up + row * both + at,
                d_act * up * open * (spread(1.0f) + gate * (spread(1.0f) - open)));
            put(d_gate_up + row * both + M + at, d_act * silu);
        };
        const E* d_out = operand(d_y, D, rows, D, rounded);
        product(weight(b.down_t), d_out, D, D, rows, blocks(M),
                [&](int64_t row, int64_t at, Vec left, Vec right) {
                    through_gate(row, at * LANES, left);
                    through_gate(row, at * LANES + LANES, right);
                });
        const bool adds = from > 0;
        crossed_product(d_out, D, act, inner, rows, D, M, d.down, M, adds, scratch);
        norm_rows(middle, flow, rows);
        crossed_product(d_gate_up, both, normed, flow, rows, 2 * M, D, d.gate_up, D, adds, scratch);
        product(weight(b.gate_up_t), d_gate_up, both, 2 * M, rows, blocks(D), Put{d_normed, flow});
        for (int64_t row = 0; row < rows; ++row) {
            float* d_here = d_middle + (from + row) * flow;
            norm_backward(middle + row * flow, d_normed + row * flow, d_here, D, b.eps);
            for (int64_t i = 0; i < D; i += LANES)
                store(d_here + i, load(d_here + i) + load(d_y + row * D + i));
        }
    }

    static const E* weight(const void* packed) { return static_cast<const E*>(packed); }

    static Range blocks(int64_t columns) { return {0, columns / LANES}; }

    // The token of an output of this thread.
    int64_t token(int64_t output) const {
        return r.select ? r.select[first_output + output] : first_output + output;
    }

    void norm_rows(const float* x, int64_t stride, int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) {
            const float* here = x + row * stride;
            const float factor = norm_factor(here, D, b.eps);
            for (int64_t i = 0; i < D; i += LANES)
                put(normed + row * flow + i, load(here + i) * factor);
        }
    }

    // Both halves of x, a head's width, by the tables of a token; `back` turns the other way.
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

    // sigmoid(gate) * attended of this thread's outputs.
    void gate_outputs() {
        for (int64_t row = 0; row < outputs; ++row) {
            const int64_t t = token(row);
            for (int64_t i = 0; i < A; i += LANES)
                put(gated + row * attn + i,
                    sigmoid(load(s.gqkv + t * wide + i)) * load(s.attended + t * attn + i));
        }
    }

    // One head's keys or values of a row with tokens as columns, (W / LANES, K, LANES).
    void pack_tokens(const float* x, int64_t width, float* out) const {
        for (int64_t j = 0; j < Layout::columns(width); ++j)
            for (int64_t d = 0; d < K; ++d)
                out[(j / LANES * K + d) * LANES + j % LANES] = j < width ? x[j * wide + d] : 0.0f;
    }

    // The same with their dimensions as columns, (K / LANES, W, LANES).
    void pack_dimensions(const float* x, int64_t width, float* out) const {
        for (int64_t d = 0; d < K; d += LANES)
            for (int64_t j = 0; j < width; ++j)
                store(out + (d / LANES * width + j) * LANES, load(x + j * wide + d));
    }

    void attend(int64_t row, int64_t n) {
        const int64_t start = r.starts[row], width = r.starts[row + 1] - start;
        const int64_t columns = Layout::columns(width);
        const float* gate = s.gqkv + start * wide + n * K;  // queries, keys, values are A apart
        const float shrink = 1.0f / std::sqrt(float(K));
        pack_tokens(gate + 2 * A, width, packed);
        product(packed, gate + A, wide, K, width, blocks(columns),
                [&](int64_t i, int64_t at, Vec left, Vec right) {
                    store(scores + i * columns + at * LANES, left * shrink);
                    store(scores + i * columns + at * LANES + LANES, right * shrink);
                });
        for (int64_t i = 0; i < width; ++i) {
            float* row_scores = scores + i * columns;
            const int64_t seen = r.visible[start + i];
            for (int64_t j = seen; j < columns; ++j) row_scores[j] = -INFINITY;
            Vec largest = load(row_scores);
            for (int64_t j = LANES; j < seen; j += LANES) {
                const Vec here = load(row_scores + j);
                largest = here > largest ? here : largest;
            }
            float peak = largest[0];
            for (int l = 1; l < LANES; ++l) peak = std::max(peak, largest[l]);
            Vec totals{};
            for (int64_t j = 0; j < columns; j += LANES) {
                const Vec here = load(row_scores + j);
                const Vec weight = here == spread(-INFINITY) ? Vec{} : exp_of(here - peak);
                store(row_scores + j, weight);
                totals += weight;
            }
            const float total = sum(totals);
            scales[i] = 1.0f / total;
            s.logsum[(start + i) * b.heads + n] = peak + std::log(total);
        }
        pack_dimensions(gate + 3 * A, width, packed);
        float* out = s.attended + start * attn + n * K;
        product(packed, scores, columns, width, width, blocks(K),
                [&](int64_t i, int64_t at, Vec left, Vec right) {
                    store(out + i * attn + at * LANES, left * scales[i]);
                    store(out + i * attn + at * LANES + LANES, right * scales[i]);
                });
    }

    void attend_backward(int64_t row, int64_t n) {
        const int64_t start = r.starts[row], width = r.starts[row + 1] - start;
        const int64_t columns = Layout::columns(width);
        const float* gate = s.gqkv + start * wide + n * K;
        const float* d_out = d_attended + (start - first) * attn + n * K;
        float* d_gate = d_gqkv + (start - first) * wide + n * K;
        const float shrink = 1.0f / std::sqrt(float(K));
        pack_tokens(gate + 2 * A, width, packed);
        product(packed, gate + A, wide, K, width, blocks(columns), Put{scores, columns});
        pack_tokens(gate + 3 * A, width, packed_too);
        product(packed_too, d_out, attn, K, width, blocks(columns), Put{d_scores, columns});
        for (int64_t i = 0; i < width; ++i) {
            const float* attended = s.attended + (start + i) * attn + n * K;
            Vec dots{};
            for (int64_t d = 0; d < K; d += LANES) dots += load(attended + d) * load(d_out + i * attn + d);
            const float dot = sum(dots), logsum = s.logsum[(start + i) * b.heads + n];
            float *p = scores + i * columns, *d_p = d_scores + i * columns;
            const int64_t seen = r.visible[start + i];
            for (int64_t j = 0; j < columns; j += LANES) {
                const Vec weight = exp_of(load(p + j) * shrink - logsum);
                store(p + j, weight);
                store(d_p + j, weight * (load(d_p + j) - dot) * shrink);
            }
            std::fill(p + seen, p + columns, 0.0f);
            std::fill(d_p + seen, d_p + columns, 0.0f);
        }
        crossed_product(scores, columns, d_out, attn, width, width, K, d_gate + 3 * A, wide,
                        false, scratch);
        crossed_product(d_scores, columns, gate + A, wide, width, width, K, d_gate + 2 * A, wide,
                        false, scratch);
        pack_dimensions(gate + 2 * A, width, packed);
        product(packed, d_scores, columns, width, width, blocks(K),
                Put{d_gate + A, wide});
    }

    const Block& b;
    const Rows& r;
    const Saved& s;
    const int64_t A, K, D, M;
    const int64_t wide, attn, flow, both, inner;  // from a row to the next
    E *normed, *gated, *act, *d_gate_up, *rounded;
    float *d_normed, *d_middle, *d_attended, *d_gqkv;
    float *packed, *packed_too, *scores, *d_scores, *scales, *scratch;
    int64_t first_row, end_row, first, count, first_output, outputs;
};

// The parts of a buffer that holds one gradient of each weight.
Gradients inside(const Block& b, float* memory) {
    const int64_t A = b.heads * b.head_dim;
    Gradients d;
    d.gqkv = memory;
    d.o = d.gqkv + 4 * A * b.hidden;
    d.gate_up = d.o + A * b.hidden;
    d.down = d.gate_up + 2 * b.mlp * b.hidden;
    return d;
}

// Calls work with a number of the products' format.
template <class Work>
void in_format([[maybe_unused]] const Block& b, const Work& work) {
#if defined(__AVX512BF16__)
    if (b.bf16) return work(Bf16{});
#endif
    work(float{});
}

}  // namespace

extern "C" int64_t hrm_block_gap() { return GAP; }

extern "C" int64_t hrm_block_workspace(const Block* block, const Rows* rows, int64_t is_backward) {
    return rows->threads * Layout(*block, *rows, is_backward != 0).total();
}

// Packs weights as they are, (outputs, inputs), to where the block has them.
extern "C" void hrm_block_pack(const Block* block, const float* gqkv, const float* o,
                               const float* gate_up, const float* down, int64_t threads) {
    const int64_t A = block->heads * block->head_dim, D = block->hidden, M = block->mlp;
    on_threads(threads, [&](int64_t thread) {
        in_format(*block, [&](auto format) {
            auto both = [&](const float* weight, int64_t outputs, int64_t inputs, bool in_turn,
                            void* packed, void* transposed) {
                using E = decltype(format);
                pack<E>(weight, outputs, inputs, false, in_turn, thread, threads, packed);
                pack<E>(weight, outputs, inputs, true, false, thread, threads, transposed);
            };
            both(gqkv, 4 * A, D, false, block->gqkv, block->gqkv_t);
            both(o, D, A, false, block->o, block->o_t);
            both(gate_up, 2 * M, D, true, block->gate_up, block->gate_up_t);
            both(down, D, M, false, block->down, block->down_t);
        });
    });
}

// RMSNorm of rows, and its backward pass.
extern "C" void hrm_norm_forward(const float* x, float* y, int64_t rows, int64_t width, float eps,
                                 int64_t threads) {
    on_threads(threads, [&](int64_t thread) {
        const Range mine = part(rows, thread, threads);
        for (int64_t at = mine.begin * width; at < mine.end * width; at += width) {
            const float factor = norm_factor(x + at, width, eps);
            for (int64_t i = at; i < at + width; i += LANES) store(y + i, load(x + i) * factor);
        }
    });
}

extern "C" void hrm_norm_backward(const float* x, const float* d_y, float* d_x, int64_t rows,
                                  int64_t width, float eps, int64_t threads) {
    on_threads(threads, [&](int64_t thread) {
        const Range mine = part(rows, thread, threads);
        for (int64_t at = mine.begin * width; at < mine.end * width; at += width)
            norm_backward(x + at, d_y + at, d_x + at, width, eps);
    });
}

extern "C" void hrm_block_forward(const Block* block, const Rows* rows, const Saved* saved,
                                  const float* x, float* y, float* workspace) {
    on_threads(rows->threads, [&](int64_t thread) {
        in_format(*block, [&](auto format) {
            Worker<decltype(format)>(*block, *rows, *saved, thread, workspace, false).forward(x, y);
        });
    });
    if (rows->select) return;
    const int64_t used = rows->starts[rows->rows] * block->hidden;
    std::copy(x + used, x + rows->tokens * block->hidden, y + used);
}

// `weights`: the gradients of gqkv, o, gate_up and down, one behind the other.
extern "C" void hrm_block_backward(const Block* block, const Rows* rows, const Saved* saved,
                                   const float* x, const float* d_y, float* d_x, float* weights,
                                   float* workspace) {
    const int64_t threads = rows->threads, total = Layout::weight_count(*block);
    Barrier barrier{int(threads)};
    std::vector<const float*> parts(static_cast<size_t>(threads));
    on_threads(threads, [&](int64_t thread) {
        in_format(*block, [&](auto format) {
            Worker<decltype(format)> worker(*block, *rows, *saved, thread, workspace, true);
            float* own = thread == 0 ? weights : worker.weights;
            parts[size_t(thread)] = own;
            worker.backward(x, d_y, d_x, inside(*block, own));
        });
        barrier.wait();
        const Range mine = part(total, thread, threads);
        for (int64_t other = 1; other < threads; ++other)
            for (int64_t i = mine.begin; i < mine.end; ++i) weights[i] += parts[size_t(other)][i];
    });
    const int64_t used = rows->starts[rows->rows] * block->hidden, all = rows->tokens * block->hidden;
    if (rows->select) std::fill(d_x + used, d_x + all, 0.0f);
    else std::copy(d_y + used, d_y + all, d_x + used);
}
