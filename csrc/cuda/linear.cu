// hybridops_cuda::linear: activation(norm(x) w^T + bias) + residual; hybridops/ops/linear.py has
// the meaning.
//
// One tiled product (product.cuh). LayerNorm needs a look at each row first: a kernel of its own,
// two numbers a row; the rows are normalised as they are staged.
#include "product.cuh"

namespace hybridops::cuda {
namespace {

template <class T>
struct Norm {
  Global<const float> statistics;  // (M, 2): mean and 1 / standard deviation
  Global<const T> weight, bias;
};

template <class T>
__global__ void __launch_bounds__(256)
    statistics_kernel(Rows<T> x, Global<float> statistics, int64_t M, int K, float eps) {
  const int64_t row = block_index() * (thread_count() / kWarp) + thread_index() / kWarp;
  if (row >= M) return;
  const auto at = [&](int k) {
    return to_float(x.data.load(row * x.stride + k * x.stride_column));
  };
  const Vec<float, 2> found = moments(at, K, eps);
  if (lane_index() == 0) statistics.store(2 * row, found);
}

template <class T, int kSide>  // kM = kN = kSide
__global__ void __launch_bounds__(Product<T, kSide, kSide>::kThreads,
                                  Product<T, kSide, kSide>::kBlocks)
    linear_kernel(Rows<T> x, Rows<T> w, Global<const T> bias, Norm<T> norm, Rows<T> residual,
                  Global<T> y, int64_t M, int N, int K, int activation) {
  using Tile = Product<T, kSide, kSide>;
  constexpr int kSum = Tile::kSum, ld = Tile::kLeftLd;
  const int across = (N + kSide - 1) / kSide;
  const int64_t row0 = block_index() / across * kSide;
  const int column0 = (int)(block_index() % across) * kSide;
  const int rows = (int)least<int64_t>(M - row0, kSide);

  const auto left = [&](Shared<T> to, int step) {
    const int k0 = step * kSum;
    const Global<const T> from = x.data + (row0 * x.stride + k0 * x.stride_column);
    if (!norm.statistics) {
      stage(to, ld, from, x.stride, x.stride_column, rows, K - k0, kSide, kSum, x.whole,
            thread_index(), Tile::kThreads);
      return;
    }
    for (int i = thread_index(); i < kSide * kSum; i += thread_count()) {
      const int row = i / kSum, k = i % kSum;
      float value = 0.0f;
      if (row < rows && k0 + k < K) {
        const auto s = norm.statistics.template load<Vec<float, 2>>(2 * (row0 + row));
        value = (to_float(from.load(row * x.stride + k * x.stride_column)) - s.v[0]) * s.v[1];
        value = fmaf(value, to_float(norm.weight.load(k0 + k)),
                     norm.bias ? to_float(norm.bias.load(k0 + k)) : 0.0f);
      }
      to.store(row * ld + k, cast<T>(value));
    }
  };
  const auto right = [&](Shared<T> to, int step) {
    const int k0 = step * kSum;
    stage(to, ld, w.data + (column0 * w.stride + k0 * w.stride_column), w.stride, w.stride_column,
          N - column0, K - k0, kSide, kSum, w.whole, thread_index(), Tile::kThreads);
  };
  SharedMemory memory;
  Tile tile;
  tile.run(memory, (K + kSum - 1) / kSum, left, right);

  tile.each([&](int row, int column, float& first, float& second) {
    if (row >= rows) return;
    const auto finish = [&](float value, int c) {
      if (c >= N) return value;
      if (bias) value += to_float(bias.load(c));
      value = activate(value, activation);
      if (residual.data)
        value += to_float(
            residual.data.load((row0 + row) * residual.stride + c * residual.stride_column));
      return value;
    };
    const int c = column0 + column;
    store_pair(y, (row0 + row) * N, c, N, finish(first, c), finish(second, c + 1));
  });
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor>,
              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
              std::optional<Tensor> residual, int64_t activation) {
  check_device(x, "linear");
  check_device(weight, "linear");
  STD_TORCH_CHECK(x.dim() > 0 && weight.dim() == 2 && x.size(x.dim() - 1) == weight.size(1) &&
                      weight.scalar_type() == x.scalar_type(),
                  "linear: weight does not fit x");
  const int64_t N = weight.size(0), K = weight.size(1);
  STD_TORCH_CHECK(N < 1 << 30 && K < 1 << 30, "linear: weight is too large");
  const auto fits = [&](const std::optional<Tensor>& v, int64_t n) {
    return !v.has_value() ||
           (v->dim() == 1 && v->size(0) == n && v->scalar_type() == x.scalar_type());
  };
  STD_TORCH_CHECK(fits(bias, N) && fits(norm_weight, K) && fits(norm_bias, K),
                  "linear: bias or norm do not fit");
  std::vector<int64_t> sizes;
  int64_t M = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    sizes.push_back(x.size(d));
    M *= x.size(d);
  }
  sizes.push_back(N);
  if (residual.has_value()) {
    bool same = residual->dim() == x.dim() && residual->scalar_type() == x.scalar_type();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = residual->size(d) == sizes[d];
    STD_TORCH_CHECK(same, "linear: residual does not fit x and weight");
  }
  Tensor y = empty(x, sizes, x.scalar_type());
  if (y.numel() == 0) return y;
  const Device device(x);
  bias = contiguous(bias);
  norm_weight = contiguous(norm_weight);
  norm_bias = contiguous(norm_bias);
  for_type(x, "linear", [&](auto type) {
    using T = decltype(type);
    const Rows<T> from = rows_of<T>(x), by = rows_of<T>(weight);
    Norm<T> norm{};
    std::optional<Tensor> statistics;
    if (norm_weight.has_value() && K > 0) {
      statistics = empty(x, {M, 2}, ScalarType::Float);
      device.launch(statistics_kernel<T>, divide_up(M, 8), 256, 0, from,
                    memory_of<float>(*statistics), M, (int)K, (float)eps);
      norm = {memory_of<const float>(*statistics), memory_of<const T>(norm_weight),
              memory_of<const T>(norm_bias)};
    }
    const Rows<T> added = residual.has_value() ? rows_of<T>(*residual) : Rows<T>{};
    const auto run = [&](auto of_side) {
      constexpr int kSide = of_side.value;
      device.launch(linear_kernel<T, kSide>, divide_up(M, kSide) * divide_up(N, kSide),
                    Product<T, kSide, kSide>::kThreads, Product<T, kSide, kSide>::bytes(), from, by,
                    memory_of<const T>(bias), norm, added, memory_of<T>(y), M, (int)N, (int)K,
                    (int)activation);
    };
    // the larger tile reads less, once there are enough of them for the machine
    if (divide_up(M, 128) * divide_up(N, 128) >= device.processors())
      run(std::integral_constant<int, 128>{});
    else
      run(std::integral_constant<int, 64>{});
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace hybridops::cuda
