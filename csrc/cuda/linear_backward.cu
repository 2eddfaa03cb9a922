// hybridops_cuda::linear_backward: dx = dy weight, dweight = dy^T x, dbias = the sum of dy's rows.
//
// Both products are those of product.cuh, with operands that lie down where memory has them so; the
// sums over rows are gradient.cuh's.
#include "gradient.cuh"

namespace hybridops::cuda {
namespace {

template <class T, int kSide>
__global__ void __launch_bounds__(Product<T, kSide, kSide, false, true>::kThreads,
                                  Product<T, kSide, kSide, false, true>::kBlocks)
    input_gradient_kernel(Rows<T> dy, Rows<T> weight, Global<T> dx, int64_t M, int N, int K) {
  using Tile = Product<T, kSide, kSide, false, true>;
  const int across = (K + kSide - 1) / kSide;
  const int64_t row0 = block_index() / across * kSide;
  const int column0 = (int)(block_index() % across) * kSide;
  const int rows = (int)least<int64_t>(M - row0, kSide);
  SharedMemory memory;
  Tile tile;
  tile.run(
      memory, (N + Tile::kSum - 1) / Tile::kSum,
      [&](Shared<T> to, int step) {
        const int n0 = step * Tile::kSum;
        stage(to, Tile::kLeftLd, dy.data + (row0 * dy.stride + n0 * dy.stride_column), dy.stride,
              dy.stride_column, rows, N - n0, kSide, Tile::kSum, dy.whole, thread_index(),
              Tile::kThreads);
      },
      [&](Shared<T> to, int step) {
        stage_down<Tile, kSide>(to, Tile::kRightLd, weight, (int64_t)step * Tile::kSum,
                                N - step * Tile::kSum, column0, K);
      });
  tile.each([&](int row, int column, float one, float next) {
    if (row < rows) store_pair(dx, (row0 + row) * K, column0 + column, K, one, next);
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor dy, Tensor x, Tensor weight) {
  check_device(dy, "linear_backward");
  check_device(x, "linear_backward");
  check_device(weight, "linear_backward");
  STD_TORCH_CHECK(
      x.dim() > 0 && dy.dim() == x.dim() && weight.dim() == 2 &&
          x.size(x.dim() - 1) == weight.size(1) && dy.size(x.dim() - 1) == weight.size(0) &&
          weight.scalar_type() == x.scalar_type() && dy.scalar_type() == x.scalar_type(),
      "linear_backward: dy, x and weight do not fit");
  const int64_t N = weight.size(0), K = weight.size(1);
  STD_TORCH_CHECK(N < 1 << 30 && K < 1 << 30, "linear_backward: weight is too large");
  std::vector<int64_t> sizes;
  int64_t M = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    STD_TORCH_CHECK(dy.size(d) == x.size(d), "linear_backward: dy and x do not fit");
    sizes.push_back(x.size(d));
    M *= x.size(d);
  }
  sizes.push_back(K);
  Tensor dx = empty(x, sizes, x.scalar_type());
  Tensor dweight = empty(x, {N, K}, x.scalar_type()), dbias = empty(x, {N}, x.scalar_type());
  const Device device(x);
  for_type(x, "linear_backward", [&](auto type) {
    using T = decltype(type);
    const Rows<T> from = rows_of<T>(dy), inputs = rows_of<T>(x), by = rows_of<T>(weight);
    const auto run = [&](auto of_side) {
      constexpr int kSide = of_side.value;
      using Tile = Product<T, kSide, kSide, false, true>;
      device.launch(input_gradient_kernel<T, kSide>, divide_up(M, kSide) * divide_up(K, kSide),
                    Tile::kThreads, Tile::bytes(), from, by, memory_of<T>(dx), M, (int)N, (int)K);
    };
    if (divide_up(M, 128) * divide_up(K, 128) >= device.processors())
      run(Widest<T>{});
    else if (M * K > 0)
      run(std::integral_constant<int, 64>{});
    weight_gradient(device, from, inputs, M, N, K, Order{1, (int)std::max<int64_t>(K, 1), 0, 0, 1},
                    x, dweight);
    bias_gradient(device, from, M, N, x, dbias);
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace hybridops::cuda
