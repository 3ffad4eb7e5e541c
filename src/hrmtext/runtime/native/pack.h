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
    for (int64_t k = 0; k < count; k += 2) {
        const __m512 low = (__m512)load(from + k * stride);
        const __m512 high = k + 1 < count ? (__m512)load(from + (k + 1) * stride) : _mm512_setzero_ps();
        _mm512_storeu_si512(to + k * LANES, interleave((__m512i)_mm512_cvtne2ps_pbh(high, low)));
    }
}
// The same of numbers that are bf16 already.
inline void pack_rows(const Bf16* from, int64_t stride, int64_t columns, int64_t count, Bf16* to) {
    for (int64_t k = 0; k < count; k += 2 * LANES) {
        __m512 row[16];
        for (int l = 0; l < 16; ++l)
            row[l] = l < columns ? _mm512_loadu_ps(from + l * stride + k) : _mm512_setzero_ps();
        transpose(row);
        for (int pair = 0; pair < 16; ++pair) _mm512_storeu_ps(to + (k + 2 * pair) * LANES, row[pair]);
    }
}
inline void pack_columns(const Bf16* from, int64_t stride, int64_t count, Bf16* to) {
    for (int64_t k = 0; k < count; k += 2)
        _mm512_storeu_si512(to + k * LANES, two_rows(from + k * stride, stride, k + 1 == count));
}
#endif

// Blocks of columns as they come.
constexpr auto in_order = [](int64_t block) { return block * LANES; };

// A thread's blocks of a packed weight (outputs, inputs), or of its transpose; order(block) is the
// first column of a block.
template <class E, class Order>
void pack(const float* weight, int64_t outputs, int64_t inputs, bool transposed, const Order& order,
          int64_t thread, int64_t threads, void* packed) {
    const int64_t columns = transposed ? inputs : outputs, count = transposed ? outputs : inputs;
    const Range mine = part(columns / LANES, thread, threads);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
        E* out = static_cast<E*>(packed) + block * LANES * count;
        const int64_t from = order(block);
        if (transposed) pack_columns(weight + from, inputs, count, out);
        else pack_rows(weight + from * inputs, inputs, LANES, count, out);
    }
}
