// hybridops::conv3x3: see hybridops/ops/conv3x3.py for the meaning.
#include "../simd/winograd.h"
#include "linear.h"

namespace hybridops {
namespace {

using simd::kPatchColumns;
using simd::kPatchRows;
using simd::kPoints;
using simd::kTileColumns;
using simd::kTileRows;
using simd::Type;

// Tiles that a thread takes at a time: their points, 196 KB for 64 channels, stay in L2, and each
// weight that comes from L3 meets eight register tiles.
constexpr int64_t kTogether = 32;
// Numbers between the points of a block beside its tiles: strides of a power of two would put all
// 24 into the same lines of L1.
constexpr int64_t kApart = 16;

// Channels_last images of C channels as tiles, counted row by row.
struct Tiles {
  int64_t B, H, W, C;
  int64_t down = divide_up(H, kTileRows), across = divide_up(W, kTileColumns);

  int64_t count() const { return B * down * across; }
  struct Place {
    int64_t image, row, column;
  };
  Place place(int64_t tile) const {
    const int64_t row = tile / across;
    return {row / down, row % down * kTileRows, tile % across * kTileColumns};
  }

  // The points of a tile. `room`: for a patch that the image's border crosses, zeros beyond it.
  void to_points(const float* x, int64_t tile, float* room, float* points,
                 int64_t stride_point) const {
    const Place at = place(tile);
    const int64_t top = at.row - 1, left = at.column - 1;
    const float* image = x + at.image * H * W * C;
    if (top >= 0 && top + kPatchRows <= H && left >= 0 && left + kPatchColumns <= W)
      return simd::to_points(image + (top * W + left) * C, W * C, C, points, stride_point);
    for (int64_t i = 0; i < kPatchRows; ++i)
      for (int64_t j = 0; j < kPatchColumns; ++j) {
        const int64_t h = top + i, w = left + j;
        float* pixel = room + (i * kPatchColumns + j) * C;
        if (h >= 0 && h < H && w >= 0 && w < W)
          std::copy_n(image + (h * W + w) * C, C, pixel);
        else
          std::fill_n(pixel, C, 0.0f);
      }
    simd::to_points(room, kPatchColumns * C, C, points, stride_point);
  }
};

bool is_image(const Tensor& x, int64_t B, int64_t C, int64_t H, int64_t W) {
  return x.is_cpu() && x.scalar_type() == ScalarType::Float && x.size(0) == B && x.size(1) == C &&
         x.size(2) == H && x.size(3) == W && is_channels_last(x);
}

// x (B, C, H, W) in channels_last -> y (B, H, W, N).
Tensor conv3x3(Tensor x, Tensor packed, int64_t N, std::optional<Tensor> bias, int64_t activation,
               std::optional<Tensor> residual) {
  STD_TORCH_CHECK(x.dim() == 4, "conv3x3: x is no image");
  STD_TORCH_CHECK(N >= 0 && N <= packed.numel(), "conv3x3: packed does not fit");
  const Tiles tiles{x.size(0), x.size(2), x.size(3), x.size(1)};
  const auto [B, H, W, C, down, across] = tiles;
  STD_TORCH_CHECK(is_image(x, B, C, H, W), "conv3x3: x is not channels_last, of float32");
  STD_TORCH_CHECK(
      !residual.has_value() || (residual->dim() == 4 && is_image(*residual, B, N, H, W)),
      "conv3x3: the residual does not fit");
  const float* weights =
      check_packed(packed, N, {Type::kFloat, kPoints * C}, "conv3x3: packed does not fit");
  Scratch scratch;
  const float* shift = vector_of(scratch, bias, N, Type::kFloat);
  Tensor y = empty({B, H, W, N}, ScalarType::Float);
  if (y.numel() == 0) return y;
  const auto* from = (const float*)x.const_data_ptr();
  const auto* added = residual.has_value() ? (const float*)residual->const_data_ptr() : nullptr;
  auto* to = (float*)y.mutable_data_ptr();
  // Even shares for every thread. A block of fewer than four tiles would be summed in other chains.
  const int64_t T = threads(), even = divide_up(divide_up(tiles.count(), kTogether), T) * T;
  const int64_t blocks = std::clamp<int64_t>(even, 1, std::max<int64_t>(tiles.count() / 4, 1));
  const int64_t most = divide_up(tiles.count(), blocks), panels = simd::panel_count(N);
  const simd::Depth depth{Type::kFloat, tiles.C};
  const auto column = [&](int64_t panel) {
    return simd::panel_offset(N, {Type::kFloat, 1}, panel);
  };
  const int64_t stride_point = most * C + kApart, stride_product = most * column(1) + kApart;
  parallel(blocks, [&](int64_t begin, int64_t end) {
    Scratch mine;
    float* room = mine.take(kPoints * tiles.C);
    float* points = mine.take(kPoints * stride_point);
    float* products = mine.take(kPoints * stride_product);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * tiles.count() / blocks;
      const int64_t n = (block + 1) * tiles.count() / blocks - first;
      for (int64_t t = 0; t < n; ++t)
        tiles.to_points(from, first + t, room, points + t * tiles.C, stride_point);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t at = column(p), width = column(p + 1) - at, floats = tiles.C * width;
        for (int64_t k = 0; k < kPoints; ++k) {
          const float* weight = weights + at * kPoints * tiles.C + k * floats;
          const bool last = k + 1 == kPoints && p + 1 == panels;
          simd::plain_product(points + k * stride_point, tiles.C, n, depth, weight, width,
                              products + k * stride_product, width, weight + floats,
                              last ? 0 : floats);
        }
        for (int64_t t = 0; t < n; ++t) {
          const Tiles::Place tile = tiles.place(first + t);
          const int64_t pixel =
              ((tile.image * tiles.H + tile.row) * tiles.W + tile.column) * N + at;
          simd::from_points(products + t * width, stride_product, std::min(width, N - at),
                            shift ? shift + at : nullptr, added ? added + pixel : nullptr,
                            activation, std::min(kTileRows, tiles.H - tile.row),
                            std::min(kTileColumns, tiles.W - tile.column), to + pixel, tiles.W * N,
                            N);
        }
      }
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) { m.impl("conv3x3", TORCH_BOX(&conv3x3)); }

}  // namespace hybridops
