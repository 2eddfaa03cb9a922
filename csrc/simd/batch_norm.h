// The gradient of a BatchNorm with the batch's own statistics and the activation behind it, on rows
// of C channels. What it computes forward is group_norm.h's.
#pragma once
#include <cstdint>

#include "product.h"

namespace hybridops::simd {

// y = activation(x * scale + shift), where scale and shift (C) come of x's own mean (C).
struct Normed {
  const float *scale, *shift, *mean;
  int64_t activation;  // kNone, kRelu, kSilu or kHardswish
};

// With g = dy * activation', per channel over `rows` rows: sums (2, C) = the sum of g and of
// g * (x - mean).
void gradient_sums(const void* dy, const void* x, Type type, const Normed& normed, int64_t rows,
                   int64_t C, float* sums);

// dx = scale * g + slope * (x - mean) + offset; slope and offset (C).
void gradient_rows(const void* dy, const void* x, Type type, const Normed& normed,
                   const float* slope, const float* offset, int64_t rows, int64_t C, void* dx);

}  // namespace hybridops::simd
