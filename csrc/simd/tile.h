// Register tiles: a few rows times a few vectors of columns, accumulated over K in registers.
//
// 4 x 24 on AVX2 and 8 x 48 on AVX-512 use 12 and 24 accumulators: enough independent chains to
// hide the FMA latency, few enough to leave registers for the operands. Measured on Zen 3, M 196, N
// 768, K 192: 4 x 24 101 GFLOP/s, 6 x 16 100, 5 x 16 97, 3 x 32 44 (spills).
#pragma once
#include "product.h"
#include "vec.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {

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

// Memory that will be needed soon, `stride` bytes of it with every step of K: comes into L2 while
// the arithmetic goes on. In one burst the same prefetches would stall it.
struct Ahead {
  const char* next = nullptr;
  int64_t stride = 0;

  template <int NV>  // few rows: up to a row of the panel, NV lines, with every step
  HYBRIDOPS_INLINE void fetch() {
    _mm_prefetch(next, _MM_HINT_T1);
    if (stride > 64)
      HYBRIDOPS_UNROLL for (int v = 1; v < NV; ++v) _mm_prefetch(next + 64 * v, _MM_HINT_T1);
    next += stride;
  }
};

// How a kind of numbers is multiplied. A slot of a panel is 32 bits: one fp32 number, or two bf16
// numbers that follow one another in K.
template <class E>
struct Element;

template <>
struct Element<float> {
  static constexpr int64_t kPerSlot = 1;
  using Slots = Vec;
  static HYBRIDOPS_INLINE Slots left(const float* a) { return splat(*a); }
  static HYBRIDOPS_INLINE Slots right(const float* b) { return load(b); }
  static HYBRIDOPS_INLINE Vec add(Slots a, Slots b, Vec sum) { return fma(a, b, sum); }
};

#if HYBRIDOPS_LANES == 16
template <>
struct Element<BFloat16> {
  static constexpr int64_t kPerSlot = 2;
  using Slots = VecInt;
  static HYBRIDOPS_INLINE Slots left(const BFloat16* a) {
    float pair;
    std::memcpy(&pair, a, sizeof pair);
    return (VecInt)splat(pair);
  }
  static HYBRIDOPS_INLINE Slots half(const BFloat16* a) { return VecInt{} + (int32_t)*a; }
  static HYBRIDOPS_INLINE Slots right(const float* b) { return (VecInt)load(b); }
  static HYBRIDOPS_INLINE Vec add(Slots a, Slots b, Vec sum) { return dot(a, b, sum); }
};
#endif

// Slots that `length` numbers take.
template <class E>
constexpr int64_t slots(int64_t length) {
  return (length + Element<E>::kPerSlot - 1) / Element<E>::kPerSlot;
}
inline int64_t slots(const Depth& K) {
  return K.runs * (K.type == Type::kBFloat16 ? (K.length + 1) / 2 : K.length);
}

// f(float{}), or f(BFloat16{}) where the ISA multiplies bf16.
template <class F>
HYBRIDOPS_INLINE void with_element(bool bf16, const F& f) {
  if constexpr (kBf16Products)
    if (bf16) return f(BFloat16{});
  f(float{});
}

// tile += a[0..MR)[0..length) * b, b in rows of NV vectors of slots. The loop is left to gcc to
// unroll, late: unrolled by hand, it loads each vector of b again for every row.
template <class E, int MR, int NV>
HYBRIDOPS_INLINE void multiply(Tile<MR, NV>& tile, const E* const (&a)[MR], const float* b,
                               int64_t length, Ahead* ahead = nullptr) {
  using X = Element<E>;
  Ahead fetching = ahead ? *ahead : Ahead{};
  const int64_t slots = length / X::kPerSlot;
  _Pragma("GCC unroll 4") for (int64_t k = 0; k < slots; ++k, b += NV * kLanes) {
    if (ahead) fetching.template fetch<NV>();
    typename X::Slots right[NV];
    HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) right[v] = X::right(b + v * kLanes);
    HYBRIDOPS_UNROLL for (int m = 0; m < MR; ++m) {
      const auto left = X::left(a[m] + k * X::kPerSlot);
      HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) tile[m][v] = X::add(left, right[v], tile[m][v]);
    }
  }
  if constexpr (X::kPerSlot == 2)
    if (length % 2) {  // what lies behind the last number is not read: it may be NaN
      HYBRIDOPS_UNROLL for (int m = 0; m < MR; ++m) {
        const auto left = X::half(a[m] + length - 1);
        HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) tile[m][v] =
            X::add(left, X::right(b + v * kLanes), tile[m][v]);
      }
    }
  if (ahead) ahead->next = fetching.next;
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

// Long sums in two levels: the tile's sums of a chain of products move to memory, and the next
// chain starts from zero, so that rounding errors grow with sqrt(chain) instead of sqrt(K). A move
// costs 18 cycles, 2 % of a chain; torch's own products do no better, but its matrix-vector
// products sum in many short chains. What a chain takes must not depend on a tile's rows: those
// follow from the number of threads. A convolution (several runs) has longer chains than a plain
// product: torch's own, oneDNN's, are less exact by more than that. bf16 numbers need no such care:
// their own rounding is 2^15 times larger than a sum's.
struct Chain {
  int64_t piece, pieces;  // a run is multiplied in equal pieces, of which so many are a chain
};
template <class E>
Chain chain_of(int64_t run, bool few_rows, int64_t runs = 1) {
  if (Element<E>::kPerSlot == 2) return {run, INT64_MAX};
  const int64_t longest = few_rows ? 32 : runs > 1 ? 192 : 128;
  if (run <= longest) return {run, longest / (run ? run : 1)};
  const int64_t parts = (run + longest - 1) / longest;
  return {(run + parts - 1) / parts, 1};
}

// `sums` lie outside, so that the compiler may keep what is here in registers.
template <int MR, int NV>
class Totals {
 public:
  static constexpr int kNumbers = MR * NV * kLanes;
  Totals(int64_t pieces, float* sums) : pieces_(pieces), left_(pieces), sums_(sums) {}
  // In front of each piece, of which `pieces` are a chain.
  HYBRIDOPS_INLINE void next(Tile<MR, NV>& tile) {
    if (left_ == 0) move(tile);
    --left_;
  }
  HYBRIDOPS_INLINE void collect(Tile<MR, NV>& tile) const {
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
    left_ = pieces_;
  }
  const int64_t pieces_;
  int64_t left_;
  float* const sums_;
  bool moved_ = false;
};

// `count` tiles of `height` rows from row m on.
template <int NV, class F>
HYBRIDOPS_INLINE void for_equal(int64_t height, int64_t count, int64_t m, const F& f) {
#define HYBRIDOPS_HEIGHT(H)                                               \
  case H:                                                                 \
    if constexpr (H <= kRows<NV>) f.template operator()<H, NV>(m, count); \
    return
  if (count == 0) return;
  switch (height) {
    HYBRIDOPS_HEIGHT(1);
    HYBRIDOPS_HEIGHT(2);
    HYBRIDOPS_HEIGHT(3);
    HYBRIDOPS_HEIGHT(4);
    HYBRIDOPS_HEIGHT(5);
    HYBRIDOPS_HEIGHT(6);
    HYBRIDOPS_HEIGHT(7);
    HYBRIDOPS_HEIGHT(8);
  }
#undef HYBRIDOPS_HEIGHT
}

// Calls f.template operator()<MR, NV>(m, count), for `count` tiles from row m on, over rows [begin,
// end) in tiles of a panel that is `width` vectors wide. All tiles are equally high, give or take a
// row: 98 rows cost 13 tiles of 7 and 8, not 12 of 8 and a slow one of 2.
template <int NV, class F>
HYBRIDOPS_INLINE void for_rows(int64_t begin, int64_t end, const F& f) {
  const int64_t rows = end - begin, tiles = (rows + kRows<NV> - 1) / kRows<NV>;
  if (tiles == 0) return;
  const int64_t height = rows / tiles, taller = rows % tiles;
  for_equal<NV>(height + 1, taller, begin, f);
  for_equal<NV>(height, tiles - taller, begin + taller * (height + 1), f);
}
template <class F>
HYBRIDOPS_INLINE void for_tiles(int width, int64_t begin, int64_t end, const F& f) {
  if (width == 3) return for_rows<3>(begin, end, f);
  if (width == 2) return for_rows<2>(begin, end, f);
  for_rows<1>(begin, end, f);
}

}  // namespace HYBRIDOPS_SIMD
}  // namespace hybridops::simd
