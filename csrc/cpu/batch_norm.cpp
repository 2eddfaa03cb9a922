// hybridops::batch_norm and batch_norm_backward: see hybridops/ops/batch_norm.py for the meaning.
#include "../simd/batch_norm.h"

#include <cmath>

#include "../simd/group_norm.h"
#include "common.h"

namespace hybridops {
namespace {

using simd::Type;

constexpr int64_t kChunk = 1 << 14;  // numbers per task; sums over it are fp32, over all are fp64
constexpr int64_t kSamples = 16;     // rows, evenly spread, whose mean is the pivot

// x (..., C) as M rows, cut into chunks of a size that does not depend on the number of threads.
struct Batch {
  Tensor tensor;
  Type type;
  int64_t C, M, per_chunk, chunks;

  explicit Batch(const Tensor& x) : tensor(torch::stable::contiguous(x)), type(type_of(x)) {
    STD_TORCH_CHECK(x.dim() >= 1 && type != Type::kByte, "batch_norm: x must be rows of numbers");
    C = x.size(x.dim() - 1);
    M = C ? x.numel() / C : 0;
    per_chunk = std::max<int64_t>(kChunk / std::max<int64_t>(C, 1), 1);
    chunks = divide_up(M, per_chunk);
  }
  const void* row(int64_t m) const { return offset(tensor.const_data_ptr(), type, m * C); }
  // f(chunk, first row, rows)
  template <class F>
  void for_chunks(const F& f) const {
    parallel(chunks, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        f(t, t * per_chunk, std::min(per_chunk, M - t * per_chunk));
    });
  }
  // f(channel, sum of chunk sums [0], of chunk sums [1]), the chunks' sums being (chunks, 2, C)
  template <class F>
  void for_channels(const float* sums, const F& f) const {
    parallel(divide_up(C, 64), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * 64, count = std::min(end * 64, C) - first;
      std::vector<double> total(2 * count, 0.0);
      for (int64_t t = 0; t < chunks; ++t)
        for (int64_t c = 0; c < count; ++c) {
          total[c] += sums[t * 2 * C + first + c];
          total[count + c] += sums[(t * 2 + 1) * C + first + c];
        }
      for (int64_t c = 0; c < count; ++c) f(first + c, total[c], total[count + c]);
    });
  }
};

// A weight or bias (C): fp32, or x's type.
const float* parameter(Scratch& scratch, const std::optional<Tensor>& p, const Batch& x) {
  const bool fp32 = p.has_value() && p->scalar_type() == ScalarType::Float;
  return vector_of(scratch, p, x.C, fp32 ? Type::kFloat : x.type);
}

void check_eps(double eps) {
  STD_TORCH_CHECK(std::isfinite(eps) && eps >= 0,
                  "batch_norm: eps must be finite and not negative");
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps,
                                              int64_t activation) {
  check_eps(eps);
  const Batch rows(x);
  const int64_t C = rows.C, M = rows.M;
  Tensor y = empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type()),
         mean = empty({C}, ScalarType::Float), var = empty({C}, ScalarType::Float);
  STD_TORCH_CHECK(M > 0, "batch_norm: there are no rows to take statistics of");
  Scratch scratch;
  const float *gamma = parameter(scratch, weight, rows), *beta = parameter(scratch, bias, rows);
  float* pivot = scratch.take(2 * C);
  float* zeros = scratch.take(C);
  float* sums = scratch.take(rows.chunks * 2 * C);
  float* affine = scratch.take(3 * C);
  auto *means = (float*)mean.mutable_data_ptr(), *vars = (float*)var.mutable_data_ptr();
  std::fill(zeros, zeros + C, 0.0f);
  const int64_t samples = std::min(M, kSamples);
  simd::channel_sums(rows.row(0), rows.type, zeros, samples, C, M / samples * C, pivot);
  for (int64_t c = 0; c < C; ++c) pivot[c] /= (float)samples;
  rows.for_chunks([&](int64_t t, int64_t first, int64_t n) {
    simd::channel_sums(rows.row(first), rows.type, pivot, n, C, C, sums + t * 2 * C);
  });
  rows.for_channels(sums, [&](int64_t c, double sum, double square) {
    const double away = sum / (double)M;  // the mean, from the pivot
    const double variance = std::max(square / (double)M - away * away, 0.0);
    const double center = pivot[c] + away, rstd = 1 / std::sqrt(variance + eps);
    const double factor = gamma ? gamma[c] * rstd : rstd;
    means[c] = (float)center, vars[c] = (float)variance;
    affine[c] = means[c], affine[C + c] = (float)factor;
    affine[2 * C + c] = (float)((beta ? beta[c] : 0) + (means[c] - center) * factor);
  });
  rows.for_chunks([&](int64_t, int64_t first, int64_t n) {
    simd::scale_rows(rows.row(first), nullptr, rows.type, affine, n, C, activation,
                     offset(y.mutable_data_ptr(), rows.type, first * C));
  });
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor dy, Tensor x,
                                                       std::optional<Tensor> weight,
                                                       std::optional<Tensor> bias, Tensor mean,
                                                       Tensor var, double eps, int64_t activation) {
  check_eps(eps);
  const Batch rows(x), gradients(dy);
  const int64_t C = rows.C, M = rows.M;
  STD_TORCH_CHECK(gradients.C == C && gradients.M == M && gradients.type == rows.type && M > 0,
                  "batch_norm_backward: dy and x do not fit");
  Tensor dx = empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type()),
         dweight = empty({C}, ScalarType::Float), dbias = empty({C}, ScalarType::Float);
  Scratch scratch;
  const float *gamma = parameter(scratch, weight, rows), *beta = parameter(scratch, bias, rows),
              *means = vector_of(scratch, mean, C, Type::kFloat),
              *vars = vector_of(scratch, var, C, Type::kFloat);
  float *scale = scratch.take(C), *shift = scratch.take(C), *slope = scratch.take(C),
        *moved = scratch.take(C), *sums = scratch.take(rows.chunks * 2 * C);
  auto *dgamma = (float*)dweight.mutable_data_ptr(), *dbeta = (float*)dbias.mutable_data_ptr();
  for (int64_t c = 0; c < C; ++c) {
    const double factor = (gamma ? gamma[c] : 1.0) / std::sqrt(vars[c] + eps);
    scale[c] = (float)factor, shift[c] = (float)((beta ? beta[c] : 0) - means[c] * factor);
  }
  const simd::Normed normed{scale, shift, means, activation};
  rows.for_chunks([&](int64_t t, int64_t first, int64_t n) {
    simd::gradient_sums(gradients.row(first), rows.row(first), rows.type, normed, n, C,
                        sums + t * 2 * C);
  });
  rows.for_channels(sums, [&](int64_t c, double sum, double weighted) {
    const double rstd = 1 / std::sqrt(vars[c] + eps), factor = scale[c] / (double)M;
    dbeta[c] = (float)sum, dgamma[c] = (float)(weighted * rstd);
    slope[c] = (float)(-factor * rstd * rstd * weighted), moved[c] = (float)(-factor * sum);
  });
  rows.for_chunks([&](int64_t, int64_t first, int64_t n) {
    simd::gradient_rows(gradients.row(first), rows.row(first), rows.type, normed, slope, moved, n,
                        C, offset(dx.mutable_data_ptr(), rows.type, first * C));
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace hybridops
