// Matrix products with packed weights: blocks of LANES columns, (columns / LANES, inputs, LANES) in
// fp32, or (columns / LANES, inputs / 2, LANES, 2) in bf16 where the processor multiplies those.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "threads.h"
#include "vectors.h"

// Calls f of the constants 0 to COUNT - 1: what they index stays in registers, which compilers do not
// see in time where they unroll loops.
template <class F, int... I>
inline void each_of(const F& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int COUNT, class F>
inline void each(const F& f) {
    each_of(f, std::make_integer_sequence<int, COUNT>{});
}

// Sums of products of row r with the columns of block b over `count` inputs: input k of row r is
// x[r * stride + k], or x[k * TILE_ROWS + r] if CROSSED; blocks lie `block_stride` apart. Those of row r
// are put into sums[r * sum_stride], one block behind the other; `adds`: to what is there. Not inlined:
// compilers then spill what it holds.
template <int ROWS, int BLOCKS, bool CROSSED, class T>
__attribute__((noinline, flatten)) void tile(const T* w, int64_t block_stride, const T* x, int64_t stride,
                                             int64_t count, float* sums, int64_t sum_stride, bool adds) {
    typedef typename Factor<T>::Many Many;
    Vec acc[ROWS * BLOCKS];
    each<ROWS * BLOCKS>([&](auto i) { acc[i] = Vec{}; });
    for (int64_t k = 0; k < count; ++k) {
        Many weights[BLOCKS];
        each<BLOCKS>([&](auto b) {
            weights[b] = Factor<T>::load(w + b * block_stride + k * LANES);
            if (ROWS > 1) keep(weights[b]);
        });
        each<ROWS>([&](auto r) {
            const Many value = Factor<T>::spread(x[CROSSED ? k * TILE_ROWS + r : r * stride + k]);
            each<BLOCKS>([&](auto b) { Factor<T>::add(acc[r * BLOCKS + b], value, weights[b]); });
        });
    }
    each<ROWS>([&](auto r) {
        each<BLOCKS>([&](auto b) {
            float* to = sums + r * sum_stride + b * LANES;
            store(to, adds ? load(to) + acc[r * BLOCKS + b] : acc[r * BLOCKS + b]);
        });
    });
}

constexpr int64_t NEAR_ROWS = 5 * TILE_ROWS, NEAR_INPUTS = 128;
// What a piece of so many rows and inputs reads stays in the first cache.
constexpr int64_t NEAR_BYTES = 1 << 18;  // of weights, which all rows meet while they are in the second

// Where a tile's sums will go is asked for while it is computed, if `finish` says where.
template <class Finish>
inline auto ask_for(const Finish& finish, int64_t row, int64_t block, int)
    -> decltype(finish.ask_for(row, block)) {
    finish.ask_for(row, block);
}
template <class Finish>
inline void ask_for(const Finish&, int64_t, int64_t, long) {}

// Inputs [inputs) of a tile of a weight with `all`, begun or continued (`adds`); the sums are in `sums`,
// (ROWS, BLOCKS, LANES).
template <int ROWS, int BLOCKS, class T>
inline void piece_tile(const T* w, const T* x, int64_t stride, int64_t all, Range inputs, int64_t block,
                       float* sums, bool adds) {
    tile<ROWS, BLOCKS, false>(w + (block * all + inputs.begin) * LANES, all * LANES, x + inputs.begin,
                              stride, inputs.end - inputs.begin, sums, BLOCKS * LANES, adds);
}

template <int ROWS, class T>
inline void rows_tile(int64_t count, const T* w, const T* x, int64_t stride, int64_t all, Range inputs,
                      int64_t block, float* sums, bool adds) {
    if constexpr (ROWS > 0) {
        if (count == ROWS) piece_tile<ROWS, 2>(w, x, stride, all, inputs, block, sums, adds);
        else rows_tile<ROWS - 1>(count, w, x, stride, all, inputs, block, sums, adds);
    }
}

// Blocks [range) of the product of rows, `stride` apart, with packed weights, two blocks at a time;
// `finish(row, block, left, right)` gets the sums, in a loop: a copy for each sum is slower to fetch
// than what it computes. It is copied, so that what it holds by value may stay in registers.
template <class T, class Finish>
__attribute__((flatten)) void near_product(const T* w, const T* x, int64_t stride, int64_t all,
                                           Range inputs, int64_t rows, Range range,
                                           const Finish finish) {
    alignas(64) float between[NEAR_ROWS * 2 * LANES];
    const int64_t pieces = (rows + NEAR_ROWS - 1) / NEAR_ROWS;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const Range here = part(rows, piece, pieces);  // of like size, as their tiles are
        const int64_t count = here.end - here.begin, tiles = (count + TILE_ROWS - 1) / TILE_ROWS;
        for (int64_t block = range.begin; block < range.end; block += 2)
            for (int64_t k = inputs.begin; k < inputs.end; k += NEAR_INPUTS) {
                const Range some{k, std::min(k + NEAR_INPUTS, inputs.end)};
                for (int64_t t = 0; t < tiles; ++t) {
                    const Range mine = part(count, t, tiles);
                    float* sums = between + mine.begin * 2 * LANES;
                    const int64_t first = here.begin + mine.begin, size = mine.end - mine.begin;
                    const bool is_last = some.end == inputs.end;
                    for (int64_t r = 0; is_last && r < size; ++r) ask_for(finish, first + r, block, 0);
                    rows_tile<TILE_ROWS>(size, w, x + first * stride, stride, all, some, block, sums,
                                         k > inputs.begin);
#pragma GCC unroll 4
                    for (int64_t r = 0; is_last && r < size; ++r) {
                        const float* sum = sums + r * 2 * LANES;
                        finish(first + r, block, load(sum), load(sum + LANES));
                    }
                }
            }
    }
}

// The same, so many blocks at a time that their weights stay in the second cache for all rows. Of the
// `all` inputs that weights and rows have, only those of a range are multiplied.
template <class T, class Finish>
void product_of(const T* w, const T* x, int64_t stride, int64_t all, Range inputs, int64_t rows,
                Range range, const Finish& finish) {
    if (rows == 1)  // enough sums at once to hide the latency of one
        for (; range.begin + 8 <= range.end; range.begin += 8) {
            alignas(64) float sums[8 * LANES];
            piece_tile<1, 8>(w, x, stride, all, inputs, range.begin, sums, false);
            for (int64_t b = 0; b < 8; b += 2)
                finish(0, range.begin + b, load(sums + b * LANES), load(sums + (b + 1) * LANES));
        }
    const int64_t pair = 2 * LANES * (inputs.end - inputs.begin) * int64_t(sizeof(T));  // bytes
    const int64_t group = 2 * std::max<int64_t>(1, NEAR_BYTES / pair);
    for (; range.begin < range.end; range.begin += group) {
        const Range some{range.begin, std::min(range.end, range.begin + group)};
        near_product(w, x, stride, all, inputs, rows, some, finish);
    }
}

#if defined(__AVX512BF16__)
// The same of bf16, whose pairs along the inputs lie together in weights and rows.
template <class Finish>
void product_of(const Bf16* w, const Bf16* x, int64_t stride, int64_t all, Range inputs, int64_t rows,
                Range range, const Finish& finish) {
    const Range pairs{inputs.begin / 2, inputs.end / 2};
    product_of(reinterpret_cast<const Pair*>(w), reinterpret_cast<const Pair*>(x), stride / 2, all / 2,
               pairs, rows, range, finish);
}
#endif

// Of all inputs.
template <class E, class Finish>
void product(const E* w, const E* x, int64_t stride, int64_t inputs, int64_t rows, Range range,
             const Finish& finish) {
    product_of(w, x, stride, inputs, Range{0, inputs}, rows, range, finish);
}

// All blocks of so many columns.
inline Range blocks(int64_t columns) { return {0, columns / LANES}; }

// Puts a product's sums into rows `stride` apart.
struct Put {
    float* out;
    int64_t stride;
    void operator()(int64_t row, int64_t block, Vec left, Vec right) const {
        store(out + row * stride + block * LANES, left);
        store(out + row * stride + block * LANES + LANES, right);
    }
};

// `finish`, and what fetches the memory that it will use: fetch(row, block) at the start of a tile.
template <class Finish, class Fetch>
struct Fetching : Finish {
    Fetch fetch;
    Fetching(const Finish& finish, const Fetch& fetch) : Finish(finish), fetch(fetch) {}
    void ask_for(int64_t row, int64_t block) const { fetch(row, block); }
};

constexpr int64_t CROSSED_STEPS = 64;  // of numbers, or of pairs of them

// Copies of a piece of `count` rows, without gaps, for products over them: of all columns, and of the
// first ones, at most TILE_ROWS; what is copied beyond these the next row overwrites. Both return how
// many steps the product has.
inline int64_t copy_right(const float* x, int64_t stride, int64_t count, int64_t columns, float* out) {
    for (int64_t c = 0; c < columns; c += LANES)
        for (int64_t k = 0; k < count; ++k)
            store(out + (c / LANES * count + k) * LANES, load(x + k * stride + c));
    return count;
}
inline int64_t copy_left(const float* x, int64_t stride, int64_t count, int64_t columns, float* out) {
    int64_t k = 0;
    for (; k + 1 < count; ++k) store(out + k * TILE_ROWS, load(x + k * stride));
    for (int64_t r = 0; r < columns && count; ++r) out[k * TILE_ROWS + r] = x[k * stride + r];
    return count;
}

#if defined(__AVX512BF16__)
// In bf16 two rows lie together, an odd last one beside zeros. Both read LANES columns at a time.
inline __m512i two_rows(const Bf16* x, int64_t stride, bool is_last) {
    const __m256i none = _mm256_setzero_si256();
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    const __m256i high =
        is_last ? none : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + stride));
    return interleave(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}
inline int64_t copy_right(const Bf16* x, int64_t stride, int64_t count, int64_t columns, Pair* out) {
    const int64_t pairs = (count + 1) / 2;
    for (int64_t c = 0; c < columns; c += LANES)
        for (int64_t k = 0; k < pairs; ++k)
            _mm512_storeu_si512(out + (c / LANES * pairs + k) * LANES,
                                two_rows(x + 2 * k * stride + c, stride, 2 * k + 1 == count));
    return pairs;
}
inline int64_t copy_left(const Bf16* x, int64_t stride, int64_t count, int64_t, Pair* out) {
    const int64_t pairs = (count + 1) / 2;
    for (int64_t k = 0; k < pairs; ++k)
        _mm512_storeu_si512(out + k * TILE_ROWS,
                            two_rows(x + 2 * k * stride, stride, 2 * k + 1 == count));
    return pairs;
}
#endif

// Fetches what the next tile of sums begins with: further on in its rows, or at their ends of those below.
template <int ROWS>
inline void fetch_ahead(const float* out, int64_t stride, int64_t column, int64_t columns) {
    const int64_t from = column < columns ? column : ROWS * stride + column - columns;
    for (int r = 0; r < ROWS; ++r) {
        __builtin_prefetch(out + r * stride + from);
        __builtin_prefetch(out + r * stride + from + LANES);
    }
}

template <int ROWS, class T>
inline void crossed_rows(int64_t rows, const T* left, const T* right, int64_t steps, int64_t columns,
                         float* out, int64_t out_stride, bool adds) {
    if constexpr (ROWS > 0) {
        if (rows != ROWS) {
            crossed_rows<ROWS - 1>(rows, left, right, steps, columns, out, out_stride, adds);
            return;
        }
        for (int64_t c = 0; c < columns; c += 2 * LANES) {
            if (adds) fetch_ahead<ROWS>(out, out_stride, c + 4 * LANES, columns);
            tile<ROWS, 2, true>(right + c * steps, steps * LANES, left, 0, steps, out + c, out_stride, adds);
        }
    }
}

// Floats that `crossed_product` needs beside.
inline int64_t crossed_scratch(int64_t columns) {
    return CROSSED_STEPS * (columns + TILE_ROWS) + LANES;
}

// out (rows, columns) += or = left (count, rows) transposed, times right (count, columns), of which
// there are whole pairs of blocks. In pieces of `count` whose copies, without gaps, stay near. In
// bf16 what lies LANES behind a row of `left` is read too, and not used.
template <class E>
void crossed_product(const E* left, int64_t left_stride, const E* right, int64_t right_stride,
                     int64_t count, int64_t rows, int64_t columns, float* out, int64_t out_stride,
                     bool adds, float* scratch) {
    using Copied = typename Copy<E>::Type;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    Copied* right_copy = reinterpret_cast<Copied*>(scratch);
    Copied* left_copy = right_copy + CROSSED_STEPS * columns;
    const int64_t most = CROSSED_STEPS * int64_t(sizeof(Copied) / sizeof(E));
    for (int64_t k = 0; k == 0 || k < count; k += most) {
        const int64_t piece = std::min(count - k, most);
        copy_right(right + k * right_stride, right_stride, piece, columns, right_copy);
        for (int64_t t = 0; t < tiles; ++t) {
            const Range mine = part(rows, t, tiles);
            const int64_t steps = copy_left(left + k * left_stride + mine.begin, left_stride, piece,
                                            mine.end - mine.begin, left_copy);
            crossed_rows<TILE_ROWS>(mine.end - mine.begin, left_copy, right_copy, steps, columns,
                                    out + mine.begin * out_stride, out_stride, adds || k > 0);
        }
    }
}
