// Weights as products.h reads them.
#pragma once

#include <cstdint>

#include "threads.h"
#include "vectors.h"

// Column l at input k of a packed block.
inline int64_t place(float, int64_t k, int64_t l) { return k * LANES + l; }
inline float rounded_to(float, float x) { return x; }
#if defined(__AVX512BF16__)
inline int64_t place(Bf16, int64_t k, int64_t l) { return (k / 2 * LANES + l) * 2 + k % 2; }
inline Bf16 rounded_to(Bf16, float x) { return to_bf16(x); }
#endif

// A thread's blocks of a packed weight (outputs, inputs), of its transpose, or of two in turn, as gate
// and up, of which `weight` has the first in its first half.
template <class E>
void pack(const float* weight, int64_t outputs, int64_t inputs, bool transposed, bool in_turn,
          int64_t thread, int64_t threads, void* packed) {
    const int64_t columns = transposed ? inputs : outputs, count = transposed ? outputs : inputs;
    const int64_t along = transposed ? inputs : 1, across = transposed ? 1 : inputs;
    const int64_t blocks = columns / LANES;
    const Range mine = part(blocks, thread, threads);
    for (int64_t block = mine.begin; block < mine.end; ++block) {
        E* out = static_cast<E*>(packed) + block * LANES * count;
        const int64_t from = in_turn ? block / 2 + block % 2 * (blocks / 2) : block;
        const float* w = weight + from * LANES * across;
        for (int64_t k = 0; k < count; ++k)
            for (int64_t l = 0; l < LANES; ++l)
                out[place(E{}, k, l)] = rounded_to(E{}, w[k * along + l * across]);
    }
}
