// hybridops::conv1x1: see hybridops/ops/conv1x1.py for the meaning.
#include "conv.h"
#include "group_norm.h"
#include "linear.h"

namespace hybridops {
namespace {

using simd::plain_rows;
using simd::Rows;
using simd::Type;

// The product that a convolution is: a row of x for each pixel of the result.
struct Pointwise {
  const float *x, *packed, *bias;
  float* y;
  const float* residual;  // in y's order, or null
  int64_t B, C, N, M;     // M pixels of an image
  int64_t stride_image;
  simd::Grid grid;  // of an image's pixels, of all images' where these follow as rows do
  bool follow;

  Rows rows(int64_t b) const { return {x + b * stride_image, Type::kFloat, grid, C}; }
  Output output(int64_t b) const {
    Output output{y + b * M * N, Type::kFloat, plain_rows(N)};
    output.bias = bias;
    return output;
  }
};

void run(const Pointwise& conv, int64_t activation) {
  const int64_t images = conv.follow ? 1 : conv.B;
  for (int64_t b = 0; b < images; ++b) {
    Output output = conv.output(b);
    output.activation = activation;
    output.residual_first = true;
    if (conv.residual) {
      output.residual = conv.residual + b * conv.M * conv.N;
      output.residual_grid = plain_rows(conv.N);
    }
    product_parallel(conv.rows(b), conv.B / images * conv.M, conv.packed, conv.N, output);
  }
}

// Each task adds up its own part of the statistics, before it leaves the cache.
void run_normed(const Pointwise& conv, const GroupNorm& norm, int64_t activation) {
  const int64_t B = conv.B, M = conv.M, N = conv.N;
  const int64_t panels = simd::panel_count(N), T = threads();
  // By the image's size alone, so that neither threads nor the batch change a bit.
  const int64_t blocks = M <= kRowBlock ? 1 : divide_up(M, 2 * kRowBlock) * 2;
  int64_t shares = 1;  // of the panels: as many as give every thread its part
  const auto is_even = [=](int64_t tasks) { return tasks * 10 >= divide_up(tasks, T) * T * 9; };
  while (shares < panels && !is_even(B * blocks * shares)) ++shares;
  const auto column = [=](int64_t share) {
    return std::min(simd::panel_offset(N, {Type::kFloat, 1}, share * panels / shares), N);
  };
  Scratch scratch;
  const ImageSums sums(scratch, B, M, N, blocks);
  parallel(B * blocks * shares, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t share = t % shares, block = t / shares % blocks, b = t / shares / blocks;
      Output output = conv.output(b);
      simd::product(conv.rows(b), sums.first(block), sums.first(block + 1), conv.packed, N,
                    share * panels / shares, (share + 1) * panels / shares, output);
      sums.add(b, block, conv.y + (b * M + sums.first(block)) * N, Type::kFloat, column(share),
               column(share + 1) - column(share));
    }
  });
  sums.normalize(norm, conv.y, Type::kFloat, conv.residual, activation, conv.y);
}

// overwrite: the result lies in the residual's memory; only without a norm, which reads both apart.
Tensor convolve(const Tensor& x, const Tensor& packed, int64_t N, int64_t stride,
                const std::optional<Tensor>& bias, int64_t activation,
                const std::optional<Tensor>& residual, std::optional<int64_t> groups,
                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                double eps, bool overwrite) {
  const ChannelsLast image(x, "conv1x1: x is no image in channels_last, of float32");
  const int64_t B = image.B, C = image.C, H = image.H, W = image.W;
  STD_TORCH_CHECK(stride > 0, "conv1x1: stride must be positive");
  STD_TORCH_CHECK(N >= 0 && N <= packed.numel(), "conv1x1: packed does not fit");
  STD_TORCH_CHECK(H > 0 && W > 0, "conv1x1: x has no pixels");
  const float* weights = check_packed(packed, N, {Type::kFloat, C}, "conv1x1: packed does not fit");
  const int64_t step = std::min(stride, std::max(H, W));  // of one row any stride is as good
  const int64_t rows = (H - 1) / step + 1, columns = (W - 1) / step + 1;
  if (residual.has_value()) {
    const ChannelsLast like(*residual, "conv1x1: the residual is no image like the result");
    STD_TORCH_CHECK(like.B == B && like.C == N && like.H == rows && like.W == columns,
                    "conv1x1: the residual does not fit");
  }
  Scratch scratch;
  const float* shift = vector_of(scratch, bias, N, Type::kFloat);
  std::optional<GroupNorm> norm;
  if (groups) norm.emplace(scratch, N, *groups, norm_weight, norm_bias, eps, Type::kFloat);
  Tensor y = overwrite ? *residual : empty({B, rows, columns, N}, ScalarType::Float);
  if (y.numel() == 0) return y;
  Pointwise conv{.x = (const float*)x.const_data_ptr(),
                 .packed = weights,
                 .bias = shift,
                 .y = (float*)y.mutable_data_ptr(),
                 .residual = nullptr,
                 .B = B,
                 .C = C,
                 .N = N,
                 .M = rows * columns,
                 .stride_image = H * W * C,
                 .grid = step == 1 ? plain_rows(C) : simd::Grid{columns, step * W * C, step * C},
                 .follow = B == 1 || rows * step == H};
  if (residual.has_value()) conv.residual = (const float*)residual->const_data_ptr();
  norm ? run_normed(conv, *norm, activation) : run(conv, activation);
  return y;
}

// -> y (B, H', W', N) = activation(norm(conv(x) + bias) + residual)
Tensor conv1x1(Tensor x, Tensor packed, int64_t N, int64_t stride, std::optional<Tensor> bias,
               int64_t activation, std::optional<Tensor> residual, std::optional<int64_t> groups,
               std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps) {
  return convolve(x, packed, N, stride, bias, activation, residual, groups, norm_weight, norm_bias,
                  eps, false);
}

// The same without a norm, in the residual's memory.
void conv1x1_(Tensor residual, Tensor x, Tensor packed, int64_t stride, std::optional<Tensor> bias,
              int64_t activation) {
  STD_TORCH_CHECK(residual.dim() == 4, "conv1x1: the residual is no image like the result");
  convolve(x, packed, residual.size(1), stride, bias, activation, residual, {}, {}, {}, 0.0, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("conv1x1", TORCH_BOX(&conv1x1));
  m.impl("conv1x1_", TORCH_BOX(&conv1x1_));
}

}  // namespace hybridops
