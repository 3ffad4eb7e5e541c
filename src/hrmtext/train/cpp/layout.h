// What a block of an HRM, its rows and what is kept of them look like in memory; letters as in block.h.
#pragma once

#include <array>
#include <cstdint>

#include "vectors.h"

extern "C" {

struct Block {
    int64_t hidden, heads, head_dim, mlp;
    int64_t bf16;  // packed weights are bf16 pairs, else fp32
    float eps;
    void *gqkv, *o, *gate_up, *down;  // packed; gqkv by `Order`, gate_up gate and up in turn
    void *gqkv_t, *o_t, *gate_up_t, *down_t;  // transposed, packed; gate_up in its order
};

struct Rows {
    int64_t tokens, outputs, rows, longest, threads;
    int64_t piece;      // tokens that a thread takes through the block at a time, about, in whole rows
    int64_t first_row;  // of the first thread; rows go round, the last is followed by row 0
    const int64_t* starts;   // (R + 1) in the stream; behind the last is padding, which passes through
    const int64_t* visible;  // (T) first position of its row that a token does not see
    const int64_t* select;   // (S) tokens whose output is wanted, ascending; null: all
    const int64_t* bounds;   // (threads + 1) rows of each thread, counted from `first_row`
    const int64_t* positions;  // (T) rows of the tables; null: of each token its own
    const float *cos, *sin;  // tables (.., K); the first half of the sines is negated
};

// For the backward pass; all null where none will come.
struct Saved {
    void* gqkv;       // (T, 4A + LINE_GAP): gate, queries and keys as they were rotated, values; by `Order`
    float* attended;  // (T, A + GAP), before the gate; from each row's first output on
    float* logsum;    // (T, N) of the scores; likewise
    float* middle;    // (S, D + GAP), behind attention
    void* gate_up;    // (S * 2M), in the order of the products' tiles
    // gqkv and gate_up are in the format of the products' inputs.
};

struct Gradients {
    float *gqkv, *o, *gate_up, *down;  // as the weights, (outputs, inputs), one behind the other
};
}

// Between rows: widths are mostly multiples of a large power of two, which would put what is read
// together into a few sets of the cache.
constexpr int64_t GAP = 16;
// The same in the format E, of as many bytes: all rows begin alike in their lines of the cache.
template <class E>
constexpr int64_t LINE_GAP = GAP * 4 / sizeof(E);

// Queries and keys are computed and kept in another order of their dimensions, which scores do not depend
// on: two neighbouring blocks have the same ones, from `angle` on, of both halves of a head, which are
// rotated together. Of gates and values `angle` is -1.
struct Order {
    int64_t size, head_dim;
    explicit Order(const Block& b) : size(b.heads * b.head_dim), head_dim(b.head_dim) {}
    int64_t angle(int64_t block) const {
        const int64_t column = block / 2 * 2 * LANES;
        return column < size || column >= 3 * size ? -1 : column % head_dim / 2;
    }
    // The first of its columns in the weight.
    int64_t column(int64_t block) const {
        const int64_t from = angle(block), here = block * LANES;
        if (from < 0) return here;
        return here - here % head_dim + from + block % 2 * head_dim / 2;
    }
};

// Where the four begin, and the last ends, in a buffer that holds them all.
inline std::array<int64_t, 5> weight_bounds(const Block& b) {
    const int64_t A = b.heads * b.head_dim, D = b.hidden, M = b.mlp;
    return {0, 4 * A * D, 5 * A * D, (5 * A + 2 * M) * D, (5 * A + 3 * M) * D};
}

// The parts of such a buffer.
inline Gradients inside(const Block& b, float* memory) {
    const auto at = weight_bounds(b);
    return {memory + at[0], memory + at[1], memory + at[2], memory + at[3]};
}
