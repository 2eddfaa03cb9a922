// hybridops::group_norm: see hybridops/ops/group_norm.py for the meaning.
#include "../simd/group_norm.h"

#include <cmath>

#include "common.h"

namespace hybridops {
namespace {

using simd::Type;

constexpr int64_t kChunk = 1 << 14;  // numbers per task: 64 KB of fp32 stay in L2 for the 2nd pass
constexpr int64_t kSamples = 16;     // pixels, evenly spread, whose mean is the pivot

// x (B, C, H, W) in channels_last -> y (B, H, W, C).
Tensor group_norm(Tensor x, int64_t groups, std::optional<Tensor> weight,
                  std::optional<Tensor> bias, double eps, int64_t activation,
                  std::optional<Tensor> residual) {
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
  Tensor y = empty({B, H, W, C}, x.scalar_type());
  if (y.numel() == 0) return y;
  Scratch scratch;
  const float* gamma = vector_of(scratch, weight, C, type);
  const float* beta = vector_of(scratch, bias, C, type);
  const int64_t per_chunk = std::max<int64_t>(kChunk / C, 1), chunks = divide_up(rows, per_chunk);
  float* pivots = scratch.take(B * C);
  float* sums = scratch.take(B * chunks * 2 * C);
  float* affine = scratch.take(B * 2 * C);
  const void* from = x.const_data_ptr();
  const void* added = residual.has_value() ? residual->const_data_ptr() : nullptr;
  void* to = y.mutable_data_ptr();
  // Sums of differences to a pivot near the mean: nothing cancels where the variance is formed.
  float* few = scratch.take(2 * C);
  float* zeros = scratch.take(C);
  std::fill(zeros, zeros + C, 0.0f);
  const int64_t samples = std::min<int64_t>(rows, kSamples);
  for (int64_t b = 0; b < B; ++b) {
    simd::channel_sums(offset(from, type, b * rows * C), type, zeros, samples, C,
                       rows / samples * C, few);
    for (int64_t c = 0; c < C; ++c) pivots[b * C + c] = few[c] / (float)samples;
  }
  parallel(B * chunks, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / chunks, first = t % chunks * per_chunk;
      simd::channel_sums(offset(from, type, (b * rows + first) * C), type, pivots + b * C,
                         std::min(per_chunk, rows - first), C, C, sums + t * 2 * C);
    }
  });
  const int64_t width = C / groups;
  parallel(B * groups, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / groups, first = t % groups * width;
      const float *pivot = pivots + b * C, *chunk = sums + b * chunks * 2 * C;
      const double share = 1.0 / (double)(rows * width);
      // about the group's mean so far: that of its pivots
      double center = 0, sum = 0, square = 0;
      for (int64_t c = first; c < first + width; ++c) center += pivot[c];
      center /= (double)width;
      for (int64_t c = first; c < first + width; ++c) {
        const double d = pivot[c] - center;
        sum += d * (double)rows;
        square += d * d * (double)rows;
      }
      for (int64_t i = 0; i < chunks; ++i, chunk += 2 * C)
        for (int64_t c = first; c < first + width; ++c) {
          sum += chunk[c];
          square += chunk[C + c] + 2 * (pivot[c] - center) * chunk[c];
        }
      const double mean = sum * share, var = std::max(square * share - mean * mean, 0.0);
      const double rstd = 1 / std::sqrt(var + eps);
      float *scale = affine + b * 2 * C, *shift = scale + C;
      for (int64_t c = first; c < first + width; ++c) {
        const double factor = gamma ? gamma[c] * rstd : rstd;
        scale[c] = (float)factor;
        shift[c] = (float)((beta ? beta[c] : 0) - (center + mean) * factor);
      }
    }
  });
  parallel(B * chunks, [=](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / chunks, first = t % chunks * per_chunk;
      const int64_t at = (b * rows + first) * C;
      const float* scale = affine + b * 2 * C;
      simd::scale_rows(offset(from, type, at), added ? offset(added, type, at) : nullptr, type,
                       scale, scale + C, std::min(per_chunk, rows - first), C, activation,
                       offset(to, type, at));
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) { m.impl("group_norm", TORCH_BOX(&group_norm)); }

}  // namespace hybridops
