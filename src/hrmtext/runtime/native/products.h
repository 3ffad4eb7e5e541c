// Matrix products with packed weights: blocks of LANES columns, (columns / LANES, inputs, LANES) in
// fp32, or (columns / LANES, inputs / 2, LANES, 2) in bf16 where the processor multiplies those.
#pragma once

#include <cstdint>

#include "threads.h"
#include "vectors.h"

// acc[r][b] += the products of row r with the columns of block b, over `count` inputs; rows lie
// `stride` apart, blocks `block_stride`.
template <int ROWS, int BLOCKS>
inline void tile(const float* w, int64_t block_stride, const float* x, int64_t stride,
                 int64_t count, Vec (&acc)[ROWS][BLOCKS]) {
    Vec sums[ROWS][BLOCKS];  // not `acc`, which for all the compiler knows `x` may point to
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BLOCKS; ++b) sums[r][b] = acc[r][b];
    for (int64_t k = 0; k < count; ++k) {
        Vec weights[BLOCKS];
        for (int b = 0; b < BLOCKS; ++b) {
            weights[b] = load(w + b * block_stride + k * LANES);
            if (ROWS > 1) keep(weights[b]);
        }
        for (int r = 0; r < ROWS; ++r) {
            const Vec value = spread(x[r * stride + k]);
            for (int b = 0; b < BLOCKS; ++b) sums[r][b] += value * weights[b];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BLOCKS; ++b) acc[r][b] = sums[r][b];
}

#if defined(__AVX512BF16__)
template <int ROWS, int BLOCKS>
inline void tile(const uint32_t* w, int64_t block_stride, const uint32_t* x, int64_t stride,
                 int64_t count, Vec (&acc)[ROWS][BLOCKS]) {
    __m512 sums[ROWS][BLOCKS];
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BLOCKS; ++b) sums[r][b] = (__m512)acc[r][b];
    for (int64_t k = 0; k < count; ++k) {
        __m512bh weights[BLOCKS];
        for (int b = 0; b < BLOCKS; ++b)
            weights[b] = (__m512bh)_mm512_loadu_si512(w + b * block_stride + k * LANES);
        for (int r = 0; r < ROWS; ++r) {
            const __m512bh value = (__m512bh)_mm512_set1_epi32(int(x[r * stride + k]));
            for (int b = 0; b < BLOCKS; ++b)
                sums[r][b] = _mm512_dpbf16_ps(sums[r][b], weights[b], value);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BLOCKS; ++b) acc[r][b] = (Vec)sums[r][b];
}
#endif

constexpr int64_t NEAR_ROWS = 5 * TILE_ROWS, NEAR_INPUTS = 128;
// What a piece of so many rows and inputs reads stays in the first cache.

// Inputs [inputs) of a tile: begun or continued, kept in `between` or finished.
template <int ROWS, int BLOCKS, class T, class Finish>
inline void piece_tile(const T* w, const T* x, int64_t stride, int64_t all, Range inputs,
                       int64_t row, int64_t block, float* between, const Finish& finish) {
    Vec acc[ROWS][BLOCKS] = {};
    if (inputs.begin > 0)
        for (int r = 0; r < ROWS; ++r)
            for (int b = 0; b < BLOCKS; ++b) acc[r][b] = load(between + (r * BLOCKS + b) * LANES);
    tile<ROWS, BLOCKS>(w + (block * all + inputs.begin) * LANES, all * LANES,
                       x + row * stride + inputs.begin, stride, inputs.end - inputs.begin, acc);
    if (inputs.end < all) {
        for (int r = 0; r < ROWS; ++r)
            for (int b = 0; b < BLOCKS; ++b) store(between + (r * BLOCKS + b) * LANES, acc[r][b]);
        return;
    }
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BLOCKS; b += 2) finish(row + r, block + b, acc[r][b], acc[r][b + 1]);
}

template <int ROWS, class T, class Finish>
inline void rows_tile(int64_t count, const T* w, const T* x, int64_t stride, int64_t all,
                      Range inputs, int64_t row, int64_t block, float* between,
                      const Finish& finish) {
    if constexpr (ROWS > 0) {
        if (count == ROWS)
            piece_tile<ROWS, 2>(w, x, stride, all, inputs, row, block, between, finish);
        else
            rows_tile<ROWS - 1>(count, w, x, stride, all, inputs, row, block, between, finish);
    }
}

// Blocks [range) of the product of rows, `stride` apart, with packed weights, two blocks at a time;
// `finish(row, block, left, right)` gets the sums.
template <class T, class Finish>
void product(const T* w, const T* x, int64_t stride, int64_t inputs, int64_t rows, Range range,
             const Finish& finish) {
    float between[NEAR_ROWS * 2 * LANES];
    if (rows == 1)  // enough sums at once to hide the latency of one
        for (; range.begin + 8 <= range.end; range.begin += 8)
            piece_tile<1, 8>(w, x, stride, inputs, Range{0, inputs}, 0, range.begin, between,
                             finish);
    const int64_t pieces = (rows + NEAR_ROWS - 1) / NEAR_ROWS;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const Range here = part(rows, piece, pieces);  // of like size, as their tiles are
        const int64_t count = here.end - here.begin, tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
        for (int64_t block = range.begin; block < range.end; block += 2)
            for (int64_t k = 0; k < inputs; k += NEAR_INPUTS) {
                const Range some{k, k + NEAR_INPUTS < inputs ? k + NEAR_INPUTS : inputs};
                for (int64_t t = 0; t < tiles; ++t) {
                    const Range mine = part(count, t, tiles);
                    rows_tile<TILE_ROWS>(mine.end - mine.begin, w, x, stride, inputs, some,
                                         here.begin + mine.begin, block,
                                         between + mine.begin * 2 * LANES, finish);
                }
            }
    }
}

// out[r][b] += or =: the sums over k of left[k][r] * right[k][b], both without gaps.
template <int ROWS>
inline void crossed_tile(const float* left, const float* right, int64_t count, float* out,
                         int64_t out_stride, bool adds) {
    Vec sums[ROWS][2];
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < 2; ++b)
            sums[r][b] = adds ? load(out + r * out_stride + b * LANES) : Vec{};
    for (int64_t k = 0; k < count; ++k) {
        Vec columns[2];
        for (int b = 0; b < 2; ++b) {
            columns[b] = load(right + (2 * k + b) * LANES);
            keep(columns[b]);
        }
        for (int r = 0; r < ROWS; ++r) {
            const Vec value = spread(left[k * ROWS + r]);
            for (int b = 0; b < 2; ++b) sums[r][b] += value * columns[b];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < 2; ++b) store(out + r * out_stride + b * LANES, sums[r][b]);
}

template <int ROWS>
inline void crossed_rows(int64_t rows, const float* left, int64_t left_stride, const float* right,
                         int64_t count, int64_t columns, float* packed, float* out,
                         int64_t out_stride, bool adds) {
    if constexpr (ROWS > 0) {
        if (rows != ROWS) {
            crossed_rows<ROWS - 1>(rows, left, left_stride, right, count, columns, packed, out,
                                   out_stride, adds);
            return;
        }
        for (int64_t k = 0; k < count; ++k)
            for (int r = 0; r < ROWS; ++r) packed[k * ROWS + r] = left[k * left_stride + r];
        for (int64_t c = 0; c < columns; c += 2 * LANES)
            crossed_tile<ROWS>(packed, right + c * count, count, out + c, out_stride, adds);
    }
}

constexpr int64_t CROSSED_PIECE = 64;

// Floats that `crossed_product` needs beside.
inline int64_t crossed_scratch(int64_t columns) { return CROSSED_PIECE * (columns + TILE_ROWS); }

// out (rows, columns) += or = left (count, rows) transposed, times right (count, columns), of which
// there are whole pairs of blocks. In pieces of `count` whose copies, without gaps, stay near.
inline void crossed_product(const float* left, int64_t left_stride, const float* right,
                            int64_t right_stride, int64_t count, int64_t rows, int64_t columns,
                            float* out, int64_t out_stride, bool adds, float* scratch) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    float* packed = scratch + CROSSED_PIECE * columns;
    for (int64_t k = 0; k == 0 || k < count; k += CROSSED_PIECE) {
        const int64_t piece = count - k < CROSSED_PIECE ? count - k : CROSSED_PIECE;
        for (int64_t c = 0; c < columns; c += 2 * LANES)
            for (int64_t i = 0; i < piece; ++i)
                for (int b = 0; b < 2; ++b)
                    store(scratch + c * piece + (2 * i + b) * LANES,
                          load(right + (k + i) * right_stride + c + b * LANES));
        for (int64_t t = 0; t < tiles; ++t) {
            const Range mine = part(rows, t, tiles);
            crossed_rows<TILE_ROWS>(mine.end - mine.begin, left + k * left_stride + mine.begin,
                                    left_stride, scratch, piece, columns, packed,
                                    out + mine.begin * out_stride, out_stride, adds || k > 0);
        }
    }
}
