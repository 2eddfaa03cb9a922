// What peg's forward and backward share: the grid, how the work is cut, vectors of channels, taps.
//
// A thread owns V channels (16 bytes where they allow it) and a strip of cells along a row, so that
// each input vector is read once per kernel row and serves up to K outputs. hybridops/ops/peg.py
// has the meaning.
#pragma once
#include "common.cuh"

namespace hybridops::cuda {

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
struct Work {
  int c, lane, row, rows, first, end;
  HYBRIDOPS_DEVICE Work(const Grid& g, int V, int total) {
    const int tile = (int)(block_index() % g.tiles), chunk = (int)(block_index() / g.tiles);
    lane = thread_index() % g.lanes;
    row = thread_index() / g.lanes;
    rows = thread_count() / g.lanes;
    c = (tile * g.lanes + lane) * V;
    const int per_chunk = (total + g.chunks - 1) / g.chunks;
    first = chunk * per_chunk + row;
    end = least(total, (chunk + 1) * per_chunk);
    if (c >= g.C) end = 0;
  }
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

// Images may lie any distance apart, tokens C; anything else is copied.
inline Tensor as_rows(const Tensor& x) {
  const int64_t C = x.size(2);
  const bool fits = (C == 1 || x.stride(2) == 1) && (x.size(1) == 1 || x.stride(1) == C);
  return fits ? x : torch::stable::contiguous(x);
}

inline bool takes_vectors(const Tensor& x, int64_t V, int64_t bytes) {
  return x.size(2) % V == 0 && is_aligned(x, bytes) && (x.size(0) == 1 || x.stride(0) % V == 0);
}

inline Grid geometry(const Tensor& x, const Tensor& weight, int64_t H, int64_t W, int64_t prefix,
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
inline void share_out(Grid& g, int V, int64_t items, const Device& device) {
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

}  // namespace hybridops::cuda
