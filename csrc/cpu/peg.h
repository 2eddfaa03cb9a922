// Depthwise convolution of tokens, for the ops that need it.
#pragma once
#include "../simd/peg.h"
#include "common.h"

namespace hybridops {

// Of x (B, prefix + H * W, C) and weight (C, 1, K, K), which must fit.
simd::Depthwise depthwise_of(const Tensor& x, const Tensor& weight, int64_t H, int64_t W,
                             int64_t prefix, int64_t stride, int64_t padding);

// weight (C, 1, K, K) as fp32 taps (K * K, C), so that channels lie side by side; the last first
// where `reversed`.
const float* taps_of(Room& room, const Tensor& weight, bool reversed = false);

// What hybridops::peg gives for taps and a bias (C, or null) in fp32.
Tensor depthwise(const Tensor& x, const simd::Depthwise& d, const float* taps, const float* shift,
                 int64_t prefix, bool residual, int64_t activation, bool gate);

}  // namespace hybridops
