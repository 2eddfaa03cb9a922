// Attention over heads that lie anywhere: in tensors, or in the scratch of a fused layer.
#pragma once
#include "../simd/attention.h"
#include "common.h"

namespace hybridops {

// (B, N, H, D) with any strides, but the numbers of a row side by side.
struct Heads {
  const void* data;
  simd::Type type;
  int64_t N, D, stride_b, stride_n, stride_h;

  simd::HeadRows head(int64_t b, int64_t h) const {
    return {offset(data, type, b * stride_b + h * stride_h), type, stride_n};
  }
};

// y (B, Nq, H, Dv), contiguous and of q's type, and its log-sum-exps (B, H, Nq).
void attend(const Heads& q, const Heads& k, const Heads& v, int64_t B, int64_t H,
            const std::optional<Tensor>& bias, const std::optional<Tensor>& bias_index,
            const std::optional<Tensor>& key_padding_mask, double scale, int64_t activation,
            void* y, float* lse);

}  // namespace hybridops
