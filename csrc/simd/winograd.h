// Winograd's minimal filtering F(2 x 4, 3 x 3): 8 pixels of a 3 x 3 convolution from a patch of
// 4 x 6, with 24 products a pair of channels where the sum itself takes 72. Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", 2015.
#pragma once
#include <cstdint>

#include "product.h"

namespace hybridops::simd {

constexpr int64_t kTileRows = 2, kTileColumns = 4;    // pixels that a tile yields
constexpr int64_t kPatchRows = 4, kPatchColumns = 6;  // that it is made of
constexpr int64_t kPoints = kPatchRows * kPatchColumns;

// The patch at x (rows `stride_row` numbers apart, pixels C) as kPoints numbers a channel: point k
// of channel c goes to y[k * stride_point + c].
void to_points(const float* x, int64_t stride_row, int64_t C, float* y, int64_t stride_point);

// Back to `rows` x `columns` pixels of N channels: y = activation(pixels + bias + residual), rows
// `stride_row` and pixels `stride_pixel` apart, in y as in the residual. bias and residual may be
// null.
void from_points(const float* points, int64_t stride_point, int64_t N, const float* bias,
                 const float* residual, int64_t activation, int64_t rows, int64_t columns, float* y,
                 int64_t stride_row, int64_t stride_pixel);

}  // namespace hybridops::simd
