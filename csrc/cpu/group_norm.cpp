// hybridops::group_norm: see hybridops/ops/group_norm.py for the meaning.
#include "group_norm.h"

#include <cmath>

namespace hybridops {

using simd::Type;

namespace {

constexpr int64_t kChunk = 1 << 14;  // numbers per task: 64 KB of fp32 stay in L2 for the 2nd pass
constexpr int64_t kSamples = 4;      // of a part's pixels, evenly spread: their mean is its pivot

}  // namespace

GroupNorm::GroupNorm(Room& room, int64_t channels, int64_t groups,
                     const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                     double eps, Type type)
    : groups(groups), eps(eps) {
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "group_norm: groups do not fit x");
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0,
                  "group_norm: eps must be finite and not negative");
  this->weight = vector_of(room, weight, channels, type);
  this->bias = vector_of(room, bias, channels, type);
}

void ImageSums::add(int64_t b, int64_t part, const void* x, Type type, int64_t channel,
                    int64_t channels) const {
  Scratch scratch;
  float* sums = scratch.take(2 * channels);
  float* to = numbers_ + (b * parts + part) * 3 * C + channel;  // pivots come first
  const int64_t n = first(part + 1) - first(part), samples = std::min(n, kSamples);
  const void* from = offset(x, type, channel);
  std::fill(to, to + channels, 0.0f);
  simd::channel_sums(from, type, to, samples, channels, n / samples * C, sums);
  for (int64_t c = 0; c < channels; ++c) to[c] = sums[c] / (float)samples;
  simd::channel_sums(from, type, to, n, channels, C, sums);
  std::copy_n(sums, channels, to + C);
  std::copy_n(sums + channels, channels, to + 2 * C);
}

// Mean, scale and shift (3, C) of an image's channels.
void ImageSums::affine(const GroupNorm& norm, int64_t b, float* affine) const {
  const int64_t width = C / norm.groups;
  const double share = 1.0 / (double)(M * width);
  for (int64_t g = 0; g < C; g += width) {
    const float* pivot = numbers_ + b * parts * 3 * C;
    double center = 0, sum = 0, square = 0;  // about the mean of the first part's pivots
    for (int64_t c = g; c < g + width; ++c) center += pivot[c];
    center /= (double)width;
    for (int64_t i = 0; i < parts; ++i, pivot += 3 * C) {
      const auto n = (double)(first(i + 1) - first(i));
      for (int64_t c = g; c < g + width; ++c) {
        const double d = pivot[c] - center;
        sum += pivot[C + c] + d * n;
        square += pivot[2 * C + c] + 2 * d * pivot[C + c] + d * d * n;
      }
    }
    const double mean = sum * share, var = std::max(square * share - mean * mean, 0.0);
    const double rstd = 1 / std::sqrt(var + norm.eps);
    const auto rounded = (float)(center + mean);
    for (int64_t c = g; c < g + width; ++c) {
      const double factor = norm.weight ? norm.weight[c] * rstd : rstd;
      affine[c] = rounded;
      affine[C + c] = (float)factor;
      affine[2 * C + c] =
          (float)((norm.bias ? norm.bias[c] : 0) + (rounded - (center + mean)) * factor);
    }
  }
}

void ImageSums::normalize(const GroupNorm& norm, const void* x, Type type, const void* residual,
                          int64_t activation, void* y) const {
  const int64_t rows = std::max<int64_t>(kChunk / C, 1), chunks = divide_up(M, rows);
  parallel(B * chunks, [=, this, &norm](int64_t begin, int64_t end) {
    Scratch scratch;
    float* scaling = scratch.take(3 * C);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / chunks, row = t % chunks * rows;
      if (t == begin || row == 0) affine(norm, b, scaling);
      const int64_t at = (b * M + row) * C;
      simd::scale_rows(offset(x, type, at), residual ? offset(residual, type, at) : nullptr, type,
                       scaling, std::min(rows, M - row), C, activation, offset(y, type, at));
    }
  });
}

namespace {

// y = activation(norm(x) + residual), x (B, C, H, W) in channels_last. y: numbers in the order of
// x's, its own or others.
void normalize(const Tensor& x, int64_t groups, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, double eps, int64_t activation,
               const std::optional<Tensor>& residual, Tensor& y) {
  STD_TORCH_CHECK(x.dim() == 4, "group_norm: x is no image");
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), M = H * W;
  const Type type = type_of(x);
  Scratch scratch;
  const GroupNorm norm(scratch, C, groups, weight, bias, eps, type);
  STD_TORCH_CHECK(type != Type::kByte && is_channels_last(x), "group_norm: x is not channels_last");
  STD_TORCH_CHECK(!residual.has_value() ||
                      (residual->is_cpu() && residual->dim() == 4 && residual->size(0) == B &&
                       residual->size(1) == C && residual->size(2) == H && residual->size(3) == W &&
                       type_of(*residual) == type && is_channels_last(*residual)),
                  "group_norm: the residual does not fit x");
  if (y.numel() == 0) return;
  const void* from = x.const_data_ptr();
  const int64_t parts = divide_up(M, std::max<int64_t>(kChunk / C, 1));
  const ImageSums sums(scratch, B, M, C, parts);
  parallel(B * parts, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / parts, part = t % parts;
      sums.add(b, part, offset(from, type, (b * M + sums.first(part)) * C), type, 0, C);
    }
  });
  sums.normalize(norm, from, type, residual.has_value() ? residual->const_data_ptr() : nullptr,
                 activation, y.mutable_data_ptr());
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
