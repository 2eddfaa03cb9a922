// GroupNorm of channels_last images: the sums of some rows, then scale, shift, residual and
// activation.
#pragma once
#include <cstdint>

#include "product.h"

namespace hybridops::simd {

// Over `rows` pixels of C channels that lie `stride` apart: sums (2, C) = per channel the sum of (x
// - pivot) and of its square.
void channel_sums(const void* x, Type type, const float* pivot, int64_t rows, int64_t C,
                  int64_t stride, float* sums);

// y = activation((x - mean) * scale + shift + residual) on `rows` pixels of C channels; mean, scale
// and shift lie in `affine` (3, C), residual like x, or null.
void scale_rows(const void* x, const void* residual, Type type, const float* affine, int64_t rows,
                int64_t C, int64_t activation, void* y);

}  // namespace hybridops::simd
