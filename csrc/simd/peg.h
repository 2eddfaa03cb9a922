// Depthwise convolution on tokens: one image's rows, or one slice of channels of its weight's
// gradient.
#pragma once
#include <cstdint>

#include "product.h"

namespace hybridops::simd {

struct Depthwise {
  int64_t H, W, C, K, stride, padding, Ho, Wo;
};

// Output row `ho` of one image: x (H, W, C), taps (K * K, C) and bias (C, or null) in fp32, y (Ho,
// Wo, C); x and y in `type`. y = activation(conv) + x where residual, x * sigmoid(activation(conv))
// where gate. far: x and y come from DRAM, so rows are fetched ahead.
void depthwise_row(const void* x, Type type, const float* taps, const float* bias,
                   const Depthwise& d, int64_t ho, bool residual, bool gate, bool far,
                   int64_t activation, void* y);

// Row h of one image's dx (H, W, C), written; dy (Ho, Wo, C) and taps (K * K, C).
void depthwise_input_gradient(const void* dy, Type type, const float* taps, const Depthwise& d,
                              int64_t h, void* dx);

// Channels [begin, end) of one image: dtaps (K * K, C) and dbias (C) are added to.
void depthwise_weight_gradient(const void* dy, const void* x, Type type, const Depthwise& d,
                               int64_t begin, int64_t end, float* dtaps, float* dbias);

int64_t channel_block();  // slices of channels in multiples of it waste nothing

}  // namespace hybridops::simd
