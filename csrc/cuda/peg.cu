// hybridops_cuda::peg: depthwise K x K on the token grid; hybridops/ops/peg.py has the meaning.
//
// A thread owns V channels (16 bytes where they allow it) and a strip of cells along a row, so that
// each input vector is read once per kernel row and serves up to K outputs. Weights are fp32, in
// registers for K = 3, else a row at a time from shared memory. The backward keeps the K x K sums
// of its channels in registers; blocks leave partial sums that a second kernel adds in a fixed
// order.
#include "common.cuh"

namespace hybridops::cuda {
namespace {

constexpr int kThreads = 128;

struct Grid {
  int H, W, C, K, stride, padding, Ho, Wo, prefix;
  int64_t N, No;  // tokens of an image, in and out
  int lanes;      // threads side by side along the channels
  int tiles;      // of lanes * V channels
  int chunks;     // blocks that share out the items of a tile
  int items;      // strips of all images, then prefix tokens of all images
  int strips;     // along a row
};

// What a thread does: channels c.. of the items first, first + step, ... below `end`.
struct Share {
  int c, lane, row, rows, first, end;
  HYBRIDOPS_DEVICE Share(const Grid& g, int V, int total) {
    const int tile = (int)(block_index() % g.tiles), chunk = (int)(block_index() / g.tiles);
    lane = thread_index() % g.lanes;
    row = thread_index() / g.lanes;
    rows = thread_count() / g.lanes;
    c = (tile * g.lanes + lane) * V;
    const int per_chunk = (total + g.chunks - 1) / g.chunks;
    first = chunk * per_chunk + row;
    end = min_of(total, (chunk + 1) * per_chunk);
    if (c >= g.C) end = 0;
  }
  HYBRIDOPS_DEVICE static int min_of(int a, int b) { return a < b ? a : b; }
};

template <class T, int V>
HYBRIDOPS_DEVICE void read(float (&x)[V], Global<const T> from, int64_t i) {
  const auto raw = from.template load<Vec<T, V>>(i);
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = to_float(raw.v[v]);
}
template <class T, int V>
HYBRIDOPS_DEVICE void write(Global<T> to, int64_t i, const float (&x)[V]) {
  Vec<T, V> raw;
#pragma unroll
  for (int v = 0; v < V; ++v) raw.v[v] = cast<T>(x[v]);
  to.store(i, raw);
}
template <int V>
HYBRIDOPS_DEVICE void read(float (&x)[V], Shared<float> from, int i) {
  constexpr int kStep = V < 4 ? V : 4;
#pragma unroll
  for (int v = 0; v < V; v += kStep) {
    const auto part = from.template load<Vec<float, kStep>>(i + v);
#pragma unroll
    for (int u = 0; u < kStep; ++u) x[v + u] = part.v[u];
  }
}

// This block's weights as fp32 (K * K, lanes * V) and, behind them, its biases.
template <class T>
HYBRIDOPS_DEVICE void stage(Shared<float> taps, Global<const T> weight, Global<const T> bias,
                            const Grid& g, int width) {
  const int KK = g.K * g.K, first = (int)(block_index() % g.tiles) * width;
  for (int i = thread_index(); i < KK * width; i += thread_count()) {
    const int c = i / KK, t = i % KK;
    const bool inside = first + c < g.C;
    taps.store(t * width + c, inside ? to_float(weight.load((int64_t)first * KK + i)) : 0.0f);
  }
  for (int c = thread_index(); c < width; c += thread_count())
    taps.store(KK * width + c, bias && first + c < g.C ? to_float(bias.load(first + c)) : 0.0f);
  block_barrier();
}

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
  const Share share(g, V, g.items);
  float shift[V], w[kHeld][kRow][V];
  read(shift, taps, g.K * g.K * width + share.lane * V);
  if constexpr (kK == 3) {
#pragma unroll
    for (int t = 0; t < 9; ++t) read(w[t / 3][t % 3], taps, t * width + share.lane * V);
  }
  const int per_image = g.Ho * g.strips;
  for (int item = share.first; item < share.end; item += share.rows) {
    float z[R][V];
    const int cells = g.items - (int)((int64_t)g.items / (per_image + g.prefix)) * g.prefix;
    if (item >= cells) {  // a prefix token passes through
      const int b = (item - cells) / g.prefix, p = (item - cells) % g.prefix;
      y.store(((int64_t)b * g.No + p) * g.C + share.c,
              x.template load<Vec<T, V>>(b * x_stride_b + (int64_t)p * g.C + share.c));
      continue;
    }
    const int b = item / per_image, ho = item % per_image / g.strips;
    const int wo = item % g.strips * R;
    const Global<const T> image = x + (b * x_stride_b + (int64_t)g.prefix * g.C + share.c);
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
          for (int j = 0; j < kK; ++j) read(w[0][j], taps, (i * kK + j) * width + share.lane * V);
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
          read(w[0][0], taps, (i * g.K + j) * width + share.lane * V);
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
      write(y, ((int64_t)b * g.No + g.prefix + cell) * g.C + share.c, z[r]);
    }
  }
}

// How many taps' sums a block adds up at a time: all at once take too much shared memory, and one
// by one 50 copies of the loop and as many barriers.
template <int kK>
constexpr int kTogether = 2 * kK;

// dx of stride 1 and equal grids, and this block's share of dweight and dbias:
// partial (chunks, K * K + 1, C).
template <class T, int kK, int V>
__global__ void __launch_bounds__(kThreads, 2)
    peg_backward_kernel(Global<const T> dy, Global<const T> x, Global<const T> weight, Global<T> dx,
                        Global<float> partial, Grid g, int64_t dy_stride_b, int64_t x_stride_b,
                        bool residual) {
  constexpr int R = 2, KK = kK * kK, kGroup = kTogether<kK>;
  const int width = g.lanes * V;
  SharedMemory memory;
  const Shared<float> taps = memory.take<float>((KK + 1) * width);
  const Shared<float> sums = memory.take<float>(kGroup * kThreads * V);
  stage(taps, weight, Global<const T>{}, g, width);
  const Share share(g, V, g.items);
  float dw[KK + 1][V] = {};  // the last is the bias'
  const int per_image = g.H * g.strips;
  const int cells = g.items - (int)((int64_t)g.items / (per_image + g.prefix)) * g.prefix;
  for (int item = share.first; item < share.end; item += share.rows) {
    if (item >= cells) {
      const int b = (item - cells) / g.prefix, p = (item - cells) % g.prefix;
      dx.store(((int64_t)b * g.N + p) * g.C + share.c,
               dy.template load<Vec<T, V>>(b * dy_stride_b + (int64_t)p * g.C + share.c));
      continue;
    }
    const int b = item / per_image, h = item % per_image / g.strips, w = item % g.strips * R;
    const int64_t start = (int64_t)g.prefix * g.C + share.c;
    const Global<const T> image = x + (b * x_stride_b + start);
    const Global<const T> gradient = dy + (b * dy_stride_b + start);
    float value[R][V] = {}, out[R][V] = {};
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (w + r < g.W) read(value[r], image, (int64_t)(h * g.W + w + r) * g.C);
#pragma unroll
    for (int i = 0; i < kK; ++i) {
      const int ho = h + kK / 2 - i;
      if (ho < 0 || ho >= g.H) continue;
      float tap[kK][V];
#pragma unroll
      for (int j = 0; j < kK; ++j) read(tap[j], taps, (i * kK + j) * width + share.lane * V);
#pragma unroll
      for (int c = 0; c < R + kK - 1; ++c) {  // column w + kK/2 - (kK - 1) + c of dy
        const int column = w - kK / 2 + c;
        if (column < 0 || column >= g.W) continue;
        float d[V];
        read(d, gradient, (int64_t)(ho * g.W + column) * g.C);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int j = r + kK - 1 - c;
          if (j < 0 || j >= kK) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            out[r][v] = fmaf(tap[j][v], d[v], out[r][v]);
            dw[i * kK + j][v] = fmaf(value[r][v], d[v], dw[i * kK + j][v]);
            if (i == kK / 2 && j == kK / 2) {
              dw[KK][v] += d[v];
              if (residual) out[r][v] += d[v];
            }
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (w + r < g.W)
        write(dx, ((int64_t)b * g.N + g.prefix + h * g.W + w + r) * g.C + share.c, out[r]);
  }
  // the rows of the block, one after the other
  const int tile = (int)(block_index() % g.tiles), chunk = (int)(block_index() / g.tiles);
#pragma unroll
  for (int first = 0; first <= KK; first += kGroup) {
#pragma unroll
    for (int t = 0; t < kGroup; ++t)
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (first + t <= KK)
          sums.store((share.row * kGroup + t) * width + share.lane * V + v,
                     dw[first + t <= KK ? first + t : 0][v]);
    block_barrier();
    const int here = Share::min_of(kGroup, KK + 1 - first);
    for (int i = thread_index(); i < here * width; i += thread_count()) {
      const int t = first + i / width, c = tile * width + i % width;
      float sum = 0.0f;
#pragma unroll 1
      for (int row = 0; row < share.rows; ++row) sum += sums.load(row * kGroup * width + i);
      if (c < g.C) partial.store(((int64_t)chunk * (KK + 1) + t) * g.C + c, sum);
    }
    block_barrier();
  }
}

// dx for any kernel size, stride and padding.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    peg_dx_kernel(Global<const T> dy, Global<const T> weight, Global<T> dx, Grid g,
                  int64_t dy_stride_b, bool residual) {
  SharedMemory memory;
  const Shared<float> taps = memory.take<float>((g.K * g.K + 1) * g.lanes);
  stage(taps, weight, Global<const T>{}, g, g.lanes);
  const Share share(g, 1, g.items);
  for (int item = share.first; item < share.end; item += share.rows) {
    const int b = item / (int)g.N, token = item % (int)g.N, cell = token - g.prefix;
    const Global<const T> gradient = dy + (b * dy_stride_b + share.c);
    float sum = 0.0f;
    if (cell < 0) {
      sum = to_float(gradient.load((int64_t)token * g.C));
    } else {
      for (int i = 0; i < g.K; ++i) {
        const int h = cell / g.W + g.padding - i;
        if (h < 0 || h % g.stride || h / g.stride >= g.Ho) continue;
        for (int j = 0; j < g.K; ++j) {
          const int w = cell % g.W + g.padding - j;
          if (w < 0 || w % g.stride || w / g.stride >= g.Wo) continue;
          const int64_t from = g.prefix + (int64_t)(h / g.stride) * g.Wo + w / g.stride;
          sum = fmaf(taps.load((i * g.K + j) * g.lanes + share.lane),
                     to_float(gradient.load(from * g.C)), sum);
        }
      }
      if (residual) sum += to_float(gradient.load((int64_t)token * g.C));
    }
    dx.store(((int64_t)b * g.N + token) * g.C + share.c, cast<T>(sum));
  }
}

// One tap (or, as the last, the bias) of partial (chunks, K * K + 1, C), for any kernel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    peg_dweight_kernel(Global<const T> dy, Global<const T> x, Global<float> partial, Grid g,
                       int64_t dy_stride_b, int64_t x_stride_b) {
  const int taps = g.K * g.K + 1;
  const int64_t task = block_index();
  const int tile = (int)(task % g.tiles), tap = (int)(task / g.tiles % taps);
  const int chunk = (int)(task / g.tiles / taps);
  const int lane = thread_index() % kWarp, row = thread_index() / kWarp;
  const int rows = thread_count() / kWarp, c = tile * kWarp + lane;
  SharedMemory memory;
  const Shared<float> sums = memory.take<float>(kThreads);
  const int cells = g.Ho * g.Wo, total = g.items;
  const int per_chunk = (total + g.chunks - 1) / g.chunks;
  const int end = Share::min_of(total, (chunk + 1) * per_chunk);
  float sum = 0.0f;
  for (int item = chunk * per_chunk + row; item < end && c < g.C; item += rows) {
    const int b = item / cells, ho = item % cells / g.Wo, wo = item % g.Wo;
    const float d =
        to_float(dy.load(b * dy_stride_b + (int64_t)(g.prefix + item % cells) * g.C + c));
    if (tap == taps - 1) {
      sum += d;
      continue;
    }
    const int h = ho * g.stride + tap / g.K - g.padding;
    const int w = wo * g.stride + tap % g.K - g.padding;
    if (h < 0 || h >= g.H || w < 0 || w >= g.W) continue;
    const int64_t from = g.prefix + (int64_t)h * g.W + w;
    sum = fmaf(d, to_float(x.load(b * x_stride_b + from * g.C + c)), sum);
  }
  sums.store(thread_index(), sum);
  block_barrier();
  if (row > 0 || c >= g.C) return;
  for (int r = 1; r < rows; ++r) sum += sums.load(r * kWarp + lane);
  partial.store(((int64_t)chunk * taps + tap) * g.C + c, sum);
}

// The second stage: dweight (C, K * K) and dbias (C) from partial (chunks, K * K + 1, C).
template <class T>
__global__ void __launch_bounds__(kThreads)
    peg_reduce_kernel(Global<const float> partial, Global<T> dweight, Global<T> dbias, int chunks,
                      int KK, int C) {
  const int tiles = (C + kWarp - 1) / kWarp;
  const int tile = (int)(block_index() % tiles), tap = (int)(block_index() / tiles);
  const int lane = thread_index() % kWarp, row = thread_index() / kWarp;
  const int rows = thread_count() / kWarp, c = tile * kWarp + lane;
  SharedMemory memory;
  const Shared<float> sums = memory.take<float>(kThreads);
  float sum = 0.0f;
  for (int chunk = row; chunk < chunks && c < C; chunk += rows)
    sum += partial.load(((int64_t)chunk * (KK + 1) + tap) * C + c);
  sums.store(thread_index(), sum);
  block_barrier();
  if (row > 0 || c >= C) return;
  for (int r = 1; r < rows; ++r) sum += sums.load(r * kWarp + lane);
  if (tap < KK)
    dweight.store((int64_t)c * KK + tap, cast<T>(sum));
  else
    dbias.store(c, cast<T>(sum));
}

// Images may lie any distance apart, tokens C; anything else is copied.
Tensor as_rows(const Tensor& x) {
  const int64_t C = x.size(2);
  const bool fits = (C == 1 || x.stride(2) == 1) && (x.size(1) == 1 || x.stride(1) == C);
  return fits ? x : torch::stable::contiguous(x);
}

bool takes_vectors(const Tensor& x, int64_t V, int64_t bytes) {
  return x.size(2) % V == 0 && is_aligned(x, bytes) && (x.size(0) == 1 || x.stride(0) % V == 0);
}

Grid geometry(const Tensor& x, const Tensor& weight, int64_t H, int64_t W, int64_t prefix,
              int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 3 && H > 0 && W > 0 && prefix >= 0 && x.size(1) == prefix + H * W,
                  "peg: x does not fit its grid");
  const int64_t C = x.size(2), K = weight.dim() == 4 ? weight.size(3) : 0;
  STD_TORCH_CHECK(K > 0 && weight.size(0) == C && weight.size(1) == 1 && weight.size(2) == K &&
                      weight.scalar_type() == x.scalar_type(),
                  "peg: weight does not fit x");
  STD_TORCH_CHECK(K <= 16, "peg: the CUDA kernels take K up to 16, got ", K);
  STD_TORCH_CHECK(stride > 0 && padding >= 0 && padding <= 1 << 15 && H + 2 * padding >= K &&
                      W + 2 * padding >= K,
                  "peg: the kernel does not fit the grid");
  Grid g{};
  const int64_t Ho = (H + 2 * padding - K) / stride + 1, Wo = (W + 2 * padding - K) / stride + 1;
  const int64_t most = std::max(x.size(1), prefix + Ho * Wo);
  STD_TORCH_CHECK(C < 1 << 24 && std::max<int64_t>(x.size(0), 1) * most <= 0x7fffffff &&
                      most * C <= INT64_MAX / 8,
                  "peg: more than 2^31 tokens");
  g.H = (int)H, g.W = (int)W, g.C = (int)C, g.K = (int)K;
  g.stride = (int)stride, g.padding = (int)padding, g.Ho = (int)Ho, g.Wo = (int)Wo;
  g.prefix = (int)prefix, g.N = x.size(1), g.No = prefix + Ho * Wo;
  return g;
}

// Shares `items` out over blocks: the lanes that waste fewest threads, then enough chunks to fill
// the machine four times.
void share_out(Grid& g, int V, int64_t items, const Device& device) {
  const int vectors = (int)divide_up(g.C, V), most = std::max(1, (g.K > 5 ? 64 : 128) / V);
  g.lanes = 1;
  for (int lanes = 2; lanes <= kWarp && lanes <= most; lanes *= 2)
    if (round_up(vectors, lanes) <= round_up(vectors, 8)) g.lanes = lanes;
  g.tiles = (int)divide_up(vectors, g.lanes);
  const int64_t rows = kThreads / g.lanes;
  g.chunks = (int)std::clamp<int64_t>(divide_up(4 * device.processors(), g.tiles), 1,
                                      divide_up(items, rows));
  g.items = (int)items;
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

template <class T, int kK, int V>
void backward(const Device& device, const Tensor& dy, const Tensor& x, const Tensor& weight,
              Tensor& dx, Tensor& partial, const Grid& g, bool residual) {
  device.launch(peg_backward_kernel<T, kK, V>, (int64_t)g.tiles * g.chunks, kThreads,
                shared_bytes<float>((int64_t)(kK * kK + 1) * g.lanes * V) +
                    shared_bytes<float>(kTogether<kK> * kThreads * V),
                memory_of<const T>(dy), memory_of<const T>(x), memory_of<const T>(weight),
                memory_of<T>(dx), memory_of<float>(partial), g, dy.stride(0), x.stride(0),
                residual);
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

std::tuple<Tensor, Tensor, Tensor> peg_backward(Tensor dy, Tensor x, Tensor weight, int64_t H,
                                                int64_t W, int64_t prefix, int64_t stride,
                                                int64_t padding, bool residual) {
  check_device(x, "peg_backward");
  Grid g = geometry(x, weight, H, W, prefix, stride, padding);
  const int64_t B = x.size(0);
  STD_TORCH_CHECK(dy.dim() == 3 && dy.size(0) == B && dy.size(1) == g.No && dy.size(2) == g.C &&
                      dy.scalar_type() == x.scalar_type(),
                  "peg_backward: dy does not fit x");
  const ScalarType type = x.scalar_type();
  Tensor dx = empty(x, {B, g.N, g.C}, type), dbias = empty(x, {g.C}, type);
  Tensor dweight = empty(x, {g.C, 1, g.K, g.K}, type);
  if (g.C == 0) return {dx, dweight, dbias};
  const Device device(x);
  dy = as_rows(dy);
  x = as_rows(x);
  weight = torch::stable::contiguous(weight);
  const int KK = g.K * g.K;
  for_type(x, "peg_backward", [&](auto type) {
    using T = decltype(type);
    std::optional<Tensor> partial;
    const auto allocate = [&] { partial = empty(x, {g.chunks, KK + 1, g.C}, ScalarType::Float); };
    // The sums of a thread's channels fill its registers: fewer channels for larger kernels.
    const auto fused = [&](auto kernel, auto vector) {
      g.strips = (int)divide_up(g.W, 2);
      const int64_t items = B * ((int64_t)g.H * g.strips + g.prefix);
      const int64_t bytes = vector.value * (int64_t)sizeof(T);
      const bool wide =
          takes_vectors(x, vector.value, bytes) && takes_vectors(dy, vector.value, bytes);
      share_out(g, wide ? vector.value : 1, items, device);
      allocate();
      if (wide)
        backward<T, kernel.value, vector.value>(device, dy, x, weight, dx, *partial, g, residual);
      else
        backward<T, kernel.value, 1>(device, dy, x, weight, dx, *partial, g, residual);
    };
    constexpr int V = 16 / sizeof(T);
    const bool same = stride == 1 && g.Ho == H && g.Wo == W;
    if (B == 0) {
      g.chunks = 0;
      allocate();
    } else if (same && g.K == 3) {
      fused(std::integral_constant<int, 3>{}, std::integral_constant<int, V>{});
    } else if (same && g.K == 5) {
      fused(std::integral_constant<int, 5>{}, std::integral_constant<int, V / 2>{});
    } else if (same && g.K == 7) {
      fused(std::integral_constant<int, 7>{}, std::integral_constant<int, V / 4>{});
    } else {
      share_out(g, 1, B * g.N, device);
      device.launch(peg_dx_kernel<T>, (int64_t)g.tiles * g.chunks, kThreads,
                    shared_bytes<float>((int64_t)(KK + 1) * g.lanes), memory_of<const T>(dy),
                    memory_of<const T>(weight), memory_of<T>(dx), g, dy.stride(0), residual);
      g.tiles = (int)divide_up(g.C, kWarp);
      g.items = (int)(B * g.Ho * g.Wo);
      g.chunks = (int)std::clamp<int64_t>(divide_up(g.items, 256), 1, 64);
      allocate();
      device.launch(peg_dweight_kernel<T>, (int64_t)g.tiles * (KK + 1) * g.chunks, kThreads,
                    shared_bytes<float>(kThreads), memory_of<const T>(dy), memory_of<const T>(x),
                    memory_of<float>(*partial), g, dy.stride(0), x.stride(0));
    }
    device.launch(peg_reduce_kernel<T>, divide_up(g.C, kWarp) * (KK + 1), kThreads,
                  shared_bytes<float>(kThreads), memory_of<const float>(*partial),
                  memory_of<T>(dweight), memory_of<T>(dbias), g.chunks, KK, g.C);
  });
  return {dx, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("peg", TORCH_BOX(&peg));
  m.impl("peg_backward", TORCH_BOX(&peg_backward));
}

}  // namespace hybridops::cuda
