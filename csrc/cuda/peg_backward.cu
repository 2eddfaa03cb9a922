// hybridops_cuda::peg_backward: dx, dweight and dbias of hybridops_cuda::peg.
//
// K = 3, 5, 7 at stride 1 in one pass, which keeps the K x K sums of its channels in registers; the
// rest in one for dx and one for the sums. Blocks leave partial sums that a second kernel adds in a
// fixed order.
#include "peg.cuh"

namespace hybridops::cuda {
namespace {

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
  const Work work(g, V, g.items);
  float dw[KK + 1][V] = {};  // the last is the bias'
  const int per_image = g.H * g.strips;
  const int cells = g.items - (int)((int64_t)g.items / (per_image + g.prefix)) * g.prefix;
  for (int item = work.first; item < work.end; item += work.rows) {
    if (item >= cells) {
      const int b = (item - cells) / g.prefix, p = (item - cells) % g.prefix;
      dx.store(((int64_t)b * g.N + p) * g.C + work.c,
               dy.template load<Vec<T, V>>(b * dy_stride_b + (int64_t)p * g.C + work.c));
      continue;
    }
    const int b = item / per_image, h = item % per_image / g.strips, w = item % g.strips * R;
    const int64_t start = (int64_t)g.prefix * g.C + work.c;
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
      for (int j = 0; j < kK; ++j) read(tap[j], taps, (i * kK + j) * width + work.lane * V);
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
        write(dx, ((int64_t)b * g.N + g.prefix + h * g.W + w + r) * g.C + work.c, out[r]);
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
          sums.store((work.row * kGroup + t) * width + work.lane * V + v,
                     dw[first + t <= KK ? first + t : 0][v]);
    block_barrier();
    const int here = least(kGroup, KK + 1 - first);
    for (int i = thread_index(); i < here * width; i += thread_count()) {
      const int t = first + i / width, c = tile * width + i % width;
      float sum = 0.0f;
#pragma unroll 1
      for (int row = 0; row < work.rows; ++row) sum += sums.load(row * kGroup * width + i);
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
  const Work work(g, 1, g.items);
  for (int item = work.first; item < work.end; item += work.rows) {
    const int b = item / (int)g.N, token = item % (int)g.N, cell = token - g.prefix;
    const Global<const T> gradient = dy + (b * dy_stride_b + work.c);
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
          sum = fmaf(taps.load((i * g.K + j) * g.lanes + work.lane),
                     to_float(gradient.load(from * g.C)), sum);
        }
      }
      if (residual) sum += to_float(gradient.load((int64_t)token * g.C));
    }
    dx.store(((int64_t)b * g.N + token) * g.C + work.c, cast<T>(sum));
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
  const int end = least(total, (chunk + 1) * per_chunk);
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
  m.impl("peg_backward", TORCH_BOX(&peg_backward));
}

}  // namespace hybridops::cuda
