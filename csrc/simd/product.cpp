#include "product.h"

#include <algorithm>
#include <type_traits>

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

int64_t position(const Grid& grid, int64_t row) {
  const int64_t outer = row < grid.inner ? 0 : row / grid.inner;
  return outer * grid.outer_stride + (row - outer * grid.inner) * grid.inner_stride;
}
// From `row` on rows are evenly spaced up to this one.
int64_t even_until(const Grid& grid, int64_t row) {
  return row < grid.inner ? grid.inner : (row / grid.inner + 1) * grid.inner;
}

// What a tile reads of a row when its sums are done, fetched before they begin: a look into L3
// takes as long as a fifth of a tile.
template <int NV, class T>
HYBRIDOPS_INLINE void fetch_row(const T* row) {
  HYBRIDOPS_UNROLL for (int line = 0; line <= NV * kLanes * (int)sizeof(T) / 64; ++line)
      _mm_prefetch((const char*)row + 64 * line, _MM_HINT_T0);
}

// What the tiles of a panel fetch, each its share: the next panel, or what comes after the last. At
// batch 1 the weights of a whole model come from L3 or DRAM, where the first tile of every panel
// would wait for them.
class Fetching {
 public:
  Fetching() = default;
  Fetching(const void* data, int64_t bytes, int64_t rows, int64_t slots)
      : data_((const char*)data), of_row_((bytes << kFraction) / rows), of_step_(of_row_ / slots) {}
  HYBRIDOPS_INLINE Ahead share(int64_t m, int height) const {
    return {data_ + (m * of_row_ >> kFraction), height * of_step_ >> kFraction};
  }

 private:
  static constexpr int kFraction = 16;  // bits: a division for each tile would cost 3 % of it
  const char* data_ = nullptr;
  int64_t of_row_ = 0, of_step_ = 0;
};

// Rows of a panel's product that are evenly spaced wherever they lie. E: what is multiplied; T:
// what is written. Each height of tiles works on a copy of its own, which no store can reach: all
// of this would be loaded again for every tile, 10 % of a short one. kFetches: whether they fetch
// what comes after the panel.
template <class E, class T, bool kFetches>
struct Strip {
  const E* a;
  int64_t step_a, length, runs, step_run;
  Chain chain;
  const float* panel;
  int64_t columns;  // that the panel holds
  const float *bias, *row_scale;
  int64_t activation;
  const T* residual;
  int64_t step_residual;
  bool residual_first;
  T* y;
  int64_t step_y;
  int64_t before;  // rows of the panel in front of these
  Fetching fetching;

  template <int MR, int NV>
  void operator()(int64_t m, int64_t count) const {
    tiles<MR, NV>(*this, m, count);
  }

 private:
  template <int MR, int NV>
  __attribute__((noinline)) static void tiles(Strip s, int64_t m, int64_t count) {
    const bool whole = NV * kLanes <= s.columns;
    for (; count > 0; --count, m += MR) {
      const T* added = s.residual ? s.residual + m * s.step_residual : nullptr;
      if (added) {  // read last, and each of its lines by one tile alone
        HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) fetch_row<NV>(added + i * s.step_residual);
      }
      Ahead ahead = kFetches ? s.fetching.share(s.before + m, MR) : Ahead{};
      Tile<MR, NV> tile = {};
      alignas(64) float sums[Totals<MR, NV>::kNumbers];
      Totals<MR, NV> totals(s.chain.pieces, sums);
      const float* b = s.panel;
      const E* start = s.a + m * s.step_a;
      for (int64_t i = 0; i < s.runs; ++i, start += s.step_run) {
        const E* from = start;
        for (int64_t left = s.length; left > 0;) {
          const int64_t length = left < s.chain.piece ? left : s.chain.piece;
          totals.next(tile);
          const E* run[MR];
          HYBRIDOPS_UNROLL for (int r = 0; r < MR; ++r) run[r] = from + r * s.step_a;
          multiply<E, MR, NV>(tile, run, b, length, kFetches ? &ahead : nullptr);
          b += slots<E>(length) * NV * kLanes;
          from += length;
          left -= length;
        }
      }
      totals.collect(tile);
      if (s.bias) {
        HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) {
          const Vec bias = load_some(s.bias + v * kLanes, s.columns - v * kLanes);
          HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) tile[i][v] += bias;
        }
      }
      if (s.row_scale) {
        HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) {
          const Vec scale = splat(s.row_scale[m + i]);
          HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) tile[i][v] *= scale;
        }
      }
      if (added && s.residual_first) add_rows(tile, added, s.step_residual, s.columns, whole);
      if (s.activation == kRelu) {
        HYBRIDOPS_UNROLL for (int i = 0; i < MR * NV; ++i) tile[i / NV][i % NV] =
            activate<kRelu, T>(tile[i / NV][i % NV]);
      } else if (s.activation == kHardswish) {
        HYBRIDOPS_UNROLL for (int i = 0; i < MR * NV; ++i) tile[i / NV][i % NV] =
            activate<kHardswish, T>(tile[i / NV][i % NV]);
      } else if (s.activation != kNone) {
        Vec flat[MR * NV];  // a copy, so that the tile itself is never indexed at run time and
                            // stays in registers
        HYBRIDOPS_UNROLL for (int i = 0; i < MR * NV; ++i) flat[i] = tile[i / NV][i % NV];
        activate<T>(flat, MR * NV, s.activation);
        HYBRIDOPS_UNROLL for (int i = 0; i < MR * NV; ++i) tile[i / NV][i % NV] = flat[i];
      }
      if (added && !s.residual_first) add_rows(tile, added, s.step_residual, s.columns, whole);
      T* y = s.y + m * s.step_y;
      HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i, y += s.step_y) {
        if (whole) {
          HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) store(y + v * kLanes, tile[i][v]);
        } else {
          HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v)
              store_some(y + v * kLanes, tile[i][v], s.columns - v * kLanes);
        }
      }
    }
  }

  template <int MR, int NV>
  static HYBRIDOPS_INLINE void add_rows(Tile<MR, NV>& tile, const T* added, int64_t step,
                                        int64_t columns, bool whole) {
    HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) {
      const int64_t n = v * kLanes, left = whole ? kLanes : columns - n;
      tile[i][v] += load_some(added + i * step + n, left);
    }
  }
};

// From row m on, in columns from `first` on.
template <class E, class T, bool kFetches>
Strip<E, T, kFetches> strip_of(const Rows& rows, const Output& output, int64_t m, int64_t first) {
  Strip<E, T, kFetches> s{};
  s.a = (const E*)rows.data + position(rows.grid, m);
  s.step_a = rows.grid.inner_stride;
  s.length = rows.length, s.runs = rows.runs, s.step_run = rows.stride_run;
  s.chain = chain_of<E>(rows.length, output.few_rows, rows.runs);
  if (output.bias) s.bias = output.bias + first;
  if (output.row_scale) s.row_scale = output.row_scale + m;
  s.activation = output.activation;
  if (output.residual) {
    s.residual = (const T*)output.residual + position(output.residual_grid, m) + first;
    s.step_residual = output.residual_grid.inner_stride;
  }
  s.residual_first = output.residual_first;
  s.y = (T*)output.data + position(output.grid, m) + first;
  s.step_y = output.grid.inner_stride;
  return s;
}

// With K of 16 to 64 a tile is done in 100 to 400 cycles: here it carries nothing but the product.
template <class E, bool kFetches>
struct PlainStrip {
  const E* a;
  int64_t stride_a, K, piece;
  const float* panel;
  float* c;
  int64_t stride_c;
  const Fetching& fetching;

  template <int MR, int NV>
  HYBRIDOPS_INLINE void operator()(int64_t m, int64_t count) const {
    for (; count > 0; --count, m += MR) one<MR, NV>(m);
  }

 private:
  template <int MR, int NV>
  HYBRIDOPS_INLINE void one(int64_t m) const {
    Ahead ahead = kFetches ? fetching.share(m, MR) : Ahead{};
    const E* row[MR];
    HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) row[i] = a + (m + i) * stride_a;
    Tile<MR, NV> tile = {};
    alignas(64) float sums[Totals<MR, NV>::kNumbers];
    Totals<MR, NV> totals(1, sums);
    const float* b = panel;
    for (int64_t k = 0; k < K;) {
      const int64_t length = K - k < piece ? K - k : piece;
      totals.next(tile);
      const E* run[MR];
      HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) run[i] = row[i] + k;
      multiply<E, MR, NV>(tile, run, b, length, kFetches ? &ahead : nullptr);
      b += slots<E>(length) * NV * kLanes;
      k += length;
    }
    totals.collect(tile);
    HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v)
        store(c + (m + i) * stride_c + v * kLanes, tile[i][v]);
  }
};

struct TransposedStrip {
  const float* a;
  int64_t stride_a, K;
  const float* panel;
  int64_t columns;
  float* c;
  int64_t stride_c;
  bool accumulate;

  template <int MR, int NV>
  void operator()(int64_t m, int64_t count) const {
    tiles<MR, NV>(*this, m, count);
  }

 private:
  template <int MR, int NV>
  __attribute__((noinline)) static void tiles(TransposedStrip s, int64_t m, int64_t count) {
    const bool whole = NV * kLanes <= s.columns;
    for (; count > 0; --count, m += MR) {
      float* y = s.c + m * s.stride_c;
      if (s.accumulate) {
        HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) fetch_row<NV>(y + i * s.stride_c);
      }
      Tile<MR, NV> tile = {};
      multiply_transposed<MR, NV>(tile, s.a + m, s.stride_a, s.panel, s.K);
      // What was there is added last: rounding errors of these K products stay their own.
      HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) {
        const int64_t n = v * kLanes, left = whole ? kLanes : s.columns - n;
        if (s.accumulate) tile[i][v] += load_some(y + i * s.stride_c + n, left);
        store_some(y + i * s.stride_c + n, tile[i][v], left);
      }
    }
  }
};

}  // namespace
}  // namespace HYBRIDOPS_SIMD

void product(const Rows& rows, int64_t row_begin, int64_t row_end, const float* packed, int64_t N,
             int64_t panel_begin, int64_t panel_end, const Output& output) {
  if (row_begin == row_end) return;
  const Panels panels(N);
  const int64_t K = slots(Depth{rows.type, rows.length, rows.runs});
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t first = panels.offset(p) * kLanes, next = panels.offset(p + 1) * kLanes;
    const bool last = p + 1 == panel_end;
    const int64_t floats = last ? output.then_floats : panels.width(p + 1) * kLanes * K;
    const Fetching fetching(last ? output.then : packed + next * K, floats * 4, row_end - row_begin,
                            std::max<int64_t>(K, 1));
    with_element(rows.type == Type::kBFloat16, [&](auto element) {
      const auto strips = [&](auto of_output, auto fetches) {
        using E = decltype(element);
        for (int64_t m = row_begin, end; m < row_end; m = end) {
          end = std::min({row_end, even_until(rows.grid, m), even_until(output.grid, m)});
          if (output.residual) end = std::min(end, even_until(output.residual_grid, m));
          auto strip = strip_of<E, decltype(of_output), fetches.value>(rows, output, m, first);
          strip.panel = packed + first * K;
          strip.columns = N - first;
          strip.before = m - row_begin;
          strip.fetching = fetching;
          for_tiles(panels.width(p), 0, end - m, strip);
        }
      };
      // The weights of a convolution are read again for the next rows and stay in cache, and in a
      // core that a neighbour shares fetching takes 7 % of its time.
      const auto of = [&](auto y) {
        rows.runs > 1 ? strips(y, std::false_type{}) : strips(y, std::true_type{});
      };
      output.type == Type::kFloat ? of(float{}) : of(BFloat16{});
    });
  }
}

void plain_product(const void* a, int64_t stride_a, int64_t M, const Depth& K, const float* packed,
                   int64_t N, float* c, int64_t stride_c, const float* then, int64_t then_floats) {
  const Panels panels(N);
  const Fetching fetching(then, then_floats * 4, std::max<int64_t>(M, 1),
                          std::max<int64_t>(slots(K), 1));
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.offset(p) * kLanes;
    with_element(K.type == Type::kBFloat16, [&](auto element) {
      using E = decltype(element);
      const auto tiles = [&](auto fetches) {
        using Plain = PlainStrip<E, decltype(fetches)::value>;
        for_tiles(panels.width(p), 0, M,
                  Plain{(const E*)a, stride_a, K.length, chain_of<E>(K.length, M < 4).piece,
                        packed + first * slots(K), c + first, stride_c, fetching});
      };
      then_floats ? tiles(std::true_type{}) : tiles(std::false_type{});
    });
  }
}

void product_transposed(const float* a, int64_t stride_a, int64_t M, int64_t K, const float* packed,
                        int64_t N, int64_t panel_begin, int64_t panel_end, float* c,
                        int64_t stride_c, bool accumulate) {
  const Panels panels(N);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t first = panels.offset(p) * kLanes;
    for_tiles(panels.width(p), 0, M,
              TransposedStrip{a, stride_a, K, packed + first * K, N - first, c + first, stride_c,
                              accumulate});
  }
}

}  // namespace hybridops::simd
