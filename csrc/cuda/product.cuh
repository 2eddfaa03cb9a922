// The one matrix product of linear, conv_stem, patch_embed and their gradients: a block makes a
// tile of kM x kN sums, 64 bytes of the sum's numbers at a time, the next staged while it
// multiplies the last. How an operand comes into shared memory is the caller's; so is what becomes
// of the sums.
#pragma once
#include "common.cuh"
#include "tile.cuh"

namespace hybridops::cuda {

// A matrix in memory; `whole`: its rows come 16 bytes at a time.
template <class T>
struct Rows {
  Global<const T> data;
  int64_t stride, stride_column;
  bool whole;
};

// The larger of two sides of a tile for convolutions and gradients. fp32 multiplies three times for
// each load, so its tiles need not be large.
template <class T>
using Widest = std::integral_constant<int, sizeof(T) == 2 ? 128 : 64>;

// An operand lies in shared memory as (rows of the product, numbers of the sum), or, kDown, as it
// has to be where memory has it so: (numbers of the sum, rows). Each warp has 32 rows by half the
// columns in registers.
template <class T, int kM, int kN, bool kLeftDown = false, bool kRightDown = false>
class Product {
 public:
  static constexpr int kThreads = 2 * kM, kSum = 64 / sizeof(T);
  // of a multiprocessor at least: 128 registers a thread, or 255 for the two halves of fp32
  static constexpr int kBlocks = (sizeof(T) == 2 ? 512 : 256) / kThreads;
  static constexpr int kLeftRows = kLeftDown ? kSum : kM, kLeftColumns = kLeftDown ? kM : kSum;
  static constexpr int kRightRows = kRightDown ? kSum : kN, kRightColumns = kRightDown ? kN : kSum;
  static constexpr int kLeftLd = kLeftColumns + kSkew<T>, kRightLd = kRightColumns + kSkew<T>;

  static constexpr int64_t bytes() {
    return shared_bytes<T>(2 * kLeftRows * kLeftLd) + shared_bytes<T>(2 * kRightRows * kRightLd);
  }

  // left(to, step) and right(to, step) put numbers step * kSum and on of the sum at `to`, rows
  // kLeftLd and kRightLd apart, by all threads; zeros beyond the end.
  template <class StageLeft, class StageRight>
  HYBRIDOPS_DEVICE void run(SharedMemory& memory, int steps, StageLeft left, StageRight right) {
    constexpr int kLeftSize = kLeftRows * kLeftLd, kRightSize = kRightRows * kRightLd;
    const Shared<T> lefts = memory.take<T>(2 * kLeftSize), rights = memory.take<T>(2 * kRightSize);
    const auto stage_step = [&](int step) {
      right(rights + step % 2 * kRightSize, step);
      left(lefts + step % 2 * kLeftSize, step);
      copy_commit();
    };
    if (steps > 0) stage_step(0);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      if (step + 1 < steps) {
        stage_step(step + 1);
        copy_wait<1>();
      } else {
        copy_wait<0>();
      }
      block_barrier();
      multiply_step(lefts + step % 2 * kLeftSize, rights + step % 2 * kRightSize);
      block_barrier();
    }
  }

  // f(row, column, sum, sum of the next column) for all that this thread has; may change the sums.
  template <class F>
  HYBRIDOPS_DEVICE void each(F f) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
          f(row_of(m, r), column_of(n), sums_[m][n][2 * r], sums_[m][n][2 * r + 1]);
  }

  // f(row, sum of g(column, x) over all columns) for the rows of this thread. memory: 2 kM floats.
  template <class G, class F>
  HYBRIDOPS_DEVICE void sum_rows(Shared<float> memory, G g, F f) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) sum += g(2 * m + r, column_of(n) + e, sums_[m][n][2 * r + e]);
        sum = sum_over<4>(sum);
        if (lane_index() % 4 == 0) memory.store(2 * row_of(m, r) + warp() % 2, sum);
      }
    block_barrier();
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto halves = memory.template load<Vec<float, 2>>(2 * row_of(m, r));
        f(2 * m + r, halves.v[0] + halves.v[1]);
      }
    block_barrier();
  }
  // Which of its four rows, as sum_rows counts them, a thread's row is.
  HYBRIDOPS_DEVICE static int slot_of(int row) { return row / 8 % 4; }

 private:
  static constexpr int kColumns = kN / 2;
  HYBRIDOPS_DEVICE static int warp() { return thread_index() / kWarp; }
  HYBRIDOPS_DEVICE static int row_of(int m, int r) {
    return warp() / 2 * 32 + 16 * m + 8 * r + lane_index() / 4;
  }
  HYBRIDOPS_DEVICE static int column_of(int n) {
    return warp() % 2 * kColumns + 8 * n + lane_index() % 4 * 2;
  }

  HYBRIDOPS_DEVICE void multiply_step(Shared<T> left, Shared<T> right) {
    const int row = warp() / 2 * 32, column = warp() % 2 * kColumns;
#pragma unroll
    for (int k = 0; k < kSum; k += 16) {
      Left<T> a[2];
#pragma unroll
      for (int m = 0; m < 2; ++m)
        if constexpr (kLeftDown)
          load_transposed(a[m], left + (k * kLeftLd + row + 16 * m), kLeftLd);
        else
          load(a[m], left + ((row + 16 * m) * kLeftLd + k), kLeftLd);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        Right<T> b;
        if constexpr (kRightDown)
          load_transposed(b, right + (k * kRightLd + column + 16 * n), kRightLd);
        else
          load(b, right + ((column + 16 * n) * kRightLd + k), kRightLd);
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply(sums_[m][2 * n], sums_[m][2 * n + 1], a[m], b);
      }
    }
  }

  float sums_[2][kColumns / 8][4] = {};
};

// Mean and 1 / standard deviation of x(0) ... x(n - 1), by a warp.
template <class X>
HYBRIDOPS_DEVICE Vec<float, 2> moments(X x, int n, float eps) {
  float sum = 0.0f, squares = 0.0f;
  for (int i = lane_index(); i < n; i += kWarp) sum += x(i);
  const float mean = sum_over<kWarp>(sum) / n;
  for (int i = lane_index(); i < n; i += kWarp) squares += (x(i) - mean) * (x(i) - mean);
  return {{mean, 1 / sqrtf(sum_over<kWarp>(squares) / n + eps)}};
}

// x (..., n) as rows a constant stride apart; copied where its strides do not allow that.
template <class T>
Rows<T> rows_of(Tensor& x) {
  const int64_t dim = x.dim(), n = x.size(dim - 1);
  int64_t stride = n, expected = -1;
  bool fits = true;
  for (int64_t d = dim - 1; d-- > 0;) {
    if (x.size(d) == 1) continue;
    if (expected < 0) stride = x.stride(d);
    fits &= expected < 0 || x.stride(d) == expected;
    expected = x.stride(d) * x.size(d);
  }
  if (!fits) {
    x = torch::stable::contiguous(x);
    stride = n;
  }
  const int64_t across = n == 1 ? 1 : x.stride(dim - 1), group = 16 / sizeof(T);
  const bool whole = across == 1 && n % group == 0 && stride % group == 0 && is_aligned(x, 16);
  return {memory_of<const T>(x), stride, across, whole};
}

}  // namespace hybridops::cuda
