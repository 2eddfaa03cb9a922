// Convolutions as implicit products (product.cuh) of the image's windows (window.cuh) and the
// weight, with bias, activation, LayerNorm and position embedding behind. conv_stem.cu and
// patch_embed.cu call it.
//
// The windows' numbers are taken in the order in which memory has them, so that a patch's rows, and
// the channels of a layer's tokens, come 16 bytes at a time. The weight is put into that order
// first, padded to 16 bytes, where it is not: one small launch. A LayerNorm over more channels than
// a tile holds is a pass of its own.
#include "conv.cuh"
#include "conv_weight.cuh"

namespace hybridops::cuda {
namespace {

template <class T>
struct Finish {
  Global<const T> bias, norm_weight, norm_bias, position;
  int64_t position_stride, position_stride_c;
  float eps;
  int activation;
};

template <class T>
struct Tokens {
  Global<T> data;
  int64_t stride_b, stride_h, stride_w;
  int cells, across, N;
  HYBRIDOPS_DEVICE int64_t at(int64_t row) const {
    const int64_t b = row / cells;
    const int cell = (int)(row - b * cells);
    return b * stride_b + cell / across * stride_h + cell % across * stride_w;
  }
};

template <class T, int kM, int kN>
__global__ void __launch_bounds__(Product<T, kM, kN>::kThreads, Product<T, kM, kN>::kBlocks)
    conv_kernel(Window<T> x, Rows<T> w, Finish<T> finish, Tokens<T> y, int64_t M, int K) {
  using Tile = Product<T, kM, kN>;
  const int N = y.N, across = (N + kN - 1) / kN;
  const int64_t row0 = block_index() / across * kM;
  const int column0 = (int)(block_index() % across) * kN;
  SharedMemory memory;
  const Shared<int64_t> cells = memory.take<int64_t>(2 * kM);
  for (int row = thread_index(); row < kM; row += thread_count()) {
    const Cell cell = x.cell(row0 + row, M);
    cells.store(2 * row, Vec<int64_t, 2>{{cell.start, (int64_t)cell.h << 32 | (uint32_t)cell.w}});
  }
  block_barrier();
  const auto cell_at = [&](int row) {
    const auto packed = cells.template load<Vec<int64_t, 2>>(2 * row);
    return Cell{packed.v[0], (int)(packed.v[1] >> 32), (int)(uint32_t)packed.v[1]};
  };
  const auto left = [&](Shared<T> to, int step) {
    stage_window<kM, Tile::kSum>(to, Tile::kLeftLd, x, step * Tile::kSum, cell_at);
  };
  const auto right = [&](Shared<T> to, int step) {
    const int k0 = step * Tile::kSum;
    stage(to, Tile::kRightLd, w.data + (column0 * w.stride + k0), w.stride, w.stride_column,
          N - column0, K - k0, kN, Tile::kSum, w.whole, thread_index(), Tile::kThreads);
  };
  Tile tile;
  tile.run(memory, (K + Tile::kSum - 1) / Tile::kSum, left, right);

  tile.each([&](int, int column, float& first, float& second) {
    const auto of = [&](float value, int c) {
      if (c >= N) return 0.0f;
      return activate(finish.bias ? value + to_float(finish.bias.load(c)) : value,
                      finish.activation);
    };
    first = of(first, column0 + column);
    second = of(second, column0 + column + 1);
  });
  float mean[4] = {}, scale[4] = {};
  if (finish.norm_weight) {  // all of a row is in this block
    const Shared<float> halves = memory.take<float>(2 * kM);
    tile.sum_rows(
        halves, [&](int, int, float value) { return value; },
        [&](int slot, float sum) { mean[slot] = sum / N; });
    tile.sum_rows(
        halves,
        [&](int slot, int column, float value) {
          return column < N ? (value - mean[slot]) * (value - mean[slot]) : 0.0f;
        },
        [&](int slot, float sum) { scale[slot] = 1 / sqrtf(sum / N + finish.eps); });
  }
  tile.each([&](int row, int column, float first, float second) {
    if (row0 + row >= M) return;
    const int slot = Tile::slot_of(row), c = column0 + column;
    const auto of = [&](float value, int c) {
      if (c >= N) return value;
      if (finish.norm_weight)
        value = fmaf((value - mean[slot]) * scale[slot], to_float(finish.norm_weight.load(c)),
                     finish.norm_bias ? to_float(finish.norm_bias.load(c)) : 0.0f);
      if (finish.position)
        value += to_float(finish.position.load((row0 + row) % y.cells * finish.position_stride +
                                               c * finish.position_stride_c));
      return value;
    };
    store_pair(y.data, y.at(row0 + row), c, N, of(first, c), of(second, c + 1));
  });
}

// LayerNorm in place, a row a warp, and the position embedding.
template <class T>
__global__ void __launch_bounds__(256) norm_kernel(Tokens<T> y, Finish<T> finish, int64_t M) {
  const int64_t row = block_index() * (thread_count() / kWarp) + thread_index() / kWarp;
  if (row >= M) return;
  const Global<T> values = y.data + y.at(row);
  const auto at = [&](int c) { return to_float(values.load(c)); };
  const Vec<float, 2> found = moments(at, y.N, finish.eps);
  for (int c = lane_index(); c < y.N; c += kWarp) {
    float value = fmaf((at(c) - found.v[0]) * found.v[1], to_float(finish.norm_weight.load(c)),
                       finish.norm_bias ? to_float(finish.norm_bias.load(c)) : 0.0f);
    if (finish.position)
      value += to_float(finish.position.load(row % y.cells * finish.position_stride +
                                             c * finish.position_stride_c));
    values.store(c, cast<T>(value));
  }
}

}  // namespace

Padding padding_of(const std::vector<int64_t>& sides, size_t first, const char* op) {
  STD_TORCH_CHECK(sides.size() >= first + 4, op, ": four paddings a layer are needed");
  const int64_t* p = sides.data() + first;
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(p[i] >= 0 && p[i] <= 1 << 15, op, ": a padding is out of range: ", p[i]);
  return {p[0], p[1], p[2], p[3]};
}

Image image_of(const Tensor& image, const Tensor& weight, const char* op) {
  check_device(image, op);
  check_device(weight, op);
  STD_TORCH_CHECK(
      image.dim() == 4 && weight.dim() == 4 && weight.size(1) == image.size(1) &&
          (image.scalar_type() == weight.scalar_type() || image.scalar_type() == ScalarType::Byte),
      op, ": image and weight do not fit");
  return {image,           image.size(0),   image.size(1),   image.size(2),  image.size(3),
          image.stride(0), image.stride(1), image.stride(2), image.stride(3)};
}

Image image_of_tokens(const Tensor& tokens, int64_t H, int64_t W) {
  const int64_t C = tokens.size(2);
  return {tokens, tokens.size(0), C, H, W, H * W * C, 1, W * C, C};
}

Sight sight_of(const Image& image, int64_t KH, int64_t KW, int64_t stride, const Padding& p,
               const char* op) {
  STD_TORCH_CHECK(KH > 0 && KW > 0 && stride > 0 && stride < kNowhere, op,
                  ": kernel or stride are out of range");
  const int64_t H = image.H + p.top + p.bottom, W = image.W + p.left + p.right;
  STD_TORCH_CHECK(H >= KH && W >= KW, op, ": the kernel does not fit the image");
  const int64_t Ho = (H - KH) / stride + 1, Wo = (W - KW) / stride + 1;
  STD_TORCH_CHECK(
      H < kNowhere && W < kNowhere && Ho * Wo < kNowhere && (double)image.C * KH * KW < kNowhere,
      op, ": image or weight are too large");
  return {KH, KW, stride, Ho, Wo, p, image.C > 1 && image.stride_c == 1};
}

void convolve(const Device& device, const Convolution& c, Tensor& y, const Places& places,
              const char* op) {
  const int64_t N = c.weight.size(0), B = c.image.B, cells = c.sight.cells(), M = B * cells;
  const auto fits = [&](const std::optional<Tensor>& v) {
    return !v.has_value() ||
           (v->dim() == 1 && v->size(0) == N && v->scalar_type() == c.weight.scalar_type());
  };
  STD_TORCH_CHECK(N < kNowhere && fits(c.bias) && fits(c.norm_weight) && fits(c.norm_bias), op,
                  ": bias or norm do not fit weight");
  if (M * N == 0) return;
  const std::optional<Tensor> bias = contiguous(c.bias), norm_weight = contiguous(c.norm_weight),
                              norm_bias = contiguous(c.norm_bias);
  for_type(c.weight, op, [&](auto type) {
    using T = decltype(type);
    const Window<T> x = window_of<T>(c.image, c.sight);
    std::optional<Tensor> copy;
    const Rows<T> w = x.K ? weight_of<T>(device, c.weight, x.channels_last, copy) : Rows<T>{};
    const Tokens<T> to{memory_of<T>(y) + places.start,
                       places.stride_b,
                       places.stride_h,
                       places.stride_w,
                       (int)cells,
                       (int)c.sight.Wo,
                       (int)N};
    Finish<T> finish{memory_of<const T>(bias),
                     memory_of<const T>(norm_weight),
                     memory_of<const T>(norm_bias),
                     memory_of<const T>(c.position),
                     c.position.has_value() ? c.position->stride(0) : 0,
                     c.position.has_value() ? c.position->stride(1) : 0,
                     (float)c.eps,
                     (int)c.activation};
    const Widest<T> widest{};
    const bool norm_behind = norm_weight.has_value() && N > widest.value;
    Finish<T> first = finish;
    if (norm_behind) first.norm_weight = first.norm_bias = first.position = {};
    const auto run = [&](auto rows, auto columns) {
      constexpr int kM = rows.value, kN = columns.value;
      using Tile = Product<T, kM, kN>;
      device.launch(conv_kernel<T, kM, kN>, divide_up(M, kM) * divide_up(N, kN), Tile::kThreads,
                    shared_bytes<int64_t>(2 * kM) + Tile::bytes() + shared_bytes<float>(2 * kM), x,
                    w, first, to, M, w.data ? (int)w.stride : 0);
    };
    const std::integral_constant<int, 32> few{};
    const std::integral_constant<int, 64> half{};
    const bool enough = divide_up(M, 128) * divide_up(N, 128) >= device.processors();
    if (N <= 32)
      run(std::integral_constant<int, 128>{}, few);
    else if (N > 64 && (enough || (norm_weight.has_value() && !norm_behind)))
      run(widest, widest);
    else
      run(half, half);
    if (norm_behind) device.launch(norm_kernel<T>, divide_up(M, 8), 256, 0, to, finish, M);
  });
}

}  // namespace hybridops::cuda
