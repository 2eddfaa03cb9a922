// hybridops_cuda::attention: softmax(scale q k^T + bias) v; hybridops/ops/attention.py has the
// meaning.
//
// A block holds whole heads: keys and values lie in shared memory once, its warps take 16 queries
// each until all are done. Where a head does not fit, keys pass through in chunks, and a block
// takes one round of queries. The softmax runs over blocks of 32 keys with a running maximum, so
// scores never leave registers whatever the number of keys. Bias is read where it lies, a table
// through its index.
//
// The backward is one kernel of two kinds of blocks: 16 queries a warp give dq (and dbias), 16 keys
// a warp give dk and dv, both from scores computed anew. So every gradient is summed in registers
// in a fixed order: no atomics, no dq in memory twice. It costs two products of seven; up to about
// 320 keys the memory is what takes the time.
#include "common.cuh"
#include "tile.cuh"

namespace hybridops::cuda {
namespace {

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
  for (int i = who; i < count; i += step) {
    const int j = first + i;
    const bool closed = j >= Nk || (padding && padding.load(b * Nk + j));
    mask.store(i, closed ? -INFINITY : 0.0f);
  }
}

template <class T, int kWide>  // kWide: tiles of 16 that Dv takes at most
__global__ void __launch_bounds__(kMostWarps* kWarp)
    attention_forward_kernel(Heads<T> q, Heads<T> k, Heads<T> v, Bias<T> bias, Global<T> out,
                             Global<float> lse, Plan p, int activation) {
  const int warp = thread_index() / kWarp, lane = lane_index(), g = lane / 4, t = lane % 4;
  const int ld = p.row + kSkew<T>, ldv = p.row_v + kSkew<T>;
  SharedMemory memory;
  const Shared<T> keys = memory.take<T>(p.heads * p.chunk * ld);
  const Shared<T> values = memory.take<T>(p.heads * p.chunk * ldv);
  const Shared<float> masks = memory.take<float>(p.heads * p.chunk);
  const Shared<T> queries = memory.take<T>(p.warps * kTile * ld) + warp * kTile * ld;

  const int64_t first_head = block_index() / p.parts * p.heads, all_heads = (int64_t)p.B * p.H;
  const int heads = (int)(all_heads - first_head < p.heads ? all_heads - first_head : p.heads);
  const int per_part = (p.tiles + p.parts - 1) / p.parts;
  const int first_tile = (int)(block_index() % p.parts) * per_part;
  const int tiles = p.tiles - first_tile < per_part ? p.tiles - first_tile : per_part;
  const int rounds = (heads * tiles + p.warps - 1) / p.warps;

  for (int round = 0; round < rounds; ++round) {
    const int item = round * p.warps + warp;
    const bool active = item < heads * tiles;
    const int head = active ? item / tiles : 0;
    const int first = active ? (first_tile + item % tiles) * kTile : 0;
    const int64_t b = (first_head + head) / p.H;
    const int h = (int)((first_head + head) % p.H);
    float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, o[2 * kWide][4] = {};
    if (active) {
      warp_barrier();  // the last round's queries have been read
      stage(queries, ld, q.at(b, h, first), q.stride_n, q.stride_d, p.Nq - first, p.D, kTile, p.row,
            q.whole, lane, kWarp);
      copy_commit();
      copy_wait<0>();
      warp_barrier();
    }
    for (int c = 0; c < p.chunks; ++c) {
      const int left = p.Nk - c * p.chunk, here = left < p.chunk ? left : p.chunk;
      const int padded = (here + kTile - 1) / kTile * kTile;
      if (p.chunks > 1 || round == 0) {
        block_barrier();
        for (int n = 0; n < heads; ++n) {
          const int64_t nb = (first_head + n) / p.H;
          const int nh = (int)((first_head + n) % p.H);
          stage(keys + n * p.chunk * ld, ld, k.at(nb, nh, c * p.chunk), k.stride_n, k.stride_d,
                here, p.D, padded, p.row, k.whole, thread_index(), thread_count());
          stage(values + n * p.chunk * ldv, ldv, v.at(nb, nh, c * p.chunk), v.stride_n, v.stride_d,
                here, p.Dv, padded, p.row_v, v.whole, thread_index(), thread_count());
          stage_mask(masks + n * p.chunk, bias.padding, nb, p.Nk, c * p.chunk, padded,
                     thread_index(), thread_count());
        }
        copy_commit();
        copy_wait<0>();
        block_barrier();
      }
      if (!active) continue;
      const Shared<T> key = keys + head * p.chunk * ld, value = values + head * p.chunk * ldv;
      const Shared<float> mask = masks + head * p.chunk;
      for (int j0 = 0; j0 < padded; j0 += 32) {
        if (!any_open(mask, j0, padded)) continue;
        float s[4][4] = {};
        for (int d = 0; d < p.row; d += 16) {
          Left<T> a;
          load(a, queries + d, ld);
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            if (j0 + 16 * pair >= padded) continue;
            Right<T> right;
            load(right, key + ((j0 + 16 * pair) * ld + d), ld);
            multiply(s[2 * pair], s[2 * pair + 1], a, right);
          }
        }
        float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = first + g + e / 2 * 8, j = j0 + 8 * n + 2 * t + e % 2;
            float& score = s[n][e];
            const bool open = j < padded && mask.load(j) == 0.0f;
            score = !open ? -INFINITY
                          : fmaf(score, p.scale,
                                 i < p.Nq ? bias.at(b, h, i, c * p.chunk + j, p.Nk) : 0.0f);
            top[e / 2] = fmaxf(top[e / 2], score);
          }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float before = highest[r];
          highest[r] = fmaxf(before, max_over<4>(top[r]));
          const float zero = highest[r] == -INFINITY ? 0.0f : highest[r];  // nothing open yet
          const float shrink = exponential<T>(before - zero);
          sum[r] *= shrink;
#pragma unroll
          for (int n = 0; n < 2 * kWide; ++n) {
            o[n][2 * r] *= shrink;
            o[n][2 * r + 1] *= shrink;
          }
#pragma unroll
          for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int e = 2 * r; e < 2 * r + 2; ++e) {
              s[n][e] = exponential<T>(s[n][e] - zero);
              sum[r] += s[n][e];
            }
        }
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          if (j0 + 16 * pair >= padded) continue;
          Left<T> a;
          to_left(a, s[2 * pair], s[2 * pair + 1]);
#pragma unroll
          for (int n = 0; n < kWide; ++n) {
            if (16 * n >= p.row_v) continue;
            Right<T> right;
            load_transposed(right, value + ((j0 + 16 * pair) * ldv + 16 * n), ldv);
            multiply(o[2 * n], o[2 * n + 1], a, right);
          }
        }
      }
    }
    if (!active) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = first + g + 8 * r;
      const float all = sum_over<4>(sum[r]);
      const float inverse = all == 0.0f ? 0.0f : 1.0f / all;  // no key at all: zeros, as in torch
      if (i >= p.Nq) continue;
      const int64_t row = ((b * p.Nq + i) * p.H + h) * p.Dv;
#pragma unroll
      for (int n = 0; n < 2 * kWide; ++n)
        store_pair(out, row, 8 * n + 2 * t, p.Dv, activate(o[n][2 * r] * inverse, activation),
                   activate(o[n][2 * r + 1] * inverse, activation));
      if (t == 0) lse.store((b * p.H + h) * p.Nq + i, highest[r] + logf(all));
    }
  }
}

// What the backward adds to a Plan: blocks of queries come first, then blocks of keys.
struct BackwardPlan {
  Plan queries, keys;
  int64_t query_blocks;
  int images;  // that a block of queries takes one after the other, adding up dbias; 1 without
};

// A warp's 16 rows against all columns: rows are queries and columns keys, or the other way round.
// x1, x2 are q, dy (or k, v) of the rows, y1, y2 k, v (or q, dy) of the columns.
template <class T, int kWide, bool kKeys>
HYBRIDOPS_DEVICE void backward_block(const Heads<T>& x1, const Heads<T>& x2, const Heads<T>& y1,
                                     const Heads<T>& y2, const Heads<T>& out, const Bias<T>& bias,
                                     Global<const float> lse, Global<T> dx1, Global<T> dx2,
                                     Global<float> dbias, const Plan& p, int64_t block,
                                     int images) {
  constexpr int kPairs = kWide == 8 ? 1 : 2;  // columns at a time, by 16
  const int warp = thread_index() / kWarp, lane = lane_index(), g = lane / 4, t = lane % 4;
  const int ld = p.row + kSkew<T>, ldv = p.row_v + kSkew<T>;
  const int Nx = kKeys ? p.Nk : p.Nq, Ny = kKeys ? p.Nq : p.Nk;
  SharedMemory memory;
  const Shared<T> ys1 = memory.take<T>(p.heads * p.chunk * ld);
  const Shared<T> ys2 = memory.take<T>(p.heads * p.chunk * ldv);
  const Shared<float> ys_shift = memory.take<float>(p.heads * p.chunk);  // mask, or -lse
  const Shared<float> ys_delta = memory.take<float>(p.heads * p.chunk);
  const Shared<T> xs1 = memory.take<T>(p.warps * kTile * ld) + warp * kTile * ld;
  const Shared<T> xs2 = memory.take<T>(p.warps * kTile * ldv) + warp * kTile * ldv;
  const Shared<float> xs_shift = memory.take<float>(p.warps * kTile) + warp * kTile;
  const Shared<float> xs_delta = memory.take<float>(p.warps * kTile) + warp * kTile;

  // delta = sum(dy * out) of query i, by a warp
  const auto sum_of_products = [&](int64_t b, int h, int64_t i, Shared<T> dy) {
    float sum = 0.0f;
    for (int c = lane; c < p.Dv; c += kWarp)
      sum = fmaf(to_float(dy.load(c)), to_float(out.at(b, h, i).load(c * out.stride_d)), sum);
    return sum_over<kWarp>(sum);
  };
  // -lse, so that p = exp(score + shift); -inf for a query without keys, or none at all
  const auto shift_of = [&](int64_t b, int h, int i) {
    const float all = i < p.Nq ? lse.load((b * p.H + h) * p.Nq + i) : -INFINITY;
    return all == -INFINITY ? -INFINITY : -all;
  };

  const int64_t all_heads = (int64_t)p.B * p.H;
  const int per_part = (p.tiles + p.parts - 1) / p.parts;
  const int first_tile = (int)(block % p.parts) * per_part;
  const int tiles = p.tiles - first_tile < per_part ? p.tiles - first_tile : per_part;
  for (int image = 0; image < images; ++image) {
    int64_t first_head = block / p.parts * p.heads;
    if (images > 1 || dbias) {  // one head of several images
      const int64_t slice = block / p.parts / p.H;
      const int64_t b = slice * images + image;
      if (b >= p.B) break;
      first_head = b * p.H + block / p.parts % p.H;
    }
    const int heads = (int)(all_heads - first_head < p.heads ? all_heads - first_head : p.heads);
    const int rounds = (heads * tiles + p.warps - 1) / p.warps;
    for (int round = 0; round < rounds; ++round) {
      const int item = round * p.warps + warp;
      const bool active = item < heads * tiles;
      const int head = active ? item / tiles : 0;
      const int first = active ? (first_tile + item % tiles) * kTile : 0;
      const int64_t b = (first_head + head) / p.H;
      const int h = (int)((first_head + head) % p.H);
      float d1[2 * kWide][4] = {}, d2[kKeys ? 2 * kWide : 1][4] = {};
      float shift[2] = {}, delta[2] = {};
      bool open_rows = active;
      if (active) {
        warp_barrier();
        stage(xs1, ld, x1.at(b, h, first), x1.stride_n, x1.stride_d, Nx - first, p.D, kTile, p.row,
              x1.whole, lane, kWarp);
        stage(xs2, ldv, x2.at(b, h, first), x2.stride_n, x2.stride_d, Nx - first, p.Dv, kTile,
              p.row_v, x2.whole, lane, kWarp);
        copy_commit();
        copy_wait<0>();
        if constexpr (kKeys) {
          stage_mask(xs_shift, bias.padding, b, p.Nk, first, kTile, lane, kWarp);
          warp_barrier();
          open_rows = any_open(xs_shift, 0, kTile);
        } else {
          warp_barrier();
          for (int r = 0; r < kTile; ++r) {
            const float sum =
                first + r < p.Nq ? sum_of_products(b, h, first + r, xs2 + r * ldv) : 0.0f;
            if (lane == 0) {
              xs_delta.store(r, sum);
              xs_shift.store(r, shift_of(b, h, first + r));
            }
          }
          warp_barrier();
        }
        for (int r = 0; r < 2; ++r) {
          shift[r] = xs_shift.load(g + 8 * r);
          if (!kKeys) delta[r] = xs_delta.load(g + 8 * r);
        }
      }
      // dbias in fp32: a first pass takes delta from the very probabilities it is subtracted from,
      // or the error of lse, the same along a row, adds up over the rows that share a bias.
      const int passes = !kKeys && sizeof(T) == 4 && dbias ? 2 : 1;
      float weighted[2] = {}, mass[2] = {};
      for (int pass_and_chunk = 0; pass_and_chunk < passes * p.chunks; ++pass_and_chunk) {
        const int c = pass_and_chunk % p.chunks;
        const bool only_delta = pass_and_chunk < (passes - 1) * p.chunks;
        const int left = Ny - c * p.chunk, here = left < p.chunk ? left : p.chunk;
        const int padded = (here + kTile - 1) / kTile * kTile;
        if (p.chunks > 1 || round + pass_and_chunk == 0) {
          block_barrier();
          for (int n = 0; n < heads; ++n) {
            const int64_t nb = (first_head + n) / p.H;
            const int nh = (int)((first_head + n) % p.H);
            stage(ys1 + n * p.chunk * ld, ld, y1.at(nb, nh, c * p.chunk), y1.stride_n, y1.stride_d,
                  here, p.D, padded, p.row, y1.whole, thread_index(), thread_count());
            stage(ys2 + n * p.chunk * ldv, ldv, y2.at(nb, nh, c * p.chunk), y2.stride_n,
                  y2.stride_d, here, p.Dv, padded, p.row_v, y2.whole, thread_index(),
                  thread_count());
            if constexpr (!kKeys)
              stage_mask(ys_shift + n * p.chunk, bias.padding, nb, p.Nk, c * p.chunk, padded,
                         thread_index(), thread_count());
          }
          copy_commit();
          copy_wait<0>();
          block_barrier();
          if constexpr (kKeys) {
            for (int n = 0; n < heads; ++n) {
              const int64_t nb = (first_head + n) / p.H;
              const int nh = (int)((first_head + n) % p.H);
              for (int y = warp; y < padded; y += p.warps) {
                const int i = c * p.chunk + y;
                const float sum =
                    i < p.Nq ? sum_of_products(nb, nh, i, ys2 + (n * p.chunk + y) * ldv) : 0.0f;
                if (lane == 0) {
                  ys_delta.store(n * p.chunk + y, sum);
                  ys_shift.store(n * p.chunk + y, shift_of(nb, nh, i));
                }
              }
            }
            block_barrier();
          }
        }
        if (!open_rows) continue;
        if (passes == 2 && pass_and_chunk == p.chunks) {
          for (int r = 0; r < 2; ++r) {
            const float all = sum_over<4>(mass[r]);
            delta[r] = sum_over<4>(weighted[r]) / (all == 0.0f ? 1.0f : all);
          }
        }
        const int offset = head * p.chunk;
        for (int y0 = 0; y0 < padded; y0 += 16 * kPairs) {
          if (!kKeys && !dbias &&
              !any_open(ys_shift + offset, y0,
                        padded < y0 + 16 * kPairs ? padded : y0 + 16 * kPairs))
            continue;
          float s[2 * kPairs][4] = {}, dp[2 * kPairs][4] = {};
          for (int d = 0; d < p.row; d += 16) {
            Left<T> a;
            load(a, xs1 + d, ld);
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
              if (y0 + 16 * pair >= padded) continue;
              Right<T> right;
              load(right, ys1 + ((offset + y0 + 16 * pair) * ld + d), ld);
              multiply(s[2 * pair], s[2 * pair + 1], a, right);
            }
          }
          for (int d = 0; d < p.row_v; d += 16) {
            Left<T> a;
            load(a, xs2 + d, ldv);
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
              if (y0 + 16 * pair >= padded) continue;
              Right<T> right;
              load(right, ys2 + ((offset + y0 + 16 * pair) * ldv + d), ldv);
              multiply(dp[2 * pair], dp[2 * pair + 1], a, right);
            }
          }
#pragma unroll
          for (int n = 0; n < 2 * kPairs; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int x = first + g + e / 2 * 8, y_here = y0 + 8 * n + 2 * t + e % 2;
              const int y = c * p.chunk + y_here, i = kKeys ? y : x, j = kKeys ? x : y;
              const bool exists = y_here < padded && i < p.Nq && j < p.Nk;
              const float of_y = exists ? ys_shift.load(offset + y_here) : 0.0f;
              const float of_delta =
                  kKeys ? exists ? ys_delta.load(offset + y_here) : 0.0f : delta[e / 2];
              // one of the two is the mask and the other -lse; -inf closes either
              const bool open = exists && of_y != -INFINITY && shift[e / 2] != -INFINITY;
              float probability = 0.0f;
              if (open)
                probability = exponential<T>(fmaf(s[n][e], p.scale, bias.at(b, h, i, j, p.Nk)) +
                                             (kKeys ? of_y : shift[e / 2]));
              if (only_delta) {
                weighted[e / 2] = fmaf(probability, dp[n][e], weighted[e / 2]);
                mass[e / 2] += probability;
                continue;
              }
              s[n][e] = probability;
              dp[n][e] = open ? probability * (dp[n][e] - of_delta) : 0.0f;
              if (!kKeys && dbias && exists) {
                const int64_t slice = block / p.parts / p.H;
                const int64_t place = ((slice * p.H + h) * p.Nq + i) * p.Nk + j;
                dbias.store(place, image ? dbias.load(place) + dp[n][e] : dp[n][e]);
              }
            }
          if (only_delta) continue;
#pragma unroll
          for (int pair = 0; pair < kPairs; ++pair) {
            if (y0 + 16 * pair >= padded) continue;
            const int row = offset + y0 + 16 * pair;
            Left<T> a;
            Right<T> right;
            to_left(a, dp[2 * pair], dp[2 * pair + 1]);
#pragma unroll
            for (int n = 0; n < kWide; ++n) {
              if (16 * n >= p.row) continue;
              load_transposed(right, ys1 + (row * ld + 16 * n), ld);
              multiply(d1[2 * n], d1[2 * n + 1], a, right);
            }
            if constexpr (kKeys) {
              to_left(a, s[2 * pair], s[2 * pair + 1]);
#pragma unroll
              for (int n = 0; n < kWide; ++n) {
                if (16 * n >= p.row_v) continue;
                load_transposed(right, ys2 + (row * ldv + 16 * n), ldv);
                multiply(d2[2 * n], d2[2 * n + 1], a, right);
              }
            }
          }
        }
      }
      if (!active) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int x = first + g + 8 * r;
        if (x >= Nx) continue;
        const int64_t row = (b * Nx + x) * p.H + h;
#pragma unroll
        for (int n = 0; n < 2 * kWide; ++n) {
          store_pair(dx1, row * p.D, 8 * n + 2 * t, p.D, d1[n][2 * r] * p.scale,
                     d1[n][2 * r + 1] * p.scale);
          if constexpr (kKeys)
            store_pair(dx2, row * p.Dv, 8 * n + 2 * t, p.Dv, d2[n][2 * r], d2[n][2 * r + 1]);
        }
      }
    }
  }
}

// dbias: partial sums (slices of images, H, Nq, Nk), or null.
template <class T, int kWide>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1)
    attention_backward_kernel(Heads<T> q, Heads<T> k, Heads<T> v, Heads<T> dy, Heads<T> out,
                              Bias<T> bias, Global<const float> lse, Global<T> dq, Global<T> dk,
                              Global<T> dv, Global<float> dbias, BackwardPlan plan) {
  const int64_t block = block_index();
  if (block < plan.query_blocks)
    backward_block<T, kWide, false>(q, dy, k, v, out, bias, lse, dq, Global<T>{}, dbias,
                                    plan.queries, block, plan.images);
  else
    backward_block<T, kWide, true>(k, v, q, dy, out, bias, lse, dk, dv, Global<float>{}, plan.keys,
                                   block - plan.query_blocks, 1);
}

// Sums of partial (slices, H, Nq, Nk) over the dimensions where kept is 1, one warp a number.
struct Reduction {
  int sizes[4], kept[4];
};
__global__ void __launch_bounds__(kMostWarps* kWarp)
    sum_kernel(Global<const float> partial, Global<float> sums, Reduction r, int64_t outputs) {
  const int64_t o = block_index() * (thread_count() / kWarp) + thread_index() / kWarp;
  if (o >= outputs) return;
  int64_t rest = o, start = 0, stride = 1, lengths[4], strides[4];
  for (int d = 3; d >= 0; --d) {
    start += rest % r.kept[d] * stride;
    rest /= r.kept[d];
    lengths[d] = r.sizes[d] / r.kept[d];
    strides[d] = stride;
    stride *= r.sizes[d];
  }
  const int64_t count = lengths[0] * lengths[1] * lengths[2] * lengths[3];
  float sum = 0.0f;
  for (int64_t i = lane_index(); i < count; i += kWarp) {
    int64_t left = i, place = start;
    for (int d = 3; d >= 0; --d) {
      place += left % lengths[d] * strides[d];
      left /= lengths[d];
    }
    sum += partial.load(place);
  }
  sum = sum_over<kWarp>(sum);
  if (lane_index() == 0) sums.store(o, sum);
}

// The gradient of table entries by rows of queries: sums (rows, H, T) from dense (H, Nq, Nk). Each
// thread looks for its entry among all indices of the row.
constexpr int kTableThreads = 256;
__global__ void __launch_bounds__(kTableThreads)
    table_kernel(Global<const float> dense, Global<const int64_t> wide,
                 Global<const int32_t> narrow, Global<float> sums, int H, int Nq, int Nk,
                 int size) {
  const int pieces = (size + kTableThreads - 1) / kTableThreads;
  const int piece = (int)(block_index() % pieces), h = (int)(block_index() / pieces % H);
  const int i = (int)(block_index() / pieces / H);
  const int entry = piece * kTableThreads + thread_index();
  SharedMemory memory;
  const Shared<float> values = memory.take<float>(kTableThreads);
  const Shared<int32_t> entries = memory.take<int32_t>(kTableThreads);
  float sum = 0.0f;
  for (int j0 = 0; j0 < Nk; j0 += kTableThreads) {
    const int j = j0 + thread_index();
    block_barrier();
    if (j < Nk) {
      const int64_t place = (int64_t)i * Nk + j;
      values.store(thread_index(), dense.load((int64_t)h * Nq * Nk + place));
      entries.store(thread_index(), wide ? (int32_t)wide.load(place) : narrow.load(place));
    }
    block_barrier();
    const int count = Nk - j0 < kTableThreads ? Nk - j0 : kTableThreads;
    for (int n = 0; n < count && entry < size; ++n)
      if (entries.load(n) == entry) sum += values.load(n);
  }
  if (entry < size) sums.store(((int64_t)i * H + h) * size + entry, sum);
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

void check(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& index, const std::optional<Tensor>& mask) {
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

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                     std::optional<Tensor> index, std::optional<Tensor> mask,
                                     double scale, int64_t activation) {
  check(q, k, v, bias, index, mask);
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), Nk = k.size(1), Dv = v.size(3);
  Tensor out = empty(q, {B, Nq, H, Dv}, q.scalar_type());
  Tensor lse = empty(q, {B, H, Nq}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const Device device(q);
  index = contiguous(index);
  mask = contiguous(mask);
  for_type(q, "attention", [&](auto type) {
    using T = decltype(type);
    for_width(Dv, [&](auto width) {
      const Plan p = plan_of<T>(device, q, v, Nq, Nk, scale, false, false);
      device.launch(attention_forward_kernel<T, width.value>, divide_up(B * H, p.heads) * p.parts,
                    p.warps * kWarp, bytes_of<T>(p, false), heads_of<T>(q), heads_of<T>(k),
                    heads_of<T>(v), bias_of<T>(bias, index, mask), memory_of<T>(out),
                    memory_of<float>(lse), p, (int)activation);
    });
  });
  return {out, lse};
}

// dbias (like bias, fp32) from partial (slices, H, Nq, Nk).
Tensor reduce_bias(const Device& device, const Tensor& partial, const Tensor& bias,
                   const std::optional<Tensor>& index) {
  const auto sum = [&](const Tensor& from, const std::vector<int64_t>& kept) {
    Tensor to = empty(from, kept, ScalarType::Float);
    Reduction r{};
    for (int d = 0; d < 4; ++d) {
      r.sizes[d] = (int)from.size(d);
      r.kept[d] = (int)kept[d];
    }
    if (to.numel() > 0)
      device.launch(sum_kernel, divide_up(to.numel(), kMostWarps), kMostWarps * kWarp, 0,
                    memory_of<const float>(from), memory_of<float>(to), r, to.numel());
    return to;
  };
  const int64_t H = partial.size(1), Nq = partial.size(2), Nk = partial.size(3);
  if (!index.has_value())
    return sum(partial, {bias.size(0), bias.size(1), bias.size(2), bias.size(3)});
  const int64_t size = bias.size(1);
  const Tensor dense = sum(partial, {1, H, Nq, Nk});
  const Tensor rows = empty(partial, {Nq, H, size, 1}, ScalarType::Float);
  const Bias<float> at = bias_of<float>(dense, index, std::nullopt);
  if (rows.numel() > 0)
    device.launch(table_kernel, Nq * H * divide_up(size, kTableThreads), kTableThreads,
                  shared_bytes<float>(kTableThreads) + shared_bytes<int32_t>(kTableThreads),
                  memory_of<const float>(dense), at.wide, at.narrow, memory_of<float>(rows), (int)H,
                  (int)Nq, (int)Nk, (int)size);
  return torch::stable::view(sum(rows, {1, H, size, 1}), {H, size});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(Tensor dy, Tensor q, Tensor k,
                                                              Tensor v, std::optional<Tensor> bias,
                                                              std::optional<Tensor> index,
                                                              std::optional<Tensor> mask,
                                                              Tensor out, Tensor lse, double scale,
                                                              bool needs_dbias) {
  check(q, k, v, bias, index, mask);
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), Nk = k.size(1), D = q.size(3),
                Dv = v.size(3);
  for (const Tensor* x : {&dy, &out})
    STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == B && x->size(1) == Nq && x->size(2) == H &&
                        x->size(3) == Dv && x->scalar_type() == q.scalar_type(),
                    "attention_backward: dy and out do not fit q and v");
  STD_TORCH_CHECK(lse.numel() == B * H * Nq && lse.scalar_type() == ScalarType::Float,
                  "attention_backward: lse does not fit q");
  STD_TORCH_CHECK(!needs_dbias || bias.has_value(), "attention_backward: dbias of no bias");
  Tensor dq = empty(q, {B, Nq, H, D}, q.scalar_type());
  Tensor dk = empty(q, {B, Nk, H, D}, q.scalar_type());
  Tensor dv = empty(q, {B, Nk, H, Dv}, q.scalar_type());
  Tensor dbias = empty(q, {0}, ScalarType::Float);
  const Device device(q);
  index = contiguous(index);
  mask = contiguous(mask);
  lse = torch::stable::contiguous(lse);
  std::optional<Tensor> partial;
  for_type(q, "attention_backward", [&](auto type) {
    using T = decltype(type);
    for_width(std::max(D, Dv), [&](auto width) {
      BackwardPlan plan{};
      plan.images = 1;
      const bool queries = B * H * Nq > 0, keys = B * H * Nk > 0;
      if (queries) plan.queries = plan_of<T>(device, q, v, Nq, Nk, scale, true, needs_dbias);
      if (keys) plan.keys = plan_of<T>(device, q, v, Nk, Nq, scale, true, false);
      int64_t groups = queries ? divide_up(B * H, plan.queries.heads) : 0, slices = 0;
      if (needs_dbias && queries) {
        const bool per_image = !index.has_value() && bias->size(0) > 1;
        const int64_t enough = divide_up(2 * device.processors(), H * plan.queries.parts);
        plan.images = per_image ? 1 : (int)divide_up(B, std::min(B, enough));
        slices = divide_up(B, plan.images);
        groups = slices * H;
      }
      if (needs_dbias) partial = empty(q, {slices, H, Nq, Nk}, ScalarType::Float);
      plan.query_blocks = queries ? groups * plan.queries.parts : 0;
      const int64_t key_blocks = keys ? divide_up(B * H, plan.keys.heads) * plan.keys.parts : 0;
      if (plan.query_blocks + key_blocks == 0) return;
      // one block size for both kinds
      const int warps = std::max(plan.queries.warps, plan.keys.warps);
      int64_t bytes = 0;
      for (Plan* p : {&plan.queries, &plan.keys}) {
        if (p->warps == 0) continue;
        p->warps = warps;
        while (p->chunk > kTile && bytes_of<T>(*p, true) > device.shared_limit()) p->chunk -= kTile;
        const int64_t columns = p == &plan.queries ? Nk : Nq;
        p->chunks = (int)divide_up(columns, p->chunk);
        bytes = std::max(bytes, bytes_of<T>(*p, true));
      }
      device.launch(attention_backward_kernel<T, width.value>, plan.query_blocks + key_blocks,
                    warps * kWarp, bytes, heads_of<T>(q), heads_of<T>(k), heads_of<T>(v),
                    heads_of<T>(dy), heads_of<T>(out), bias_of<T>(bias, index, mask),
                    memory_of<const float>(lse), memory_of<T>(dq), memory_of<T>(dk),
                    memory_of<T>(dv), memory_of<float>(partial), plan);
    });
  });
  if (needs_dbias) dbias = reduce_bias(device, *partial, *bias, index);
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace hybridops::cuda
