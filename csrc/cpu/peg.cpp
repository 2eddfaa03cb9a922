// hybridops::peg: see hybridops/ops/peg.py for the meaning.
#include "peg.h"

#include <cstring>

namespace hybridops {

using simd::Depthwise;
using simd::Type;

Depthwise depthwise_of(const Tensor& x, const Tensor& weight, int64_t H, int64_t W, int64_t prefix,
                       int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 3, "peg: x must have three dimensions");
  const int64_t N = x.size(1);  // bounds H and W, so that their product cannot overflow
  STD_TORCH_CHECK(H > 0 && H <= N && W > 0 && W <= N && prefix >= 0 && N - H * W == prefix,
                  "peg: x does not fit its grid");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.is_cpu(), "peg: weight must be (C, 1, K, K)");
  const int64_t K = weight.size(3), C = x.size(2);
  STD_TORCH_CHECK(weight.size(0) == C && weight.size(1) == 1 && weight.size(2) == K && K > 0 &&
                      type_of(weight) == type_of(x),
                  "peg: weight does not fit x");
  STD_TORCH_CHECK(stride > 0 && padding >= 0 && padding <= kLargestPadding &&
                      H + 2 * padding >= K && W + 2 * padding >= K,
                  "peg: the kernel does not fit the grid");
  return {H,
          W,
          C,
          K,
          stride,
          padding,
          (H + 2 * padding - K) / stride + 1,
          (W + 2 * padding - K) / stride + 1};
}

const float* taps_of(Room& room, const Tensor& weight, bool reversed) {
  const Tensor w = torch::stable::contiguous(weight);
  const int64_t C = w.size(0), KK = w.size(2) * w.size(3);
  const float* rows = (const float*)w.const_data_ptr();
  if (type_of(w) != Type::kFloat) {
    float* wide = room.take(C * KK);
    simd::to_float(w.const_data_ptr(), type_of(w), C * KK, 1, C * KK, wide, C * KK);
    rows = wide;
  }
  float* taps = room.take(KK * C);
  for (int64_t t = 0; t < KK; ++t)
    for (int64_t c = 0; c < C; ++c) taps[t * C + c] = rows[c * KK + (reversed ? KK - 1 - t : t)];
  return taps;
}

Tensor depthwise(const Tensor& input, const Depthwise& d, const float* taps, const float* shift,
                 int64_t prefix, bool residual, int64_t activation, bool gate) {
  STD_TORCH_CHECK(!(residual || gate) || (d.Ho == d.H && d.Wo == d.W),
                  "peg: residual and gate need equal grids");
  const int64_t B = input.size(0), N = prefix + d.H * d.W, No = prefix + d.Ho * d.Wo;
  Tensor output = empty({B, No, d.C}, input.scalar_type());
  if (output.numel() == 0) return output;
  // Images may lie any distance apart (a sliced batch), tokens C apart; anything else is copied.
  const bool rows_fit = (d.C == 1 || input.stride(2) == 1) && (N == 1 || input.stride(1) == d.C);
  const Tensor x = rows_fit ? input : torch::stable::contiguous(input);
  const Type type = type_of(x);
  const void* from = x.const_data_ptr();
  void* to = output.mutable_data_ptr();
  const int64_t stride_b = x.stride(0);
  constexpr int64_t kNear = 12 << 20;  // what a shared L3 still holds; fetching costs 15 % there
  const bool far = B * (N + No) * d.C * size_of(type) > kNear;
  parallel(B * d.Ho, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / d.Ho, ho = t % d.Ho;
      const void* image = offset(from, type, b * stride_b);
      void* tokens = offset(to, type, b * No * d.C);
      if (ho == 0 && prefix > 0) std::memcpy(tokens, image, prefix * d.C * size_of(type));
      simd::depthwise_row(offset(image, type, prefix * d.C), type, taps, shift, d, ho, residual,
                          gate, far, activation, offset(tokens, type, prefix * d.C));
    }
  });
  return output;
}

namespace {

Tensor peg(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t H, int64_t W,
           int64_t prefix, int64_t stride, int64_t padding, bool residual, int64_t activation,
           bool gate) {
  const Depthwise d = depthwise_of(x, weight, H, W, prefix, stride, padding);
  Scratch scratch;
  const float* taps = taps_of(scratch, weight);
  const float* shift = vector_of(scratch, bias, d.C, type_of(x));
  return depthwise(x, d, taps, shift, prefix, residual, activation, gate);
}

Tensor input_gradient(const Tensor& dy, const Tensor& weight, const Depthwise& d, int64_t prefix,
                      bool residual) {
  Scratch scratch;
  const bool same_grid = d.stride == 1 && d.Ho == d.H && d.Wo == d.W;
  const float* taps = taps_of(scratch, weight, same_grid);
  // There dx is the convolution of dy by the taps in reverse, and the forward kernel does it.
  if (same_grid) return depthwise(dy, d, taps, nullptr, prefix, residual, 0, false);
  STD_TORCH_CHECK(!residual, "peg_backward: a residual needs equal grids");
  const int64_t B = dy.size(0), N = prefix + d.H * d.W, No = prefix + d.Ho * d.Wo, C = d.C;
  Tensor dx = empty({B, N, C}, dy.scalar_type());
  const Type type = type_of(dy);
  const void* from = dy.const_data_ptr();
  void* to = dx.mutable_data_ptr();
  parallel(B * d.H, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / d.H, h = t % d.H;
      const void* gradients = offset(from, type, b * No * C);
      void* tokens = offset(to, type, b * N * C);
      if (h == 0 && prefix > 0) std::memcpy(tokens, gradients, prefix * C * size_of(type));
      simd::depthwise_input_gradient(offset(gradients, type, prefix * C), type, taps, d, h,
                                     offset(tokens, type, prefix * C));
    }
  });
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> peg_backward(Tensor dy, Tensor x, Tensor weight, int64_t H,
                                                int64_t W, int64_t prefix, int64_t stride,
                                                int64_t padding, bool residual) {
  const Depthwise d = depthwise_of(x, weight, H, W, prefix, stride, padding);
  const int64_t B = x.size(0), N = x.size(1), No = prefix + d.Ho * d.Wo, C = d.C, KK = d.K * d.K;
  STD_TORCH_CHECK(dy.dim() == 3 && dy.size(0) == B && dy.size(1) == No && dy.size(2) == C &&
                      type_of(dy) == type_of(x),
                  "peg_backward: dy does not fit x");
  dy = torch::stable::contiguous(dy);
  x = torch::stable::contiguous(x);
  const Type type = type_of(x);
  Scratch scratch;
  Tensor dx = input_gradient(dy, weight, d, prefix, residual);

  Tensor dweight = empty({C, 1, d.K, d.K}, x.scalar_type()), dbias = empty({C}, x.scalar_type());
  float* dtaps = scratch.take(KK * C);
  float* shifts = scratch.take(C);
  std::fill(dtaps, dtaps + KK * C, 0.0f);
  std::fill(shifts, shifts + C, 0.0f);
  const void *gradients = dy.const_data_ptr(), *tokens = x.const_data_ptr();
  const int64_t block = simd::channel_block();
  const int64_t slice = std::max(divide_up(divide_up(C, threads()), block), int64_t{1}) * block;
  // A slice of channels takes all images in order: no two threads add to the same number, whatever
  // their count.
  parallel(divide_up(C, slice), [=](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      for (int64_t b = 0; b < B; ++b)
        simd::depthwise_weight_gradient(offset(gradients, type, (b * No + prefix) * C),
                                        offset(tokens, type, (b * N + prefix) * C), type, d,
                                        s * slice, std::min((s + 1) * slice, C), dtaps, shifts);
  });
  float* rows = scratch.take(C * KK);
  for (int64_t t = 0; t < KK; ++t)
    for (int64_t c = 0; c < C; ++c) rows[c * KK + t] = dtaps[t * C + c];
  simd::from_float(rows, C * KK, 1, C * KK, dweight.mutable_data_ptr(), type, C * KK);
  simd::from_float(shifts, C, 1, C, dbias.mutable_data_ptr(), type, C);
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("peg", TORCH_BOX(&peg));
  m.impl("peg_backward", TORCH_BOX(&peg_backward));
}

}  // namespace hybridops
