// Sizes and images, as a convolution's forward and backward see them.
#pragma once
#include "../simd/conv.h"
#include "common.h"

namespace hybridops {

struct Sides {
  int64_t top, left, bottom, right;
};

struct Size {
  int64_t H, W;
  Size after(int64_t Kh, int64_t Kw, int64_t stride, const Sides& p) const {
    return {(H + p.top + p.bottom - Kh) / stride + 1, (W + p.left + p.right - Kw) / stride + 1};
  }
};

// An image (B, C, H, W) of fp32 whose pixels, and their channels, lie side by side.
struct ChannelsLast {
  int64_t B, C, H, W;

  ChannelsLast(const Tensor& x, const char* refusal) {
    STD_TORCH_CHECK(
        x.is_cpu() && x.dim() == 4 && x.scalar_type() == ScalarType::Float && is_channels_last(x),
        refusal);
    B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  }
};

inline simd::Image image_of(const Tensor& x, int64_t b) {
  return {offset(x.const_data_ptr(), type_of(x), b * x.stride(0)),
          type_of(x),
          x.size(1),
          x.size(2),
          x.size(3),
          x.stride(1),
          x.stride(2),
          x.stride(3)};
}

inline Sides sides_at(const std::vector<int64_t>& paddings, size_t i) {
  STD_TORCH_CHECK(paddings.size() >= 4 * i + 4, "conv_stem: paddings are too few");
  for (size_t s = 0; s < 4; ++s)
    STD_TORCH_CHECK(paddings[4 * i + s] >= 0 && paddings[4 * i + s] <= kLargestPadding,
                    "conv_stem: bad padding");
  return {paddings[4 * i], paddings[4 * i + 1], paddings[4 * i + 2], paddings[4 * i + 3]};
}

}  // namespace hybridops
