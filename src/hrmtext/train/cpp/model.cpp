// What Python calls: a block, the norm at a stack's exit, a whole recurrence, the head's loss, each forward
// and backward; and all of a model's at once.

#include <atomic>

#include "block.h"
#include "embedding.h"
#include "head.h"
#include "recurrence.h"

extern "C" {

// One microbatch's way through a model, and back.
struct Model {
    const Recurrence* recurrence;
    const Call* calls;
    const CallBackward* steps;  // the last call first
    int64_t num_steps;
    float* workspace;  // of the recurrence, `own` floats for each thread
    int64_t own;
    const LossTask* head;
    float* head_workspace;
    const int64_t* row_of;  // (S) rows of the supervised tokens
    int64_t num_rows;
    double* sums;           // (4), as `sum_up` has them
    const int64_t* tokens;  // (T)
    const float* table;     // (V, D)
    int64_t vocab;
    float scale;             // of what is looked up
    float* embedded;         // (T, D), where the recurrence begins
    const float* d_embedded; // (T, D); not read where d_table is null
    float* d_table;          // (V, D); null where none is wanted
};
}

extern "C" int64_t hrm_lanes() { return LANES; }
extern "C" int64_t hrm_block_has_bf16() { return HAS_BF16; }
extern "C" int64_t hrm_block_gap() { return GAP; }

// Floats of workspace that each thread needs.
extern "C" int64_t hrm_block_workspace(const Block* block, const Rows* rows, int64_t is_backward) {
    int64_t used = 0;
    in_format(block->bf16, [&](auto format) {
        used = Worker<decltype(format)>(*block, *rows, is_backward != 0, Arena(nullptr)).used;
    });
    return used;
}

// Packs weights as they are, (outputs, inputs), to where the block has them.
extern "C" void hrm_block_pack(const Block* block, const float* gqkv, const float* o,
                               const float* gate_up, const float* down, int64_t threads) {
    const int64_t A = block->heads * block->head_dim, D = block->hidden, M = block->mlp;
    on_threads(threads, [&](int64_t thread) {
        in_format(block->bf16, [&](auto format) {
            auto both = [&](const float* weight, int64_t outputs, int64_t inputs, const auto& order,
                            void* packed, void* transposed) {
                using E = decltype(format);
                pack<E>(weight, outputs, inputs, false, order, thread, threads, packed);
                pack<E>(weight, outputs, inputs, true, in_order, thread, threads, transposed);
            };
            auto by_angle = [&](int64_t at) { return Order(*block).column(at); };
            auto in_turn = [&](int64_t at) { return at % 2 * M + at / 2 * LANES; };
            both(gqkv, 4 * A, D, by_angle, block->gqkv, block->gqkv_t);
            both(o, D, A, in_order, block->o, block->o_t);
            both(gate_up, 2 * M, D, in_turn, block->gate_up, block->gate_up_t);
            both(down, D, M, in_order, block->down, block->down_t);
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
                                  const float* x, float* y, float* workspace, int64_t own) {
    on_threads(rows->threads, [&](int64_t thread) {
        in_format(block->bf16, [&](auto format) {
            Worker<decltype(format)> worker(*block, *rows, false, Arena(workspace + thread * own));
            worker.take(*block, *rows, *saved);
            worker.forward(thread, x, y, nothing, nothing);
        });
    });
    if (rows->select) return;
    const int64_t used = rows->starts[rows->rows] * block->hidden;
    std::copy(x + used, x + rows->tokens * block->hidden, y + used);
}

// `d_weights`: of gqkv, o, gate_up and down.
extern "C" void hrm_block_backward(const Block* block, const Rows* rows, const Saved* saved,
                                   const float* x, const float* d_y, float* d_x,
                                   float* const* d_weights, float* workspace, int64_t own) {
    Sums sums(rows->threads);
    on_threads(rows->threads, [&](int64_t thread) {
        in_format(block->bf16, [&](auto format) {
            Worker<decltype(format)> worker(*block, *rows, true, Arena(workspace + thread * own));
            worker.take(*block, *rows, *saved);
            worker.backward(thread, x, d_y, d_x, nothing, nothing);
            sums.collect(thread, worker.weights, *block, d_weights, false);
        });
    });
    const int64_t used = rows->starts[rows->rows] * block->hidden, all = rows->tokens * block->hidden;
    if (rows->select) std::fill(d_x + used, d_x + all, 0.0f);
    else std::copy(d_y + used, d_y + all, d_x + used);
}

// A recurrence's calls of its stacks: see recurrence.h.
extern "C" void hrm_recurrence_forward(const Recurrence* recurrence, const Call* calls,
                                       float* workspace, int64_t own) {
    on_threads(recurrence->rows->threads, [&](int64_t thread) {
        in_format(recurrence->blocks[0].bf16, [&](auto format) {
            const Arena arena(workspace + thread * own);
            Walk<decltype(format)>(*recurrence, calls, thread, false, arena).forward();
        });
    });
}

// `steps`: the backward passes of some calls, the last call first.
extern "C" void hrm_recurrence_backward(const Recurrence* recurrence, const Call* calls,
                                        const CallBackward* steps, int64_t count, float* workspace,
                                        int64_t own) {
    Sums sums(recurrence->rows->threads);
    on_threads(recurrence->rows->threads, [&](int64_t thread) {
        in_format(recurrence->blocks[0].bf16, [&](auto format) {
            const Arena arena(workspace + thread * own);
            Walk<decltype(format)>(*recurrence, calls, thread, true, arena).backward(steps, count, sums);
        });
    });
}

// Floats of workspace.
extern "C" int64_t hrm_head_workspace(const LossTask* head) {
    int64_t used = 0;
    in_format(head->bf16, [&](auto format) { used = Loss<decltype(format)>(*head, Arena(nullptr)).used; });
    return used;
}

extern "C" void hrm_head_loss(const LossTask* head, float* workspace) {
    Barrier barrier{int(head->threads)};
    on_threads(head->threads, [&](int64_t thread) {
        in_format(head->bf16, [&](auto format) {
            Loss<decltype(format)>(*head, Arena(workspace)).run(thread, barrier);
        });
    });
}

// Loss and gradients of a whole model; which token is not in its vocabulary, or -1.
extern "C" int64_t hrm_model_gradients(const Model* model) {
    const Model& m = *model;
    const Rows& rows = *m.recurrence->rows;
    const int64_t width = m.recurrence->blocks[0].hidden;
    std::atomic<int64_t> bad{-1};
    on_threads(rows.threads, [&](int64_t thread) {
        const Range mine = part(rows.tokens, thread, rows.threads);
        const int64_t found = embed(m.table, m.vocab, width, m.tokens, mine, m.scale, m.embedded);
        if (found >= 0) bad = found;
    });
    if (bad >= 0) return bad;
    hrm_recurrence_forward(m.recurrence, m.calls, m.workspace, m.own);
    hrm_head_loss(m.head, m.head_workspace);
    sum_up(*m.head, m.row_of, m.num_rows, m.sums);
    hrm_recurrence_backward(m.recurrence, m.calls, m.steps, m.num_steps, m.workspace, m.own);
    if (m.d_table)
        embed_backward(m.d_embedded, m.vocab, width, m.tokens, rows.tokens, m.scale, m.d_table);
    return -1;
}
