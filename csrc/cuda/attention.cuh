// What the attention kernels share: strided heads, the bias where it lies, and how the work is cut
// into blocks, warps and chunks. hybridops/ops/attention.py has the meaning.
//
// A block holds whole heads: its columns (keys, or queries for dk and dv) lie in shared memory
// once, its warps take 16 rows each until all are done. Where a head does not fit, columns pass
// through in chunks, and a block takes one round of rows. Bias is read where it lies, a table
// through its index.
#pragma once
#include "common.cuh"
#include "tile.cuh"

namespace hybridops::cuda {

constexpr int kTile = 16;  // queries (or keys) of a warp
constexpr int kMostWarps = 8;
constexpr int kLargestHead = 128;

// A tensor (B, N, H, D) of any strides.
template <class T>
struct Heads {
  Global<const T> data;
  int64_t stride_b, stride_n, stride_h, stride_d;
  int D;       // numbers of a row
  bool whole;  // rows come 16 bytes at a time
  HYBRIDOPS_DEVICE Global<const T> at(int64_t b, int h, int64_t n) const {
    return data + (b * stride_b + h * stride_h + n * stride_n);
  }
};

// Added to the scores: nothing, dense, or a table read through an index.
template <class T>
struct Bias {
  Global<const T> data;
  int64_t stride_b, stride_h, stride_i, stride_j;  // table: stride_h, and stride_j per entry
  Global<const int64_t> wide;                      // the index (Nq, Nk), in one of two types
  Global<const int32_t> narrow;
  int size;  // of the table
  Global<const bool> padding;

  // NaN for an index outside the table: looking would stop the stream.
  HYBRIDOPS_DEVICE float at(int64_t b, int h, int i, int j, int Nk) const {
    if (!data) return 0.0f;
    if (!wide && !narrow)
      return to_float(data.load(b * stride_b + h * stride_h + i * stride_i + j * stride_j));
    const int64_t place = (int64_t)i * Nk + j;
    const int64_t entry = wide ? wide.load(place) : narrow.load(place);
    if (entry < 0 || entry >= size) return float_of(0x7fc00000u);
    return to_float(data.load(h * stride_h + entry * stride_j));
  }
};

// How the work is cut: the same for forward and backward.
struct Plan {
  int B, H, Nq, Nk, D, Dv;  // D, Dv as given
  int row, row_v;           // rounded up to 16
  int warps, heads;         // of a block
  int tiles;                // of 16 queries (or keys) of a head
  int parts;                // blocks that share the tiles of a head
  int chunk, chunks;        // keys (or queries) in shared memory at once
  float scale;
};

template <class T>
HYBRIDOPS_DEVICE float exponential(float x) {
  if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return fast_exp(x);
}

// Whether column `lane` of 32 from `first` has mask 0 anywhere; the same in all lanes.
HYBRIDOPS_DEVICE bool any_open(Shared<float> mask, int first, int end) {
  const int i = first + lane_index();
  return any_in_warp(i < end && mask.load(i) == 0.0f);
}

// mask[i] = 0 where key first + i takes part, -inf where it is padding or does not exist.
HYBRIDOPS_DEVICE void stage_mask(Shared<float> mask, Global<const bool> padding, int64_t b, int Nk,
                                 int first, int count, int who, int step) {
#pragma unroll 1
  for (int i = who; i < count; i += step) {
    const int j = first + i;
    const bool closed = j >= Nk || (padding && padding.load(b * Nk + j));
    mask.store(i, closed ? -INFINITY : 0.0f);
  }
}

// One head of one image.
struct Place {
  int64_t b;
  int h;
};
HYBRIDOPS_DEVICE Place place_of(int64_t head, const Plan& p) {
  return {head / p.H, (int)(head % p.H)};
}

// What a block has to do: `rounds` times a tile for each warp, over its heads.
struct Share {
  int64_t first_head;
  int heads, first_tile, tiles, rounds;
};
HYBRIDOPS_DEVICE Share share_of(int64_t block, int64_t first_head, const Plan& p) {
  Share s{};
  const int per_part = (p.tiles + p.parts - 1) / p.parts;
  s.first_head = first_head;
  s.heads = (int)least<int64_t>((int64_t)p.B * p.H - first_head, p.heads);
  s.first_tile = (int)(block % p.parts) * per_part;
  s.tiles = least(p.tiles - s.first_tile, per_part);
  s.rounds = (s.heads * s.tiles + p.warps - 1) / p.warps;
  return s;
}

// A warp's turn: 16 rows from `first` of a head of the block's, unless there are none left.
struct Turn {
  bool active;
  int head, first;
};
HYBRIDOPS_DEVICE Turn turn_of(const Share& s, int item) {
  if (item >= s.heads * s.tiles) return {false, 0, 0};
  return {true, item / s.tiles, (s.first_tile + item % s.tiles) * kTile};
}

// Rows [first, first + here) of the block's heads, one after the other, zeros up to `padded`.
template <class T>
HYBRIDOPS_DEVICE void stage_heads(Shared<T> to, int ld, int row, const Heads<T>& x,
                                  const Share& share, int64_t first, int here, int padded,
                                  const Plan& p) {
  for (int n = 0; n < share.heads; ++n) {
    const Place at = place_of(share.first_head + n, p);
    stage(to + n * p.chunk * ld, ld, x.at(at.b, at.h, first), x.stride_n, x.stride_d, here, x.D,
          padded, row, x.whole, thread_index(), thread_count());
  }
}

HYBRIDOPS_DEVICE void stage_masks(Shared<float> masks, Global<const bool> padding,
                                  const Share& share, int first, int padded, const Plan& p) {
  for (int n = 0; n < share.heads; ++n)
    stage_mask(masks + n * p.chunk, padding, place_of(share.first_head + n, p).b, p.Nk, first,
               padded, thread_index(), thread_count());
}

template <class T>
Heads<T> heads_of(const Tensor& x) {
  constexpr int64_t kGroup = 16 / sizeof(T);
  const auto fits = [&](int d) { return x.size(d) == 1 || x.stride(d) % kGroup == 0; };
  const bool whole = (x.size(3) == 1 || x.stride(3) == 1) && x.size(3) % kGroup == 0 && fits(0) &&
                     fits(1) && fits(2) && is_aligned(x, 16);
  return {memory_of<const T>(x), x.stride(0),    x.stride(1), x.stride(2),
          x.stride(3),           (int)x.size(3), whole};
}

template <class T>
Bias<T> bias_of(const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
                const std::optional<Tensor>& padding) {
  Bias<T> y{};
  y.padding = memory_of<const bool>(padding);
  if (!bias.has_value()) return y;
  y.data = memory_of<const T>(*bias);
  if (index.has_value()) {
    y.stride_h = bias->stride(0);
    y.stride_j = bias->stride(1);
    y.size = (int)bias->size(1);
    if (index->scalar_type() == ScalarType::Long)
      y.wide = memory_of<const int64_t>(*index);
    else
      y.narrow = memory_of<const int32_t>(*index);
    return y;
  }
  const auto stride = [&](int d) { return bias->size(d) == 1 ? 0 : bias->stride(d); };
  y.stride_b = stride(0), y.stride_h = stride(1), y.stride_i = stride(2), y.stride_j = stride(3);
  return y;
}

// Bytes of shared memory: `columns` per head staged, and what each warp has of its own.
template <class T>
int64_t bytes_of(const Plan& p, bool backward) {
  const int64_t ld = p.row + kSkew<T>, ldv = p.row_v + kSkew<T>;
  const int64_t staged = (int64_t)p.heads * p.chunk, own = (int64_t)p.warps * kTile;
  int64_t bytes = shared_bytes<T>(staged * ld) + shared_bytes<T>(staged * ldv) +
                  shared_bytes<float>(staged) + shared_bytes<T>(own * ld);
  if (backward)
    bytes +=
        shared_bytes<float>(staged) + shared_bytes<T>(own * ldv) + 2 * shared_bytes<float>(own);
  return bytes;
}

// Rows (queries) in tiles over warps and blocks, columns (keys) into shared memory.
template <class T>
Plan plan_of(const Device& device, const Tensor& q, const Tensor& v, int64_t Nx, int64_t Ny,
             double scale, bool backward, bool one_head) {
  Plan p{};
  p.B = (int)q.size(0), p.H = (int)q.size(2), p.D = (int)q.size(3), p.Dv = (int)v.size(3);
  p.Nq = (int)q.size(1), p.Nk = (int)v.size(1);
  p.row = (int)round_up(std::max(p.D, 1), 16), p.row_v = (int)round_up(std::max(p.Dv, 1), 16);
  p.scale = (float)scale;
  p.tiles = (int)divide_up(Nx, kTile);
  const int most = std::max(p.row, p.row_v) > 64 && sizeof(T) == 4 ? 4 : kMostWarps;
  const int64_t all_heads = (int64_t)p.B * p.H, limit = device.shared_limit();
  p.warps = p.tiles <= 4 ? std::min(4, most)
                         : (int)divide_up(p.tiles, divide_up(p.tiles, most));  // rounds even
  p.chunk = (int)round_up(std::max<int64_t>(Ny, 1), kTile);
  p.heads = one_head ? 1 : (int)std::clamp<int64_t>(p.warps / p.tiles, 1, all_heads);
  p.parts = 1;
  while (p.heads > 1 && bytes_of<T>(p, backward) > limit / 2) --p.heads;
  if (bytes_of<T>(p, backward) > limit) {  // a head does not fit
    while (p.chunk > kTile && bytes_of<T>(p, backward) > limit) p.chunk -= kTile;
    p.parts = (int)divide_up(p.tiles, p.warps);
  } else {  // few heads: share out their rows
    const int64_t groups = divide_up(all_heads, p.heads);
    p.parts =
        (int)std::clamp<int64_t>(2 * device.processors() / groups, 1, divide_up(p.tiles, p.warps));
  }
  p.chunks = (int)divide_up(std::max<int64_t>(Ny, 1), p.chunk);
  if (Ny == 0) p.chunks = 0;
  p.parts = (int)divide_up(p.tiles, divide_up(p.tiles, p.parts));  // no block without rows
  return p;
}

inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                            const std::optional<Tensor>& bias, const std::optional<Tensor>& index,
                            const std::optional<Tensor>& mask) {
  check_device(q, "attention");
  check_device(k, "attention");
  check_device(v, "attention");
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "attention: q, k and v must have 4 dimensions");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) &&
                      k.size(2) == q.size(2) && v.size(2) == q.size(2) && k.size(3) == q.size(3),
                  "attention: q, k and v do not fit");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "attention: dtypes differ");
  STD_TORCH_CHECK(q.size(3) <= kLargestHead && v.size(3) <= kLargestHead,
                  "attention: the CUDA kernels take head sizes up to ", kLargestHead, ", got ",
                  q.size(3), " and ", v.size(3));
  STD_TORCH_CHECK(
      q.size(1) < 1 << 24 && k.size(1) < 1 << 24 && q.size(0) < 1 << 30 && q.size(2) < 1 << 30,
      "attention: too many tokens");
  const int64_t sizes[4] = {q.size(0), q.size(2), q.size(1), k.size(1)};
  if (index.has_value()) {
    STD_TORCH_CHECK(
        bias.has_value() && bias->dim() == 2 && bias->size(0) == sizes[1] && index->dim() == 2 &&
            index->size(0) == sizes[2] && index->size(1) == sizes[3] && bias->size(1) < 1 << 30 &&
            (index->scalar_type() == ScalarType::Long || index->scalar_type() == ScalarType::Int),
        "attention: bias table and index do not fit");
    check_device(*index, "attention");
  } else if (bias.has_value()) {
    bool fits = bias->dim() == 4;
    for (int d = 0; d < 4 && fits; ++d) fits = bias->size(d) == 1 || bias->size(d) == sizes[d];
    STD_TORCH_CHECK(fits, "attention: bias does not broadcast to the scores");
  }
  if (bias.has_value()) {
    check_device(*bias, "attention");
    STD_TORCH_CHECK(bias->scalar_type() == q.scalar_type(), "attention: bias must have q's dtype");
  }
  if (mask.has_value()) {
    check_device(*mask, "attention");
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 &&
                        mask->size(0) == sizes[0] && mask->size(1) == sizes[3],
                    "attention: key_padding_mask does not fit");
  }
}

// Calls f with the least of 2, 4 and 8 tiles of 16 that hold D.
template <class F>
void for_width(int64_t D, F f) {
  if (D <= 32) return f(std::integral_constant<int, 2>{});
  if (D <= 64) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}

}  // namespace hybridops::cuda
