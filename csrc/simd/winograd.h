// Winograd's minimal filtering for 3 x 3 convolutions: a tile of output pixels is made of a patch
// of the image in three steps, points of the patch, products with points of the weight, and sums of
// those. Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015.
#pragma once
#include <cstdint>

#include "product.h"

namespace hybridops::simd {

constexpr int64_t kOperands = 24;  // of a filtering, at most

struct Filtering {
  int64_t stride, rows, columns;      // of the convolution, and of a tile
  int64_t patch_rows, patch_columns;  // that a tile is made of
  int64_t operands, points;           // products a tile, and their depth in all
  int64_t depths[kOperands];          // points of each operand: its products have K = depth * C

  // The patch at x (rows `stride_row` numbers apart, pixels C) as row `tile` of every operand:
  // depth * C numbers each, operands `stride` numbers apart.
  void (*to_points)(const float* x, int64_t stride_row, int64_t C, int64_t tile, float* operands,
                    int64_t stride);
};

// For stride 1 F(2 x 4, 3 x 3), 24 products where the sum itself takes 72; for stride 2, 2 x 2
// pixels with 25 where it takes 36.
const Filtering& filtering(int64_t stride);

// Where a tile's pixels go: rows and columns of them, N channels each.
struct Pixels {
  int64_t rows, columns, N;
  float* y;
  const float* residual;  // like y, or null
  int64_t stride_row, stride_pixel;
  const float* bias;  // or null
  int64_t activation;
};

// activation(sums of products + bias + residual); products `stride` numbers apart.
void to_pixels(const Filtering& filtering, const float* products, int64_t stride,
               const Pixels& pixels);

}  // namespace hybridops::simd
