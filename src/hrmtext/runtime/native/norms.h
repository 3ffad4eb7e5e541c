// RMSNorm without weights, of one row whose width is a multiple of LANES.
#pragma once

#include <cmath>
#include <cstdint>

#include "vectors.h"

// What RMSNorm multiplies a row with.
inline float norm_factor(const float* x, int64_t width, float eps) {
    Vec squares{};
    for (int64_t i = 0; i < width; i += LANES) squares += load(x + i) * load(x + i);
    return 1.0f / std::sqrt(sum(squares) / float(width) + eps);
}

// The gradient of its input.
inline void norm_backward(const float* x, const float* d_out, float* d_x, int64_t width, float eps) {
    const float factor = norm_factor(x, width, eps);
    Vec products{};
    for (int64_t i = 0; i < width; i += LANES) products += load(x + i) * load(d_out + i);
    const float along = sum(products) / float(width) * factor * factor;
    for (int64_t i = 0; i < width; i += LANES)
        store(d_x + i, (load(d_out + i) - load(x + i) * along) * factor);
}
