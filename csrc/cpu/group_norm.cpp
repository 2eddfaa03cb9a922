// hybridops::group_norm: see hybridops/ops/group_norm.py for the meaning.
#include "../simd/group_norm.h"

#include <cmath>

#include "common.h"

namespace hybridops {
namespace {

using simd::Type;

constexpr int64_t kChunk = 1 << 14;  // numbers per task: 64 KB of fp32 stay in L2 for the 2nd pass
constexpr int64_t kSamples = 4;      // of a task's pixels, evenly spread: their mean is its pivot

// y = activation(norm(x) + residual), x (B, C, H, W) in channels_last. y: numbers in the order of
// x's, its own or others.
void normalize(const Tensor& x, int64_t groups, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, double eps, int64_t activation,
               const std::optional<Tensor>& residual, Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 4 && groups > 0 && x.size(1) % groups == 0,
                  "group_norm: groups do not fit x");
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0,
                  "group_norm: eps must be finite and not negative");
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), rows = H * W;
  const Type type = type_of(x);
  STD_TORCH_CHECK(type != Type::kByte && is_channels_last(x), "group_norm: x is not channels_last");
  STD_TORCH_CHECK(!residual.has_value() ||
                      (residual->is_cpu() && residual->dim() == 4 && residual->size(0) == B &&
                       residual->size(1) == C && residual->size(2) == H && residual->size(3) == W &&
                       type_of(*residual) == type && is_channels_last(*residual)),
                  "group_norm: the residual does not fit x");
  if (y.numel() == 0) return;
  Scratch scratch;
  const float* gamma = vector_of(scratch, weight, C, type);
  const float* beta = vector_of(scratch, bias, C, type);
  const int64_t per_chunk = std::max<int64_t>(kChunk / C, 1), chunks = divide_up(rows, per_chunk);
  float* pivots = scratch.take(B * chunks * C);
  float* sums = scratch.take(B * chunks * 2 * C);
  float* zeros = scratch.take(C);
  std::fill(zeros, zeros + C, 0.0f);
  const void* from = x.const_data_ptr();
  const void* added = residual.has_value() ? residual->const_data_ptr() : nullptr;
  void* to = y.mutable_data_ptr();
  // Sums of differences to a pivot near the mean: nothing cancels where the variance is formed.
  parallel(B * chunks, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % chunks * per_chunk, n = std::min(per_chunk, rows - first);
      const void* chunk = offset(from, type, (t / chunks * rows + first) * C);
      const int64_t samples = std::min(n, kSamples);
      float *pivot = pivots + t * C, *sum = sums + t * 2 * C;
      simd::channel_sums(chunk, type, zeros, samples, C, n / samples * C, sum);
      for (int64_t c = 0; c < C; ++c) pivot[c] = sum[c] / (float)samples;
      simd::channel_sums(chunk, type, pivot, n, C, C, sum);
    }
  });
  const int64_t width = C / groups;
  // Scale and shift of an image's channels.
  const auto affine = [=](int64_t b, float* scale, float* shift) {
    const double share = 1.0 / (double)(rows * width);
    for (int64_t g = 0; g < C; g += width) {
      const float *pivot = pivots + b * chunks * C, *chunk = sums + b * chunks * 2 * C;
      double center = 0, sum = 0, square = 0;  // about the mean of the first chunk's pivots
      for (int64_t c = g; c < g + width; ++c) center += pivot[c];
      center /= (double)width;
      for (int64_t i = 0; i < chunks; ++i, chunk += 2 * C, pivot += C) {
        const auto n = (double)std::min(per_chunk, rows - i * per_chunk);
        for (int64_t c = g; c < g + width; ++c) {
          const double d = pivot[c] - center;
          sum += chunk[c] + d * n;
          square += chunk[C + c] + 2 * d * chunk[c] + d * d * n;
        }
      }
      const double mean = sum * share, var = std::max(square * share - mean * mean, 0.0);
      const double rstd = 1 / std::sqrt(var + eps);
      for (int64_t c = g; c < g + width; ++c) {
        const double factor = gamma ? gamma[c] * rstd : rstd;
        scale[c] = (float)factor;
        shift[c] = (float)((beta ? beta[c] : 0) - (center + mean) * factor);
      }
    }
  };
  parallel(B * chunks, [=](int64_t begin, int64_t end) {
    Scratch mine;
    float *scale = mine.take(C), *shift = mine.take(C);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / chunks, first = t % chunks * per_chunk;
      if (t == begin || first == 0) affine(b, scale, shift);
      const int64_t at = (b * rows + first) * C;
      simd::scale_rows(offset(from, type, at), added ? offset(added, type, at) : nullptr, type,
                       scale, shift, std::min(per_chunk, rows - first), C, activation,
                       offset(to, type, at));
    }
  });
}

// -> y (B, H, W, C)
Tensor group_norm(Tensor x, int64_t groups, std::optional<Tensor> weight,
                  std::optional<Tensor> bias, double eps, int64_t activation,
                  std::optional<Tensor> residual) {
  STD_TORCH_CHECK(x.dim() == 4, "group_norm: x is no image");
  Tensor y = empty({x.size(0), x.size(2), x.size(3), x.size(1)}, x.scalar_type());
  normalize(x, groups, weight, bias, eps, activation, residual, y);
  return y;
}

// The same in x's memory.
void group_norm_(Tensor x, int64_t groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
                 double eps, int64_t activation, std::optional<Tensor> residual) {
  normalize(x, groups, weight, bias, eps, activation, residual, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&group_norm));
  m.impl("group_norm_", TORCH_BOX(&group_norm_));
}

}  // namespace hybridops
