// What is done to rows right before and after a product.
#pragma once

#include <cstdint>

#include "vectors.h"

// What a product takes of rows in fp32: the same, or rounded into `into`.
inline const float* operand(const float* x, int64_t, int64_t, int64_t, float*) { return x; }
#if defined(__AVX512BF16__)
inline const Bf16* operand(const float* x, int64_t stride, int64_t rows, int64_t columns, Bf16* into) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < columns; i += 2 * LANES)
            put(into + row * stride + i, load(x + row * stride + i), load(x + row * stride + i + LANES));
    return into;
}
#endif

// Turns the same dimensions, from `angle` on, of both halves of a head by the tables of a token.
struct Rotation {
    const int64_t* positions;  // rows of the tables; null: of each token its own
    const float *cos, *sin;
    int64_t stride;
    void operator()(Vec& left, Vec& right, int64_t token, int64_t angle, bool back = false) const {
        const int64_t at = (positions ? positions[token] : token) * stride + angle;
        const Vec c = load(cos + at), s = load(sin + at);
        const Vec was = left, turned = back ? -s : s;
        left = was * c - right * turned;
        right = right * c + was * turned;
    }
};

// Adds a product's sums to rows of `x`, those of the listed tokens if there is a list, into `out`.
struct AddTo {
    const float* x;
    int64_t x_stride;
    const int64_t* tokens;
    int64_t first;  // token of the first row of `x`
    float* out;
    int64_t stride;
    void operator()(int64_t row, int64_t block, Vec left, Vec right) const {
        const float* from = x + (tokens ? tokens[row] - first : row) * x_stride + block * LANES;
        float* to = out + row * stride + block * LANES;
        store(to, load(from) + left);
        store(to + LANES, load(from + LANES) + right);
    }
    void ask_for(int64_t row, int64_t block) const {
        __builtin_prefetch(out + row * stride + block * LANES, 1);
        __builtin_prefetch(out + row * stride + block * LANES + LANES, 1);
    }
};
