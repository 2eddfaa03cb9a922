// Gradients of a weight and a bias, for linear and the convolutions: sums over all rows, cut into
// slices that each write fp32 sums, added in ascending order afterwards. No atomics, so the same
// bits every time.
#pragma once
#include "product.cuh"
#include "window.cuh"

namespace hybridops::cuda {
namespace {  // so that each file that includes this has kernels of its own

// Where number k of a row of sums belongs in a row of the gradient.
struct Order {
  int middle, inner;
  int64_t stride_outer, stride_middle, stride_inner;
  HYBRIDOPS_DEVICE int64_t of(int k) const {
    return k / inner / middle * stride_outer + k / inner % middle * stride_middle +
           k % inner * stride_inner;
  }
};

struct Slices {
  int64_t rows, length;  // rows in all, and of a slice: a multiple of 64
  int64_t count() const { return divide_up(rows, length); }
};

// Rows [first, first + count) x columns [column, column + kColumns) of x as rows of a Tile's sum.
template <class Tile, int kColumns, class T>
HYBRIDOPS_DEVICE void stage_down(Shared<T> to, int ld, const Rows<T>& x, int64_t first, int count,
                                 int column, int columns) {
  stage(to, ld, x.data + (first * x.stride + column * x.stride_column), x.stride, x.stride_column,
        count, columns - column, Tile::kSum, kColumns, x.whole, thread_index(), Tile::kThreads);
}
template <class Tile, int kColumns, class T>
HYBRIDOPS_DEVICE void stage_down(Shared<T> to, int ld, const Window<T>& x, int64_t first, int count,
                                 int column, int) {
  stage_window<Tile::kSum, kColumns>(to, ld, x, column,
                                     [&](int row) { return x.cell(first + row, first + count); });
}

template <class T>
HYBRIDOPS_DEVICE float number_of(const Rows<T>& x, int64_t row, int column) {
  return to_float(x.data.load(row * x.stride + column * x.stride_column));
}
template <class T>
HYBRIDOPS_DEVICE float number_of(const Window<T>& x, int64_t row, int column) {
  const Cell cell = x.cell(row, row + 1), tap = x.tap(column);
  return x.holds(cell, tap) ? to_float(x.load(cell.start + tap.start)) : 0.0f;
}

// The sum over a warp of numbers with twice the digits of a float.
HYBRIDOPS_DEVICE float sum_over_warp(double x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float high = (float)x, low = std::isinf(high) ? 0.0f : (float)(x - high);
    x = (double)high + low + shuffle_xor(high, mask) + shuffle_xor(low, mask);
  }
  return (float)x;
}

// sums (slices, N, K) = dy^T x over each slice, a warp a number: where there are too few for tiles.
// Of so few numbers each counts for itself, so they are summed in double.
template <class T, class X>
__global__ void __launch_bounds__(256)
    dot_kernel(Rows<T> dy, X x, Global<float> sums, Slices slices, int N, int K, int64_t count) {
  const int64_t i = block_index() * (thread_count() / kWarp) + thread_index() / kWarp;
  if (i >= count) return;
  const int k = (int)(i % K), n = (int)(i / K % N);
  const int64_t first = i / K / N * slices.length;
  const int length = (int)least<int64_t>(slices.rows - first, slices.length);
  double sum = 0.0;
  for (int row = lane_index(); row < length; row += kWarp)
    sum += (double)number_of(dy, first + row, n) * number_of(x, first + row, k);
  const float all = sum_over_warp(sum);
  if (lane_index() == 0) sums.store(i, all);
}

// The same by tiles; X: Rows<T> or Window<T>.
template <class T, int kSide, class X>
__global__ void __launch_bounds__(Product<T, kSide, kSide, true, true>::kThreads,
                                  Product<T, kSide, kSide, true, true>::kBlocks)
    weight_gradient_kernel(Rows<T> dy, X x, Global<float> sums, Slices slices, int N, int K) {
  using Tile = Product<T, kSide, kSide, true, true>;
  const int across = (K + kSide - 1) / kSide, down = (N + kSide - 1) / kSide;
  const int column0 = (int)(block_index() % across) * kSide;
  const int row0 = (int)(block_index() / across % down) * kSide;
  const int64_t slice = block_index() / across / down, first = slice * slices.length;
  const int length = (int)least<int64_t>(slices.rows - first, slices.length);
  SharedMemory memory;
  Tile tile;
  tile.run(
      memory, (length + Tile::kSum - 1) / Tile::kSum,
      [&](Shared<T> to, int step) {
        stage_down<Tile, kSide>(to, Tile::kLeftLd, dy, first + step * Tile::kSum,
                                length - step * Tile::kSum, row0, N);
      },
      [&](Shared<T> to, int step) {
        stage_down<Tile, kSide>(to, Tile::kRightLd, x, first + step * Tile::kSum,
                                length - step * Tile::kSum, column0, K);
      });
  tile.each([&](int row, int column, float one, float next) {
    if (row0 + row < N)
      store_pair(sums, (slice * N + row0 + row) * K, column0 + column, K, one, next);
  });
}

// sums (slices, N) of the columns of dy.
constexpr int kSumWarps = 8;
template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp)
    column_sums_kernel(Rows<T> dy, Global<float> sums, Slices slices, int N) {
  const int across = (N + kWarp - 1) / kWarp, warp = thread_index() / kWarp;
  const int column = (int)(block_index() % across) * kWarp + lane_index();
  const int64_t slice = block_index() / across, first = slice * slices.length;
  const int length = (int)least<int64_t>(slices.rows - first, slices.length);
  SharedMemory memory;
  const Shared<float> halves = memory.take<float>(kSumWarps * kWarp);
  float sum = 0.0f;
  for (int row = warp; row < length && column < N; row += kSumWarps)
    sum += number_of(dy, first + row, column);
  halves.store(thread_index(), sum);
  block_barrier();
  if (warp > 0 || column >= N) return;
  for (int other = 1; other < kSumWarps; ++other) sum += halves.load(other * kWarp + lane_index());
  sums.store(slice * N + column, sum);
}

// to (N, K in another order) = the sum of slices (count, N, K).
template <class T>
__global__ void __launch_bounds__(256)
    add_slices_kernel(Global<const float> slices, int64_t count, int64_t N, int K, Order order,
                      Global<T> to) {
  const int64_t i = block_index() * thread_count() + thread_index();
  if (i >= N * K) return;
  float sum = 0.0f;
  for (int64_t slice = 0; slice < count; ++slice) sum += slices.load(slice * N * K + i);
  to.store(i / K * K + order.of((int)(i % K)), cast<T>(sum));
}

constexpr int64_t kFew = 256;

// dweight (N, K) = dy^T x, dy (rows, N), x (rows, K); written in the given order.
template <class T, class X>
void weight_gradient(const Device& device, const Rows<T>& dy, const X& x, int64_t rows, int64_t N,
                     int64_t K, const Order& order, const Tensor& like, Tensor& dweight) {
  if (N * K == 0) return;
  const Widest<T> widest{};
  const bool large = N > 64 && K > 64;
  const int64_t side = large ? widest.value : 64, tiles = divide_up(N, side) * divide_up(K, side);
  const int64_t wanted = divide_up(2 * device.processors(), tiles);
  const Slices slices{rows, round_up(std::max<int64_t>(divide_up(rows, wanted), 256), 64)};
  const Tensor sums = empty(like, {slices.count(), N, K}, ScalarType::Float);
  const auto run = [&](auto of_side) {
    constexpr int kSide = of_side.value;
    using Tile = Product<T, kSide, kSide, true, true>;
    const int64_t numbers = slices.count() * N * K;
    if (numbers > 0 && N * K <= kFew)
      device.launch(dot_kernel<T, X>, divide_up(numbers, 8), 256, 0, dy, x, memory_of<float>(sums),
                    slices, (int)N, (int)K, numbers);
    else if (numbers > 0)
      device.launch(weight_gradient_kernel<T, kSide, X>, slices.count() * tiles, Tile::kThreads,
                    Tile::bytes(), dy, x, memory_of<float>(sums), slices, (int)N, (int)K);
  };
  if (large)
    run(widest);
  else
    run(std::integral_constant<int, 64>{});
  device.launch(add_slices_kernel<T>, divide_up(N * K, 256), 256, 0, memory_of<const float>(sums),
                slices.count(), N, (int)K, order, memory_of<T>(dweight));
}

// dbias (N) = the sum of the rows of dy.
template <class T>
void bias_gradient(const Device& device, const Rows<T>& dy, int64_t rows, int64_t N,
                   const Tensor& like, Tensor& dbias) {
  if (N == 0) return;
  const int64_t across = divide_up(N, kWarp), wanted = divide_up(4 * device.processors(), across);
  const Slices slices{rows, round_up(std::max<int64_t>(divide_up(rows, wanted), 256), 64)};
  const Tensor sums = empty(like, {slices.count(), N}, ScalarType::Float);
  if (rows > 0)
    device.launch(column_sums_kernel<T>, slices.count() * across, kSumWarps * kWarp,
                  shared_bytes<float>(kSumWarps * kWarp), dy, memory_of<float>(sums), slices,
                  (int)N);
  device.launch(add_slices_kernel<T>, divide_up(N, 256), 256, 0, memory_of<const float>(sums),
                slices.count(), (int64_t)1, (int)N, Order{1, (int)N, 0, 0, 1}, memory_of<T>(dbias));
}

}  // namespace
}  // namespace hybridops::cuda
