// Scaled rows of a table, and the table's gradient; letters as in block.h, and V rows of the table.
#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.h"
#include "vectors.h"

// Puts the rows of tokens [range), times `scale`, into `out` (T, D); a token that the table lacks, or -1.
inline int64_t embed(const float* table, int64_t V, int64_t D, const int64_t* tokens, Range range,
                     float scale, float* out) {
    for (int64_t t = range.begin; t < range.end; ++t) {
        if (tokens[t] < 0 || tokens[t] >= V) return t;
        const float* row = table + tokens[t] * D;
        for (int64_t i = 0; i < D; i += LANES) store(out + t * D + i, load(row + i) * scale);
    }
    return -1;
}

// The table's gradient (V, D): tokens are added in their order. By one thread: several would wait for
// each other's lines of it longer than the sums take.
inline void embed_backward(const float* d_out, int64_t V, int64_t D, const int64_t* tokens, int64_t T,
                           float scale, float* d_table) {
    std::fill(d_table, d_table + V * D, 0.0f);
    for (int64_t t = 0; t < T; ++t)
        for (int64_t i = 0; i < D; i += LANES) {
            Vec d = load(d_out + t * D + i) * scale;
            keep(d);  // rounded before it is added, as where the two are done one after the other
            float* to = d_table + tokens[t] * D + i;
            store(to, load(to) + d);
        }
}
