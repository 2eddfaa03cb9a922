// hybridops_cuda::linear: activation(norm(x) w^T + bias) + residual; hybridops/ops/linear.py has
// the meaning.
//
// A block takes kM rows of x and kN of w, 32 (fp32: 16) of the sum at a time, the next while it
// multiplies the last; a warp has 32 rows by half the columns in registers. LayerNorm needs a look
// at each row first: a kernel of its own, two numbers a row; the rows are normalised as they are
// staged. There is no backward: two plain products, which cuBLAS does.
#include "common.cuh"
#include "tile.cuh"

namespace hybridops::cuda {
namespace {

// (M, K) rows, `stride` apart; `whole`: 16 bytes at a time.
template <class T>
struct Rows {
  Global<const T> data;
  int64_t stride, stride_column;
  bool whole;
};

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
  float sum = 0.0f, squares = 0.0f;
  for (int k = lane_index(); k < K; k += kWarp) sum += at(k);
  const float mean = sum_over<kWarp>(sum) / K;
  for (int k = lane_index(); k < K; k += kWarp) squares += (at(k) - mean) * (at(k) - mean);
  const float variance = sum_over<kWarp>(squares) / K;
  if (lane_index() == 0)
    statistics.store(2 * row, Vec<float, 2>{{mean, 1 / sqrtf(variance + eps)}});
}

template <class T, int kSide>  // kM = kN = kSide
__global__ void __launch_bounds__(kSide * 2)
    linear_kernel(Rows<T> x, Rows<T> w, Global<const T> bias, Norm<T> norm, Rows<T> residual,
                  Global<T> y, int64_t M, int N, int K, int activation) {
  constexpr int kK = 64 / sizeof(T), ld = kK + kSkew<T>, kColumns = kSide / 2;
  const int thread = thread_index(), warp = thread / kWarp, lane = lane_index();
  SharedMemory memory;
  const Shared<T> xs = memory.take<T>(2 * kSide * ld), ws = memory.take<T>(2 * kSide * ld);
  const int across = (N + kSide - 1) / kSide;
  const int64_t row0 = block_index() / across * kSide;
  const int column0 = (int)(block_index() % across) * kSide;
  const int rows = M - row0 < kSide ? (int)(M - row0) : kSide;

  const auto stage_step = [&](int step) {
    const int k0 = step * kK, half = step % 2 * kSide * ld;
    stage(ws + half, ld, w.data + (column0 * w.stride + k0 * w.stride_column), w.stride,
          w.stride_column, N - column0, K - k0, kSide, kK, w.whole, thread, thread_count());
    const Global<const T> from = x.data + (row0 * x.stride + k0 * x.stride_column);
    if (!norm.statistics) {
      stage(xs + half, ld, from, x.stride, x.stride_column, rows, K - k0, kSide, kK, x.whole,
            thread, thread_count());
    } else {
      for (int i = thread; i < kSide * kK; i += thread_count()) {
        const int row = i / kK, k = i % kK;
        float value = 0.0f;
        if (row < rows && k0 + k < K) {
          const auto s = norm.statistics.template load<Vec<float, 2>>(2 * (row0 + row));
          value = (to_float(from.load(row * x.stride + k * x.stride_column)) - s.v[0]) * s.v[1];
          value = fmaf(value, to_float(norm.weight.load(k0 + k)),
                       norm.bias ? to_float(norm.bias.load(k0 + k)) : 0.0f);
        }
        xs.store(half + row * ld + k, cast<T>(value));
      }
    }
    copy_commit();
  };

  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * kColumns;
  float sums[2][kColumns / 8][4] = {};
  const int steps = (K + kK - 1) / kK;
  if (steps > 0) stage_step(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      stage_step(step + 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    block_barrier();
    const int half = step % 2 * kSide * ld;
#pragma unroll
    for (int k = 0; k < kK; k += 16) {
      Left<T> a[2];
#pragma unroll
      for (int m = 0; m < 2; ++m) load(a[m], xs + (half + (warp_row + 16 * m) * ld + k), ld);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        Right<T> b;
        load(b, ws + (half + (warp_column + 16 * n) * ld + k), ld);
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply(sums[m][2 * n], sums[m][2 * n + 1], a[m], b);
      }
    }
    block_barrier();
  }

#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + 16 * m + 8 * r + lane / 4;
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const int column = column0 + warp_column + 8 * n + lane % 4 * 2;
        float value[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = column + e;
          value[e] = sums[m][n][2 * r + e];
          if (c >= N) continue;
          if (bias) value[e] += to_float(bias.load(c));
          value[e] = activate(value[e], activation);
          if (residual.data)
            value[e] += to_float(
                residual.data.load((row0 + row) * residual.stride + c * residual.stride_column));
        }
        store_pair(y, (row0 + row) * N, column, N, value[0], value[1]);
      }
    }
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
    const auto run = [&](auto kernel, int64_t side) {
      const int64_t columns = 64 / (int64_t)sizeof(T) + kSkew<T>;
      device.launch(kernel, divide_up(M, side) * divide_up(N, side), (int)side * 2,
                    2 * shared_bytes<T>(2 * side * columns), from, by, memory_of<const T>(bias),
                    norm, added, memory_of<T>(y), M, (int)N, (int)K, (int)activation);
    };
    // the larger tile reads less, once there are enough of them for the machine
    if (divide_up(M, 128) * divide_up(N, 128) >= device.processors())
      run(linear_kernel<T, 128>, 128);
    else
      run(linear_kernel<T, 64>, 64);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace hybridops::cuda
