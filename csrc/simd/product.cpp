#include "product.h"

#include <cmath>
#include <type_traits>

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

// Walks the rows of a Grid with at most one division, at the start.
struct Cursor {
  const Grid& grid;
  int64_t outer, inner;
  Cursor(const Grid& g, int64_t row)
      : grid(g),
        outer(row < g.inner ? 0 : row / g.inner),
        inner(row < g.inner ? row : row % g.inner) {}
  int64_t next() {
    const int64_t at = outer * grid.outer_stride + inner * grid.inner_stride;
    if (++inner == grid.inner) inner = 0, ++outer;
    return at;
  }
};

// The next panel, for the tiles of this one to fetch, each its share. At batch 1 the weights of a
// whole model come from L3 or DRAM, where the first tile of every panel would wait for them.
struct NextPanel {
  const char* data;
  int64_t row_begin, per_row, per_product;  // bytes for each row of a tile, and for each product

  NextPanel(const float* panel, int64_t width, int64_t K, int64_t begin, int64_t end)
      : data((const char*)panel),
        row_begin(begin),
        per_row(width * K * 4 / (end - begin)),
        per_product(width * 4 / (end - begin)) {}
  HYBRIDOPS_INLINE Ahead share(int64_t m, int rows) const {
    return {data + (m - row_begin) * per_row, rows * per_product};
  }
};

template <class T>
struct ProductTile {
  const Rows& rows;
  const float* panel;
  int64_t column, N;
  const Output& output;
  const NextPanel& next;

  template <int MR, int NV>
  __attribute__((noinline)) void operator()(int64_t m) const {
    const float* a[MR];
    Cursor from(rows.grid, m);
    HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) a[i] = rows.data + from.next();

    Ahead ahead = next.share(m, MR);
    Tile<MR, NV> tile = {};
    Totals<MR, NV> totals(chain_length(output.few_rows));
    const float* b = panel;
    for (int64_t i = 0; i < rows.count1; ++i)
      for (int64_t j = 0; j < rows.count2; ++j) {
        int64_t offset = i * rows.stride1 + j * rows.stride2;
        for (int64_t left = rows.length; left > 0;) {
          const int64_t length = totals.room(tile, left);
          const float* run[MR];
          HYBRIDOPS_UNROLL for (int r = 0; r < MR; ++r) run[r] = a[r] + offset;
          multiply<MR, NV>(tile, run, b, length, &ahead);
          b += length * NV * kLanes;
          offset += length;
          left -= length;
        }
      }
    totals.collect(tile);
    if (output.bias) {
      HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) {
        const int64_t n = column + v * kLanes;
        const Vec bias = load_some(output.bias + n, N - n);
        HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) tile[i][v] += bias;
      }
    }
    if (output.row_scale) {
      HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) {
        const Vec scale = splat(output.row_scale[m + i]);
        HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) tile[i][v] *= scale;
      }
    }
    if (output.activation != kNone) {
      Vec flat[MR * NV];  // a copy, so that the tile itself is never indexed at run time and stays
                          // in registers
      HYBRIDOPS_UNROLL for (int i = 0; i < MR * NV; ++i) flat[i] = tile[i / NV][i % NV];
      activate(flat, MR * NV, output.activation);
      HYBRIDOPS_UNROLL for (int i = 0; i < MR * NV; ++i) tile[i / NV][i % NV] = flat[i];
    }
    const bool whole = column + NV * kLanes <= N;
    Cursor to(output.grid, m), along(output.residual_grid, m);
    HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) {
      T* y = (T*)output.data + to.next() + column;
      const T* residual =
          output.residual ? (const T*)output.residual + along.next() + column : nullptr;
      HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) {
        const int64_t n = v * kLanes, left = whole ? kLanes : N - column - n;
        Vec x = tile[i][v];
        if (residual) x += load_some(residual + n, left);
        store_some(y + n, x, left);
      }
    }
  }
};

// With K of 16 to 64 a tile is done in 100 to 400 cycles: here it carries nothing but the product.
struct PlainTile {
  const float* a;
  int64_t stride_a, K;
  const float* panel;
  float* c;
  int64_t stride_c;

  template <int MR, int NV>
  HYBRIDOPS_INLINE void operator()(int64_t m) const {
    const float* row[MR];
    HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) row[i] = a + (m + i) * stride_a;
    Tile<MR, NV> tile = {};
    Totals<MR, NV> totals(chain_length(MR < 4));
    const float* b = panel;
    for (int64_t k = 0; k < K;) {
      const int64_t length = totals.room(tile, K - k);
      const float* run[MR];
      HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) run[i] = row[i] + k;
      multiply<MR, NV>(tile, run, b, length);
      b += length * NV * kLanes;
      k += length;
    }
    totals.collect(tile);
    HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v)
        store(c + (m + i) * stride_c + v * kLanes, tile[i][v]);
  }
};

struct TransposedTile {
  const float* a;
  int64_t stride_a, K;
  const float* panel;
  int64_t column, N;
  float* c;
  int64_t stride_c;
  bool accumulate;

  template <int MR, int NV>
  __attribute__((noinline)) void operator()(int64_t m) const {
    Tile<MR, NV> tile = {};
    multiply_transposed<MR, NV>(tile, a + m, stride_a, panel, K);
    float* y = c + m * stride_c + column;
    // What was there is added last: rounding errors of these K products stay their own.
    HYBRIDOPS_UNROLL for (int i = 0; i < MR; ++i) HYBRIDOPS_UNROLL for (int v = 0; v < NV; ++v) {
      const int64_t n = v * kLanes, left = N - column - n;
      if (accumulate) tile[i][v] += load_some(y + i * stride_c + n, left);
      store_some(y + i * stride_c + n, tile[i][v], left);
    }
  }
};

template <class T>
void pack_panel(const T* source, int64_t stride_k, int64_t stride_n, int64_t K, int64_t columns,
                int64_t width, float* panel) {
  if (stride_n == 1) {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t n = 0; n < width; n += kLanes) {
        const int64_t left = columns - n;
        store(panel + k * width + n, left > 0 ? load_some(source + k * stride_k + n, left) : Vec{});
      }
    return;
  }
  int64_t n = 0;
  if constexpr (std::is_same_v<T, float>)
    if (stride_k == 1)
      for (; n + 8 <= columns; n += 8) {
        int64_t k = 0;
        for (; k + 8 <= K; k += 8)
          transpose8(source + n * stride_n + k, stride_n, panel + k * width + n, width);
        for (; k < K; ++k)
          for (int64_t i = n; i < n + 8; ++i) panel[k * width + i] = source[i * stride_n + k];
      }
  for (; n < width; ++n) {
    const T* column = source + n * stride_n;
    for (int64_t k = 0; k < K; ++k)
      panel[k * width + n] = n < columns ? to_float(column[k * stride_k]) : 0.0f;
  }
}

// Sum over a row of f(value, i), in four chains so that the additions overlap.
template <class T, class F>
HYBRIDOPS_INLINE float sum_row(const T* x, int64_t n, const F& f) {
  Vec total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    HYBRIDOPS_UNROLL for (int c = 0; c < 4; ++c) total[c] += f(load(x + i + c * kLanes));
  for (; i + kLanes <= n; i += kLanes) total[0] += f(load(x + i));
  float all = sum((total[0] + total[1]) + (total[2] + total[3]));
  if (i < n) {
    float lane[kLanes];
    store(lane, f(load(x + i, (int)(n - i))));
    for (int64_t t = 0; t < n - i; ++t) all += lane[t];
  }
  return all;
}

template <class T>
void layer_norm_rows(const T* x, int64_t stride_x, int64_t rows, int64_t n, const float* weight,
                     const float* bias, float eps, float* y, int64_t stride_y) {
  for (int64_t r = 0; r < rows; ++r, x += stride_x, y += stride_y) {
    const float mean = sum_row(x, n, [](Vec v) { return v; }) / (float)n;
    const float variance =
        sum_row(x, n, [mean](Vec v) { return (v - mean) * (v - mean); }) / (float)n;
    const float rstd = 1.0f / std::sqrt(variance + eps);
    const auto normed = [=](int64_t i, int64_t left) {
      const Vec shift = bias ? load_some(bias + i, left) : Vec{};
      store_some(y + i,
                 fma((load_some(x + i, left) - mean) * rstd, load_some(weight + i, left), shift),
                 left);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) normed(i, kLanes);
    if (i < n) normed(i, n - i);
  }
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

int64_t panel_count(int64_t N) { return Panels(N).count; }
int64_t packed_floats(int64_t N, int64_t K) { return Panels(N).vectors * kLanes * K; }
int64_t row_tile() { return kRows<kPanel>; }

void pack(const void* source, Type type, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N,
          int64_t panel_begin, int64_t panel_end, float* packed) {
  const Panels panels(N);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t first = panels.offset(p) * kLanes, width = panels.width(p) * kLanes;
    const int64_t columns = N - first < width ? N - first : width;
    float* panel = packed + first * K;
    if (type == Type::kFloat)
      pack_panel((const float*)source + first * stride_n, stride_k, stride_n, K, columns, width,
                 panel);
    else
      pack_panel((const BFloat16*)source + first * stride_n, stride_k, stride_n, K, columns, width,
                 panel);
  }
}

void product(const Rows& rows, int64_t row_begin, int64_t row_end, const float* packed, int64_t N,
             int64_t panel_begin, int64_t panel_end, const Output& output) {
  if (row_begin == row_end) return;
  const Panels panels(N);
  const int64_t K = rows.count1 * rows.count2 * rows.length;
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t first = panels.offset(p) * kLanes, next = panels.offset(p + 1) * kLanes;
    const int64_t next_width = p + 1 < panel_end ? panels.width(p + 1) * kLanes : 0;
    const NextPanel ahead(packed + next * K, next_width, K, row_begin, row_end);
    if (output.type == Type::kFloat)
      for_tiles(panels.width(p), row_begin, row_end,
                ProductTile<float>{rows, packed + first * K, first, N, output, ahead});
    else
      for_tiles(panels.width(p), row_begin, row_end,
                ProductTile<BFloat16>{rows, packed + first * K, first, N, output, ahead});
  }
}

void plain_product(const float* a, int64_t stride_a, int64_t M, int64_t K, const float* packed,
                   int64_t N, float* c, int64_t stride_c) {
  const Panels panels(N);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.offset(p) * kLanes;
    for_tiles(panels.width(p), 0, M,
              PlainTile{a, stride_a, K, packed + first * K, c + first, stride_c});
  }
}

void product_transposed(const float* a, int64_t stride_a, int64_t M, int64_t K, const float* packed,
                        int64_t N, float* c, int64_t stride_c, bool accumulate) {
  const Panels panels(N);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.offset(p) * kLanes;
    for_tiles(
        panels.width(p), 0, M,
        TransposedTile{a, stride_a, K, packed + first * K, first, N, c, stride_c, accumulate});
  }
}

void to_float(const void* x, Type type, int64_t stride_x, int64_t rows, int64_t n, float* y,
              int64_t stride_y) {
  for (int64_t r = 0; r < rows; ++r, y += stride_y)
    for (int64_t i = 0; i < n; i += kLanes)
      store_some(y + i,
                 type == Type::kFloat ? load_some((const float*)x + r * stride_x + i, n - i)
                                      : load_some((const BFloat16*)x + r * stride_x + i, n - i),
                 n - i);
}

void from_float(const float* x, int64_t stride_x, int64_t rows, int64_t n, void* y, Type type,
                int64_t stride_y) {
  for (int64_t r = 0; r < rows; ++r, x += stride_x)
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec value = load_some(x + i, n - i);
      if (type == Type::kFloat)
        store_some((float*)y + r * stride_y + i, value, n - i);
      else
        store_some((BFloat16*)y + r * stride_y + i, value, n - i);
    }
}

void layer_norm(const void* x, Type type, int64_t stride_x, int64_t rows, int64_t n,
                const float* weight, const float* bias, float eps, float* y, int64_t stride_y) {
  if (type == Type::kFloat)
    layer_norm_rows((const float*)x, stride_x, rows, n, weight, bias, eps, y, stride_y);
  else
    layer_norm_rows((const BFloat16*)x, stride_x, rows, n, weight, bias, eps, y, stride_y);
}

void add_rows(const float* x, int64_t stride_x, int64_t rows, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec total{};
    for (int64_t r = 0; r < rows; ++r) total += load_some(x + r * stride_x + i, n - i);
    store_some(y + i, load_some(y + i, n - i) + total, n - i);
  }
}

}  // namespace hybridops::simd
