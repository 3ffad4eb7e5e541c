// An HRM on a CPU over a KV cache: new tokens of each row through the whole recurrence. In a decode
// step that is one token a row, in a prefill all of a prompt.
//
// Letters: T new tokens, B rows of the cache, D hidden size, N heads, K head width, A = N * K,
// M SwiGLU width, V vocabulary.
//
// Threads go apart, each with rows of its own (`Step.bounds`), and then share nothing that is written:
// what another core has written is slow to read. Or, with few rows or large weights, they share every
// matrix product by its columns and every attention by (token, head), and meet at a barrier after
// each; what they would have to wait for but is cheap (norms, conversions) each does for itself.
// Weights come packed, as products.h says.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "products.h"
#include "threads.h"
#include "vectors.h"

extern "C" {

struct Layer {
    const void *gqkv, *o, *gate_up, *down;  // packed; gate_up alternates blocks of gate and of up
};

struct Model {
    int64_t hidden, heads, head_dim, mlp, vocab, layers;
    int64_t bf16;         // packed weights are bf16 pairs, else fp32
    int64_t shared;       // one stack plays both roles
    int64_t H_injection;  // the H stack is called on z_H + z_L, else on z_L
    int64_t L_slots;      // L cycles of the cache's slots
    float eps, scale;
    const float* embedding;  // (V, D)
    const float* z_L_init;   // (D)
    const float *cos, *sin;  // (positions, K); the first half of the sines is negated
    const void* head;        // packed
    const Layer *H, *L;      // (layers) each
};

struct Step {
    int64_t tokens, outputs, H_cycles, L_cycles, capacity, threads;
    const int64_t* ids;        // (T)
    const int64_t* rows;       // (T) of the cache; null: token t is row t's
    const int64_t* positions;  // (T) in its row
    const int64_t* visible;    // (T) first position that a token does not see; null: the next one
    const int64_t* select;     // (outputs) tokens whose logits are wanted; null: all
    const int64_t* bounds;     // (threads + 1) of each thread's own tokens, whole rows; null: shared
    const int64_t* output_bounds;  // (threads + 1) of their outputs
    float *const *keys, *const *values;  // of each slot, (B, N, capacity, K)
    float* logits;                       // (outputs, V)
    float* first_logits;                 // (outputs, V) behind the first H cycle, or null
    float* workspace;                    // hrm_workspace() floats, of any content
    int64_t first;  // number of the first token, where these are a thread's own; else 0
};

int64_t hrm_lanes() { return LANES; }
int64_t hrm_has_bf16() { return HAS_BF16; }
}

// Where everything of one step is, in the caller's memory: fresh pages every step would cost more
// than what is written to them.
struct Layout {
    int64_t stream, gqkv, attended, hidden, operand, scores;
    explicit Layout(const Model& m, const Step& s) {
        const int64_t A = m.heads * m.head_dim, widest = std::max({m.hidden, A, m.mlp});
        stream = padded(s.tokens * m.hidden);
        gqkv = padded(s.tokens * 4 * A);
        attended = padded(s.tokens * A);
        hidden = padded(s.tokens * m.mlp);
        operand = padded(s.tokens * widest);
        scores = padded(s.capacity + 2 * LANES) + padded(m.head_dim);
    }
    int64_t shared() const { return 3 * stream + gqkv + attended + hidden; }
    int64_t thread() const { return 2 * operand + scores; }
    static int64_t padded(int64_t count) { return (count + 31) / 32 * 32; }
};

// A step of one thread's own rows.
static Step own_step(const Model& m, const Step& s, int64_t thread) {
    Step own = s;
    const int64_t first = s.bounds[thread], first_output = s.output_bounds[thread];
    own.first = first;
    own.tokens = s.bounds[thread + 1] - first;
    own.outputs = s.output_bounds[thread + 1] - first_output;
    own.threads = 1;
    own.ids += first;
    own.positions += first;
    if (s.rows) own.rows += first;
    if (s.visible) own.visible += first;
    if (s.select) own.select += first_output;
    own.logits += first_output * m.vocab;
    if (s.first_logits) own.first_logits += first_output * m.vocab;
    return own;
}

extern "C" int64_t hrm_workspace(const Model* model, const Step* step) {
    if (!step->bounds) {
        const Layout layout(*model, *step);
        return layout.shared() + step->threads * layout.thread();
    }
    int64_t total = 0;
    for (int64_t thread = 0; thread < step->threads; ++thread) {
        const Layout layout(*model, own_step(*model, *step, thread));
        total += layout.shared() + layout.thread();
    }
    return total;
}

namespace {

struct Shared {
    float *x, *z_H, *z_L, *gqkv, *attended, *hidden;
    Barrier barrier;
    Shared(const Step& s, const Layout& layout) : barrier(int(s.threads)) {
        x = s.workspace;
        z_H = x + layout.stream;
        z_L = z_H + layout.stream;
        gqkv = z_L + layout.stream;
        attended = gqkv + layout.gqkv;
        hidden = attended + layout.attended;
    }
};

constexpr int TOGETHER = 8;

class Worker {
  public:
    Worker(const Model& model, const Step& step, const Layout& layout, Shared& shared,
           int64_t thread)
        : m(model), s(step), sh(shared), thread_(thread), A(model.heads * model.head_dim),
          rows_(step.tokens), x_(shared.x) {
        own_ = step.workspace + layout.shared() + thread * layout.thread();
        halves_ = reinterpret_cast<Bf16*>(own_ + layout.operand);
        query_ = own_ + 2 * layout.operand;
        scores_ = query_ + Layout::padded(model.head_dim);
    }

    void run() {
        const Range mine = part(s.tokens, thread_, s.threads);
        for (int64_t row = mine.begin; row < mine.end; ++row) {
            const float* embedded = m.embedding + s.ids[row] * m.hidden;
            for (int64_t d = 0; d < m.hidden; ++d) {
                const int64_t at = row * m.hidden + d;
                sh.z_H[at] = embedded[d] * m.scale;
                sh.z_L[at] = m.z_L_init[d];
            }
        }
        for (int64_t h = 0; h < s.H_cycles; ++h) {
            for (int64_t call = 0; call < s.L_cycles; ++call) {
                enter(mine, true, true);
                stack(m.shared ? m.H : m.L, (h * (m.L_slots + 1) + call) * m.layers, false);
                leave(sh.z_L);
            }
            enter(mine, s.L_cycles == 0 || m.H_injection, s.L_cycles > 0);
            stack(m.H, (h * (m.L_slots + 1) + m.L_slots) * m.layers, h + 1 == s.H_cycles);
            leave(sh.z_H);
            if (h == 0 && s.first_logits) head(s.first_logits);
        }
        head(s.logits);
    }

  private:
    // x = z_H + z_L, or one of them, for this thread's rows.
    void enter(Range mine, bool with_H, bool with_L) {
        for (int64_t i = mine.begin * m.hidden; i < mine.end * m.hidden; ++i)
            sh.x[i] = (with_H ? sh.z_H[i] : 0.0f) + (with_L ? sh.z_L[i] : 0.0f);
        sh.barrier.wait();
    }

    // z = norm(x): the norm at the stack's exit.
    void leave(float* z) {
        const Range mine = part(rows_, thread_, s.threads);
        for (int64_t row = mine.begin; row < mine.end; ++row)
            norm(&x_[row * m.hidden], &z[row * m.hidden]);
    }

    void norm(const float* x, float* out) const {
        Vec squares{};
        int64_t d = 0;
        for (; d + LANES <= m.hidden; d += LANES) squares += load(x + d) * load(x + d);
        float total = sum(squares);
        for (; d < m.hidden; ++d) total += x[d] * x[d];
        const float factor = 1.0f / std::sqrt(total / m.hidden + m.eps);
        for (d = 0; d < m.hidden; ++d) out[d] = x[d] * factor;
    }

    int64_t selected(int64_t output) const { return s.select[output] - s.first; }

    // The token that a row of the stream is of, while the last block narrows it.
    int64_t source(int64_t row) const { return narrowed_ ? selected(row) : row; }

    // What the products to come read: activations of all rows, in the weights' number format.
    void take(const float* x, int64_t inputs) {
        inputs_ = inputs;
        wide_ = x;
        if (m.bf16) convert(x, rows_ * inputs);
    }

    void take_normed(const float* x) {
        for (int64_t row = 0; row < rows_; ++row)
            norm(x + row * m.hidden, own_ + row * m.hidden);
        take(own_, m.hidden);
    }

    void convert(const float* x, int64_t count) {
        int64_t i = 0;
#if defined(__AVX512BF16__)
        for (; i + LANES <= count; i += LANES) ::put(halves_ + i, load(x + i));
#endif
        for (; i < count; ++i) halves_[i] = to_bf16(x[i]);
    }

    // This thread's columns of (what was taken) times packed weights.
    template <class Finish>
    void multiply(const void* weights, int64_t columns, const Finish& finish) {
        const int64_t twos = (columns + 2 * LANES - 1) / (2 * LANES);
        Range range = part(twos, thread_, s.threads);
        range = {2 * range.begin, 2 * range.end};
#if defined(__AVX512BF16__)
        if (m.bf16) {
            product(static_cast<const Bf16*>(weights), halves_, inputs_, inputs_, rows_, range,
                    finish);
            return;
        }
#endif
        product(static_cast<const float*>(weights), wide_, inputs_, inputs_, rows_, range, finish);
    }

    // Columns come in whole pairs of blocks; only a vocabulary may end within one.
    void put(float* out, int64_t columns, int64_t block, Vec left, Vec right) const {
        const int64_t at = block * LANES;
        if (at + 2 * LANES <= columns) {
            store(out + at, left);
            store(out + at + LANES, right);
            return;
        }
        for (int64_t i = 0; i < LANES; ++i) {
            if (at + i < columns) out[at + i] = left[i];
            if (at + LANES + i < columns) out[at + LANES + i] = right[i];
        }
    }

    // out[row] = from[source] + the products, for two blocks of columns.
    void add(float* out, int64_t row, const float* from, int64_t source, int64_t block, Vec left,
             Vec right) const {
        const int64_t at = block * LANES;
        from += source * m.hidden + at;
        out += row * m.hidden + at;
        store(out, load(from) + left);
        store(out + LANES, load(from + LANES) + right);
    }

    void stack(const Layer* layers, int64_t first_slot, bool is_last) {
        for (int64_t i = 0; i < m.layers; ++i)
            block(layers[i], first_slot + i, is_last && i + 1 == m.layers);
    }

    void block(const Layer& layer, int64_t slot, bool is_last) {
        take_normed(x_);
        multiply(layer.gqkv, 4 * A, [&](int64_t row, int64_t b, Vec left, Vec right) {
            put(&sh.gqkv[row * 4 * A], 4 * A, b, left, right);
        });
        sh.barrier.wait();
        Range mine = part(rows_ * m.heads, thread_, s.threads);
        for (int64_t pair = mine.begin; pair < mine.end; ++pair)
            remember(pair / m.heads, pair % m.heads, slot);
        if (s.visible) sh.barrier.wait();  // else each sees its own row, which this thread wrote
        if (is_last && s.select) {  // of the other tokens no more is needed
            narrowed_ = true;
            rows_ = s.outputs;
            mine = part(rows_ * m.heads, thread_, s.threads);
        }
        for (int64_t pair = mine.begin; pair < mine.end; ++pair) {
            const int64_t row = pair / m.heads;
            attend(source(row), pair % m.heads, slot, &sh.attended[row * A]);
        }
        sh.barrier.wait();
        take(sh.attended, A);
        const float* before = x_;
        if (narrowed_) x_ = sh.z_L;  // which nobody reads any more
        multiply(layer.o, m.hidden, [&](int64_t row, int64_t b, Vec left, Vec right) {
            add(x_, row, before, source(row), b, left, right);
        });
        sh.barrier.wait();
        take_normed(x_);
        multiply(layer.gate_up, 2 * m.mlp, [&](int64_t row, int64_t b, Vec gate, Vec up) {
            store(&sh.hidden[row * m.mlp + b / 2 * LANES], gate * sigmoid(gate) * up);
        });
        sh.barrier.wait();
        take(sh.hidden, m.mlp);
        multiply(layer.down, m.hidden, [&](int64_t row, int64_t b, Vec left, Vec right) {
            add(x_, row, x_, row, b, left, right);
        });
        sh.barrier.wait();
    }

    // out = x, rotated to a position, times a factor.
    void rotate(const float* x, int64_t position, float factor, float* out) const {
        const int64_t K = m.head_dim;
        const float* cos = m.cos + position * K;
        const float* sin = m.sin + position * K;
        for (int64_t i = 0; i < K / 2; ++i) {
            const float left = x[i], right = x[K / 2 + i];
            out[i] = (left * cos[i] + right * sin[i]) * factor;
            out[K / 2 + i] = (right * cos[K / 2 + i] + left * sin[K / 2 + i]) * factor;
        }
    }

    // Where one head of a token's row is in the cache.
    int64_t place(int64_t token, int64_t n) const {
        const int64_t row = s.rows ? s.rows[token] : s.first + token;
        return (row * m.heads + n) * s.capacity * m.head_dim;
    }

    // Write the key and the value of one head of a token.
    void remember(int64_t token, int64_t n, int64_t slot) {
        const int64_t K = m.head_dim, at = place(token, n) + s.positions[token] * K;
        const float* gqkv = &sh.gqkv[token * 4 * A + n * K];
        rotate(gqkv + 2 * A, s.positions[token], 1.0f, s.keys[slot] + at);
        std::copy(gqkv + 3 * A, gqkv + 3 * A + K, s.values[slot] + at);
    }

    // sigmoid(gate) * attention of one head of a token, over what it sees of its row.
    void attend(int64_t token, int64_t n, int64_t slot, float* attended) {
        const int64_t K = m.head_dim;
        const int64_t position = (s.visible ? s.visible[token] - 1 : s.positions[token]);
        const float* gqkv = &sh.gqkv[token * 4 * A + n * K];
        const float* keys = s.keys[slot] + place(token, n);
        const float* values = s.values[slot] + place(token, n);
        rotate(gqkv + A, s.positions[token], 1.0f / std::sqrt(float(K)), query_);
        int64_t t = 0;
        for (; t + TOGETHER <= position + 1; t += TOGETHER) score<TOGETHER>(keys, values, t);
        for (; t <= position; ++t) score<1>(keys, values, t);
        float largest = -INFINITY;
        for (t = 0; t <= position; ++t) largest = scores_[t] > largest ? scores_[t] : largest;
        // Up to a whole vector: their weights, 1e-38 each, vanish beside the largest, which is 1.
        for (int i = 0; i < LANES; ++i) scores_[position + 1 + i] = -INFINITY;
        Vec totals{};
        for (t = 0; t <= position; t += LANES) {
            const Vec weight = exp_of(load(&scores_[t]) - largest);
            store(&scores_[t], weight);
            totals += weight;
        }
        const float inverse = 1.0f / sum(totals);
        float* out = attended + n * K;
        int64_t i = 0;
        for (; i + 4 * LANES <= K; i += 4 * LANES) mix<4>(values, i, position, inverse, gqkv, out);
        for (; i < K; i += LANES) mix<1>(values, i, position, inverse, gqkv, out);
    }

    // Scores of COUNT tokens from t on: several at once hide the latency of a sum.
    template <int COUNT>
    void score(const float* keys, const float* values, int64_t t) {
        Vec products[COUNT] = {};
        for (int64_t i = 0; i < m.head_dim; i += LANES) {
            const Vec query = load(&query_[i]);
            for (int j = 0; j < COUNT; ++j) {
                const int64_t at = (t + j) * m.head_dim + i;
                products[j] += query * load(keys + at);
                __builtin_prefetch(values + at);  // read next: both streams come at once
            }
        }
        for (int j = 0; j < COUNT; ++j) scores_[t + j] = sum(products[j]);
    }

    // Dimensions from i on of the gated output.
    template <int COUNT>
    void mix(const float* values, int64_t i, int64_t position, float inverse, const float* gate,
             float* out) {
        Vec mixed[COUNT] = {};
        for (int64_t t = 0; t <= position; ++t) {
            const Vec weight = spread(scores_[t]);
            for (int j = 0; j < COUNT; ++j)
                mixed[j] += weight * load(values + t * m.head_dim + i + j * LANES);
        }
        for (int j = 0; j < COUNT; ++j) {
            const int64_t at = i + j * LANES;
            store(out + at, sigmoid(load(gate + at)) * mixed[j] * inverse);
        }
    }

    void head(float* logits) {
        sh.barrier.wait();  // z_H of all rows
        const int64_t rows = rows_;
        if (s.select && !narrowed_) {
            rows_ = s.outputs;
            for (int64_t row = 0; row < rows_; ++row)
                std::copy_n(sh.z_H + selected(row) * m.hidden, m.hidden, own_ + row * m.hidden);
            take(own_, m.hidden);
        } else {
            take(sh.z_H, m.hidden);
        }
        multiply(m.head, m.vocab, [&](int64_t row, int64_t b, Vec left, Vec right) {
            put(logits + row * m.vocab, m.vocab, b, left, right);
        });
        rows_ = rows;
    }

    const Model& m;
    const Step& s;
    Shared& sh;
    const int64_t thread_, A;
    int64_t rows_;  // of the stream now
    float* x_;      // the stream
    bool narrowed_ = false;  // to the selected tokens
    float *own_, *query_, *scores_;  // this thread's memory
    Bf16* halves_;
    const float* wide_ = nullptr;
    int64_t inputs_ = 0;
};

}  // namespace

static void work_together(const Model& model, const Step& step) {
    const Layout layout(model, step);
    Shared shared(step, layout);
    on_threads(step.threads, [&](int64_t thread) {
        Worker(model, step, layout, shared, thread).run();
    });
}

static void work_apart(const Model& model, const Step& step) {
    std::vector<Step> steps;
    float* workspace = step.workspace;
    for (int64_t thread = 0; thread < step.threads; ++thread) {
        steps.push_back(own_step(model, step, thread));
        steps.back().workspace = workspace;
        const Layout layout(model, steps.back());
        workspace += layout.shared() + layout.thread();
    }
    on_threads(step.threads, [&](int64_t thread) {
        const Step& own = steps[size_t(thread)];
        const Layout layout(model, own);
        Shared shared(own, layout);
        Worker(model, own, layout, shared, 0).run();
    });
}

extern "C" void hrm_step(const Model* model, const Step* step) {
    if (step->bounds) work_apart(*model, *step);
    else work_together(*model, *step);
}
