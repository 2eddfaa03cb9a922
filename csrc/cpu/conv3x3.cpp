// hybridops::conv3x3: see hybridops/ops/conv3x3.py for the meaning.
#include "../simd/winograd.h"
#include "conv.h"
#include "linear.h"

namespace hybridops {
namespace {

using simd::Filtering;
using simd::Type;

// Tiles that a thread takes at a time: their points, 196 KB for 64 channels, stay in L2, and each
// weight that comes from L3 meets eight register tiles.
constexpr int64_t kTogether = 32;
// Numbers between the operands of a block beside its tiles: strides of a power of two would put all
// of them into the same lines of L1.
constexpr int64_t kApart = 16;

// The output's pixels as tiles, counted row by row.
struct Tiles {
  const Filtering& by;
  ChannelsLast x;
  int64_t top, left, rows, columns;  // padding before, and of the output
  int64_t down = divide_up(rows, by.rows), across = divide_up(columns, by.columns);

  int64_t count() const { return x.B * down * across; }
  struct Place {
    int64_t image, row, column;
  };
  Place place(int64_t tile) const {
    const int64_t row = tile / across;
    return {row / down, row % down * by.rows, tile % across * by.columns};
  }

  // Row `row` of the operands: the points of a tile. `room`: for a patch that the image's border
  // crosses, with zeros beyond it.
  void to_points(const float* data, int64_t tile, int64_t row, float* room, float* operands,
                 int64_t stride) const {
    const Place at = place(tile);
    const int64_t C = x.C, H = x.H, W = x.W;
    const int64_t h0 = at.row * by.stride - top, w0 = at.column * by.stride - left;
    const float* image = data + at.image * H * W * C;
    if (h0 >= 0 && h0 + by.patch_rows <= H && w0 >= 0 && w0 + by.patch_columns <= W)
      return by.to_points(image + (h0 * W + w0) * C, W * C, C, row, operands, stride);
    for (int64_t i = 0; i < by.patch_rows; ++i)
      for (int64_t j = 0; j < by.patch_columns; ++j) {
        const int64_t h = h0 + i, w = w0 + j;
        float* pixel = room + (i * by.patch_columns + j) * C;
        if (h >= 0 && h < H && w >= 0 && w < W)
          std::copy_n(image + (h * W + w) * C, C, pixel);
        else
          std::fill_n(pixel, C, 0.0f);
      }
    by.to_points(room, by.patch_columns * C, C, row, operands, stride);
  }
};

// x (B, C, H, W) in channels_last, padded by zeros -> y (B, H', W', N).
Tensor conv3x3(Tensor x, Tensor packed, int64_t N, int64_t stride, int64_t top, int64_t left,
               int64_t bottom, int64_t right, std::optional<Tensor> bias, int64_t activation,
               std::optional<Tensor> residual) {
  const ChannelsLast image(x, "conv3x3: x is no image in channels_last, of float32");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "conv3x3: stride must be 1 or 2");
  for (const int64_t side : {top, left, bottom, right})
    STD_TORCH_CHECK(side >= 0 && side <= 2, "conv3x3: padding must be 0, 1 or 2");
  const int64_t high = image.H + top + bottom - 3, wide = image.W + left + right - 3;
  STD_TORCH_CHECK(high >= 0 && wide >= 0, "conv3x3: the kernel is larger than the image");
  const Filtering& by = simd::filtering(stride);
  const Tiles tiles{by, image, top, left, high / stride + 1, wide / stride + 1};
  const int64_t B = image.B, C = image.C, rows = tiles.rows, columns = tiles.columns;
  STD_TORCH_CHECK(N >= 0 && N <= packed.numel(), "conv3x3: packed does not fit");
  const float* weights =
      check_packed(packed, N, {Type::kFloat, by.points * C}, "conv3x3: packed does not fit");
  const float* added = nullptr;
  if (residual.has_value()) {
    const ChannelsLast like(*residual, "conv3x3: the residual is no image like the result");
    STD_TORCH_CHECK(like.B == B && like.C == N && like.H == rows && like.W == columns,
                    "conv3x3: the residual does not fit");
    added = (const float*)residual->const_data_ptr();
  }
  Scratch scratch;
  const float* shift = vector_of(scratch, bias, N, Type::kFloat);
  Tensor y = empty({B, rows, columns, N}, ScalarType::Float);
  if (y.numel() == 0) return y;
  const auto* from = (const float*)x.const_data_ptr();
  auto* to = (float*)y.mutable_data_ptr();
  // Even shares for every thread. A block of fewer than four tiles would be summed in other chains.
  const int64_t T = threads(), even = divide_up(divide_up(tiles.count(), kTogether), T) * T;
  const int64_t blocks = std::clamp<int64_t>(even, 1, std::max<int64_t>(tiles.count() / 4, 1));
  const int64_t most = divide_up(tiles.count(), blocks), panels = simd::panel_count(N);
  const auto column = [=](int64_t panel) {
    return simd::panel_offset(N, {Type::kFloat, 1}, panel);
  };
  const int64_t deepest = *std::max_element(by.depths, by.depths + by.operands);
  const int64_t stride_operand = most * deepest * C + kApart;
  const int64_t stride_product = most * column(1) + kApart;
  parallel(blocks, [&](int64_t begin, int64_t end) {
    Scratch mine;
    float* room = mine.take(by.patch_rows * by.patch_columns * C);
    float* operands = mine.take(by.operands * stride_operand);
    float* products = mine.take(by.operands * stride_product);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * tiles.count() / blocks;
      const int64_t n = (block + 1) * tiles.count() / blocks - first;
      for (int64_t t = 0; t < n; ++t)
        tiles.to_points(from, first + t, t, room, operands, stride_operand);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t at = column(p), width = column(p + 1) - at;
        const float* weight = weights + at * by.points * C;
        for (int64_t k = 0; k < by.operands; ++k) {
          const int64_t K = by.depths[k] * C, next = by.depths[(k + 1) % by.operands] * C * width;
          const bool last = k + 1 == by.operands && p + 1 == panels;
          simd::plain_product(operands + k * stride_operand, K, n, {Type::kFloat, K}, weight, width,
                              products + k * stride_product, width, weight + K * width,
                              last ? 0 : next);
          weight += K * width;
        }
        for (int64_t t = 0; t < n; ++t) {
          const Tiles::Place tile = tiles.place(first + t);
          const int64_t pixel = ((tile.image * rows + tile.row) * columns + tile.column) * N + at;
          simd::to_pixels(by, products + t * width, stride_product,
                          {.rows = std::min(by.rows, rows - tile.row),
                           .columns = std::min(by.columns, columns - tile.column),
                           .N = std::min(width, N - at),
                           .y = to + pixel,
                           .residual = added ? added + pixel : nullptr,
                           .stride_row = columns * N,
                           .stride_pixel = N,
                           .bias = shift ? shift + at : nullptr,
                           .activation = activation});
        }
      }
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3)); }

}  // namespace hybridops
