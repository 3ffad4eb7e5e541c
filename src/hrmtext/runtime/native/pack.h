// Weights as products.h reads them.
#pragma once

#include <cstdint>

#include "products.h"
#include "threads.h"
#include "vectors.h"

// Inputs as they are packed: in bf16 whole pairs.
inline int64_t whole_inputs(float, int64_t count) { return count; }

// Packs LANES columns over `count` inputs: column l at input k is from[l * stride + k], zero from column
// `columns` on. There are whole pairs of vectors of inputs ...
inline void pack_rows(const float* from, int64_t stride, int64_t columns, int64_t count, float* to) {
    for (int64_t k = 0; k < count; k += LANES) transpose(from + k, stride, columns, to + k * LANES);
}
// ... or from[k * stride + l], of any number of inputs.
inline void pack_columns(const float* from, int64_t stride, int64_t count, float* to) {
    for (int64_t k = 0; k < count; ++k) store(to + k * LANES, load(from + k * stride));
}
#if defined(__AVX512BF16__)
inline int64_t whole_inputs(Bf16, int64_t count) { return (count + 1) / 2 * 2; }
inline void pack_rows(const float* from, int64_t stride, int64_t columns, int64_t count, Bf16* to) {
    for (int64_t k = 0; k < count; k += 2 * LANES) {
        __m512 row[16];
        for (int l = 0; l < 16; ++l) {
            const float* x = from + l * stride + k;
            row[l] = l < columns ? (__m512)_mm512_cvtne2ps_pbh((__m512)load(x + LANES), (__m512)load(x))
                                 : _mm512_setzero_ps();
        }
        transpose(row);
        for (int pair = 0; pair < 16; ++pair) _mm512_storeu_ps(to + (k + 2 * pair) * LANES, row[pair]);
    }
}
inline void pack_columns(const float* from, int64_t stride, int64_t count, Bf16* to) {
    Bf16 two[2 * LANES];
    for (int64_t k = 0; k < count; k += 2) {
        const bool is_last = k + 1 == count;
        put(two, load(from + k * stride));
        if (!is_last) put(two + LANES, load(from + (k + 1) * stride));
        _mm512_storeu_si512(to + k * LANES, two_rows(two, LANES, is_last));
    }
}
#endif

// A thread's blocks of a packed weight (outputs, inputs), of its transpose, or of two in turn, as gate
// and up, of which `weight` has the first in its first half.
template <class E>
void pack(const float* weight, int64_t outputs, int64_t inputs, bool transposed, bool in_turn,
          int64_t thread, int64_t threads, void* packed) {
    const int64_t columns = transposed ? inputs : outputs, count = transposed ? outputs : inputs;
    const int64_t blocks = columns / LANES;
    const Range mine = part(blocks, thread, threads);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
        E* out = static_cast<E*>(packed) + block * LANES * count;
        const int64_t from = (in_turn ? block / 2 + block % 2 * (blocks / 2) : block) * LANES;
        if (transposed) pack_columns(weight + from, inputs, count, out);
        else pack_rows(weight + from * inputs, inputs, LANES, count, out);
    }
}
