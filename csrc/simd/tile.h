// Register tiles: a few rows times a few vectors of columns, accumulated over K in registers.
//
// 4 x 24 on AVX2 and 8 x 48 on AVX-512 use 12 and 24 accumulators: enough independent chains to
// hide the FMA latency, few enough to leave registers for the operands. Measured on Zen 3, M 196, N
// 768, K 192: 4 x 24 101 GFLOP/s, 6 x 16 100, 5 x 16 97, 3 x 32 44 (spills).
#pragma once
#include "vec.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {

#define HYBRIDOPS_UNROLL _Pragma("GCC unroll 32")

constexpr int kPanel = 3;  // vectors in a full panel
template <int NV>
constexpr int kRows =
    kLanes == 16 ? 8 : (NV == 3 ? 4 : 6);  // narrow panels take more rows: same number of chains

// Panels of 3 vectors; a rest of 1 is shared out as 2 + 2, because a single-vector tile runs at
// half speed.
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t N)
      : vectors((N + kLanes - 1) / kLanes), count((vectors + kPanel - 1) / kPanel) {}
  int64_t offset(int64_t i) const {
    if (i == count) return vectors;
    return i + 1 == count && vectors % kPanel == 1 && vectors > 1 ? vectors - 2 : i * kPanel;
  }
  int width(int64_t i) const { return (int)(offset(i + 1) - offset(i)); }
};

template <int MR, int NV>
using Tile = Vec[MR][NV];

// Memory that will be needed soon, `stride` bytes of it with every product: comes into L2 while the
// arithmetic goes on. In one burst the same prefetches would stall it.
struct Ahead {
  const char* next = nullptr;
  int64_t stride = 0;
};

// tile += a[0..MR)[0..length) * b, b in rows of NV vectors. The loop is left to gcc to unroll,
// late: unrolled by hand, it loads each vector of b again for every row.
template <int MR, int NV>
HYBRIDOPS_INLINE void multiply(Tile<MR, NV>& tile, const float* const (&a)[MR], const float* b,
                               int64_t length, Ahead* ahead = nullptr) {
  const char* next = ahead ? ahead->next : nullptr;
  _Pragma("GCC unroll 4") for (int64_t k = 0; k < length; ++k, b += NV * kLanes) {
    if (ahead) {
      _mm_prefetch(next, _MM_HINT_T1);
      next += ahead->stride;
    }
    Vec right[NV];
    HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) right[v] = load(b + v * kLanes);
    HYBRIDOPS_UNROLL for (int m = 0; m < MR; ++m) {
      const Vec left = splat(a[m][k]);
      HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) tile[m][v] = fma(left, right[v], tile[m][v]);
    }
  }
  if (ahead) ahead->next = next;
}

// The same with a given transposed: a[k * stride + m]
template <int MR, int NV>
HYBRIDOPS_INLINE void multiply_transposed(Tile<MR, NV>& tile, const float* a, int64_t stride,
                                          const float* b, int64_t length) {
  for (int64_t k = 0; k < length; ++k, a += stride, b += NV * kLanes) {
    Vec right[NV];
    HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) right[v] = load(b + v * kLanes);
    HYBRIDOPS_UNROLL for (int m = 0; m < MR; ++m) {
      const Vec left = splat(a[m]);
      HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) tile[m][v] = fma(left, right[v], tile[m][v]);
    }
  }
}

// Long sums in two levels: after every `run` products the tile moves to memory and starts again
// from zero, so that rounding errors grow with sqrt(run) instead of sqrt(K). Costs 2 % at 128;
// torch's own products do no worse, but its matrix-vector products sum in many short chains. What a
// whole product takes must not depend on a tile's rows: those follow from the number of threads.
constexpr int64_t chain_length(bool few_rows) { return few_rows ? 32 : 128; }

template <int MR, int NV>
class Totals {
 public:
  explicit Totals(int64_t run) : run_(run) {}
  // How many of `left` products may follow before the tile must move.
  HYBRIDOPS_INLINE int64_t room(Tile<MR, NV>& tile, int64_t left) {
    if (done_ + (left < run_ ? left : 1) > run_) move(tile);
    const int64_t length = left < run_ - done_ ? left : run_ - done_;
    done_ += length;
    return length;
  }
  HYBRIDOPS_INLINE void collect(Tile<MR, NV>& tile) {
    if (!moved_) return;
    HYBRIDOPS_UNROLL for (int i = 0; i < MR * NV; ++i) tile[i / NV][i % NV] +=
        load(sums_ + i * kLanes);
  }

 private:
  HYBRIDOPS_INLINE void move(Tile<MR, NV>& tile) {
    HYBRIDOPS_UNROLL for (int i = 0; i < MR * NV; ++i) {
      const Vec before = moved_ ? load(sums_ + i * kLanes) : Vec{};
      store(sums_ + i * kLanes, before + tile[i / NV][i % NV]);
      tile[i / NV][i % NV] = Vec{};
    }
    asm volatile("" : : "r"(sums_) : "memory");  // in memory, not in registers that the tile needs
    moved_ = true;
    done_ = 0;
  }
  alignas(64) float sums_[MR * NV * kLanes];
  const int64_t run_;
  int64_t done_ = 0;
  bool moved_ = false;
};

// Calls f.template operator()<MR, NV>(m) over rows [begin, end) in tiles of a panel that is `width`
// vectors wide.
template <int NV, class F>
HYBRIDOPS_INLINE void for_rows(int64_t begin, int64_t end, const F& f) {
  constexpr int MR = kRows<NV>;
  int64_t m = begin;
  for (; m + MR <= end; m += MR) f.template operator()<MR, NV>(m);
  switch (end - m) {
    case 1:
      return f.template operator()<1, NV>(m);
    case 2:
      return f.template operator()<2, NV>(m);
    case 3:
      return f.template operator()<3, NV>(m);
    case 4:
      return f.template operator()<4, NV>(m);
    case 5:
      return f.template operator()<5, NV>(m);
    case 6:
      return f.template operator()<6, NV>(m);
    case 7:
      return f.template operator()<7, NV>(m);
    default:
      return;
  }
}
template <class F>
HYBRIDOPS_INLINE void for_tiles(int width, int64_t begin, int64_t end, const F& f) {
  if (width == 3) return for_rows<3>(begin, end, f);
  if (width == 2) return for_rows<2>(begin, end, f);
  for_rows<1>(begin, end, f);
}

}  // namespace HYBRIDOPS_SIMD
}  // namespace hybridops::simd
