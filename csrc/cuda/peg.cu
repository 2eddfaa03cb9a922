// hybridops_cuda::peg: depthwise K x K on the token grid, with residual, activation and gate.
//
// Weights are fp32, in registers for K = 3, else a row at a time from shared memory.
#include "peg.cuh"

namespace hybridops::cuda {
namespace {

// kK = 0: any kernel size and stride, one cell at a time.
template <class T, int kK, int V>
__global__ void __launch_bounds__(kThreads, 3)
    peg_forward_kernel(Global<const T> x, Global<const T> weight, Global<const T> bias, Global<T> y,
                       Grid g, int64_t x_stride_b, bool residual, bool gate, int activation) {
  constexpr int R = kK ? 4 : 1, kHeld = kK == 3 ? 3 : 1, kRow = kK ? kK : 1;
  const int width = g.lanes * V;
  SharedMemory memory;
  const Shared<float> taps = memory.take<float>((g.K * g.K + 1) * width);
  stage(taps, weight, bias, g, width);
  const Work work(g, V, g.items);
  float shift[V], w[kHeld][kRow][V];
  read(shift, taps, g.K * g.K * width + work.lane * V);
  if constexpr (kK == 3) {
#pragma unroll
    for (int t = 0; t < 9; ++t) read(w[t / 3][t % 3], taps, t * width + work.lane * V);
  }
  const int per_image = g.Ho * g.strips;
  for (int item = work.first; item < work.end; item += work.rows) {
    float z[R][V];
    const int cells = g.items - (int)((int64_t)g.items / (per_image + g.prefix)) * g.prefix;
    if (item >= cells) {  // a prefix token passes through
      const int b = (item - cells) / g.prefix, p = (item - cells) % g.prefix;
      y.store(((int64_t)b * g.No + p) * g.C + work.c,
              x.template load<Vec<T, V>>(b * x_stride_b + (int64_t)p * g.C + work.c));
      continue;
    }
    const int b = item / per_image, ho = item % per_image / g.strips;
    const int wo = item % g.strips * R;
    const Global<const T> image = x + (b * x_stride_b + (int64_t)g.prefix * g.C + work.c);
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) z[r][v] = shift[v];
    if constexpr (kK > 0) {
#pragma unroll(kK == 3 ? 3 : 1)
      for (int i = 0; i < kK; ++i) {
        const int h = ho + i - g.padding;
        if (h < 0 || h >= g.H) continue;
        if constexpr (kK != 3) {
#pragma unroll
          for (int j = 0; j < kK; ++j) read(w[0][j], taps, (i * kK + j) * width + work.lane * V);
        }
#pragma unroll
        for (int c = 0; c < R + kK - 1; ++c) {
          const int column = wo + c - g.padding;
          if (column < 0 || column >= g.W) continue;
          float value[V];
          read(value, image, (int64_t)(h * g.W + column) * g.C);
#pragma unroll
          for (int j = 0; j < kK; ++j)
            if (c - j >= 0 && c - j < R) {
#pragma unroll
              for (int v = 0; v < V; ++v)
                z[c - j < 0 || c - j >= R ? 0 : c - j][v] =
                    fmaf(w[kHeld == 3 ? i % kHeld : 0][j][v], value[v], z[c - j][v]);
            }
        }
      }
    } else {
      for (int i = 0; i < g.K; ++i) {
        const int h = ho * g.stride + i - g.padding;
        if (h < 0 || h >= g.H) continue;
        for (int j = 0; j < g.K; ++j) {
          const int column = wo * g.stride + j - g.padding;
          if (column < 0 || column >= g.W) continue;
          float value[V];
          read(value, image, (int64_t)(h * g.W + column) * g.C);
          read(w[0][0], taps, (i * g.K + j) * width + work.lane * V);
#pragma unroll
          for (int v = 0; v < V; ++v) z[0][v] = fmaf(w[0][0][v], value[v], z[0][v]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (wo + r >= g.Wo) break;
      const int64_t cell = (int64_t)ho * g.Wo + wo + r;
      float value[V] = {};
      if (residual || gate) read(value, image, cell * g.C);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        z[r][v] = activate(z[r][v], activation);
        if (gate)
          z[r][v] = value[v] / (1.0f + expf(-z[r][v]));
        else if (residual)
          z[r][v] += value[v];
      }
      write(y, ((int64_t)b * g.No + g.prefix + cell) * g.C + work.c, z[r]);
    }
  }
}

template <class T, int kK>
void forward(const Device& device, const Tensor& x, const Tensor& weight,
             const std::optional<Tensor>& bias, Tensor& y, Grid g, bool residual, bool gate,
             int activation) {
  constexpr int V = 16 / sizeof(T);
  g.strips = (int)divide_up(g.Wo, kK ? 4 : 1);
  const auto launch = [&](auto kernel, int vector) {
    share_out(g, vector, x.size(0) * ((int64_t)g.Ho * g.strips + g.prefix), device);
    device.launch(kernel, (int64_t)g.tiles * g.chunks, kThreads,
                  shared_bytes<float>((int64_t)(g.K * g.K + 1) * g.lanes * vector),
                  memory_of<const T>(x), memory_of<const T>(weight), memory_of<const T>(bias),
                  memory_of<T>(y), g, x.stride(0), residual, gate, activation);
  };
  if (takes_vectors(x, V, 16))
    launch(peg_forward_kernel<T, kK, V>, V);
  else
    launch(peg_forward_kernel<T, kK, 1>, 1);
}

Tensor peg(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t H, int64_t W,
           int64_t prefix, int64_t stride, int64_t padding, bool residual, int64_t activation,
           bool gate) {
  check_device(input, "peg");
  const Grid g = geometry(input, weight, H, W, prefix, stride, padding);
  STD_TORCH_CHECK(
      !bias.has_value() || (bias->numel() == g.C && bias->scalar_type() == input.scalar_type()),
      "peg: bias does not fit x");
  STD_TORCH_CHECK(!(residual || gate) || (g.Ho == H && g.Wo == W),
                  "peg: residual and gate need equal grids");
  Tensor y = empty(input, {input.size(0), g.No, g.C}, input.scalar_type());
  if (y.numel() == 0) return y;
  const Device device(input);
  const Tensor x = as_rows(input);
  weight = torch::stable::contiguous(weight);
  bias = contiguous(bias);
  for_type(x, "peg", [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel) {
      forward<T, kernel.value>(device, x, weight, bias, y, g, residual, gate, (int)activation);
    };
    switch (stride == 1 ? g.K : 0) {
      case 3:
        return run(std::integral_constant<int, 3>{});
      case 5:
        return run(std::integral_constant<int, 5>{});
      case 7:
        return run(std::integral_constant<int, 7>{});
      default:
        return run(std::integral_constant<int, 0>{});
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) { m.impl("peg", TORCH_BOX(&peg)); }

}  // namespace hybridops::cuda
