#include "peg.h"

#include <algorithm>

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

constexpr int kPixels = 4;  // output pixels that share one load of a tap

// Taps [first, last) of K that fall inside [0, size) for an output cell whose window starts at
// `start`.
struct Window {
  int64_t first, last;
  Window(int64_t start, int64_t K, int64_t size)
      : first(start < 0 ? -start : 0), last(std::max<int64_t>(std::min(K, size - start), 0)) {}
};

// P output pixels side by side, all with the same taps inside the grid; channels [c, c + left).
template <int P, class T>
HYBRIDOPS_INLINE void pixels_at(const T* x, const float* taps, const float* bias,
                                const Depthwise& d, int64_t h0, int64_t w0, Window rows,
                                Window columns, bool residual, bool gate, int64_t activation,
                                const T* center, T* y, int64_t c, int64_t left) {
  const Vec start = bias ? load_some(bias + c, left) : Vec{};
  Vec z[P];
  HYBRIDOPS_UNROLL for (int p = 0; p < P; ++p) z[p] = start;
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const T* from = x + ((h0 + i) * d.W + w0 + columns.first) * d.C + c;
    const float* tap = taps + (i * d.K + columns.first) * d.C + c;
    for (int64_t j = columns.first; j < columns.last; ++j, from += d.C, tap += d.C) {
      const Vec weight = load_some(tap, left);
      HYBRIDOPS_UNROLL for (int p = 0; p < P; ++p) z[p] =
          fma(load_some(from + p * d.stride * d.C, left), weight, z[p]);
    }
  }
  if (activation != kNone) {
    Vec flat[P];  // a copy: z itself is never indexed at run time and stays in registers
    HYBRIDOPS_UNROLL for (int p = 0; p < P; ++p) flat[p] = z[p];
    activate<T>(flat, P, activation);
    HYBRIDOPS_UNROLL for (int p = 0; p < P; ++p) z[p] = flat[p];
  }
  HYBRIDOPS_UNROLL for (int p = 0; p < P; ++p) {
    if (residual && !gate) z[p] += load_some(center + p * d.C + c, left);
    if (gate) z[p] = load_some(center + p * d.C + c, left) / (exp(-z[p]) + 1.0f);
    store_some(y + p * d.C + c, z[p], left);
  }
}

template <int P, class T>
__attribute__((noinline)) void pixels(const T* x, const float* taps, const float* bias,
                                      const Depthwise& d, int64_t h0, int64_t w0, Window rows,
                                      Window columns, bool residual, bool gate, int64_t activation,
                                      const T* center, T* y) {
  int64_t c = 0;
  for (; c + kLanes <= d.C; c += kLanes)
    pixels_at<P>(x, taps, bias, d, h0, w0, rows, columns, residual, gate, activation, center, y, c,
                 kLanes);
  if (c < d.C)
    pixels_at<P>(x, taps, bias, d, h0, w0, rows, columns, residual, gate, activation, center, y, c,
                 d.C - c);
}

template <class T>
void row(const T* x, const float* taps, const float* bias, const Depthwise& d, int64_t ho,
         bool residual, bool gate, int64_t activation, T* y) {
  const int64_t h0 = ho * d.stride - d.padding;
  const Window rows(h0, d.K, d.H);
  y += ho * d.Wo * d.C;
  for (int64_t wo = 0; wo < d.Wo;) {
    const int64_t w0 = wo * d.stride - d.padding;
    const T* center = x + (ho * d.W + wo) * d.C;  // only read where the grids are equal
    const bool inside =
        w0 >= 0 && wo + kPixels <= d.Wo && w0 + (kPixels - 1) * d.stride + d.K <= d.W;
    if (inside) {
      pixels<kPixels>(x, taps, bias, d, h0, w0, rows, Window(w0, d.K, d.W), residual, gate,
                      activation, center, y + wo * d.C);
      wo += kPixels;
    } else {
      pixels<1>(x, taps, bias, d, h0, w0, rows, Window(w0, d.K, d.W), residual, gate, activation,
                center, y + wo * d.C);
      ++wo;
    }
  }
}

template <class T>
void backward(const T* dy, const T* x, const float* taps, const Depthwise& d, bool residual,
              int64_t begin, int64_t end, T* dx, float* dtaps, float* dbias) {
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t left = end - c;
    // Sums in three levels, row, image, batch: rounding errors do not grow with the number of
    // tokens.
    for (int64_t i = 0; i < d.K; ++i)
      for (int64_t j = 0; j < d.K; ++j) {
        float* slot = dtaps + (i * d.K + j) * d.C + c;
        Vec image_sum{};
        for (int64_t ho = 0; ho < d.Ho; ++ho) {
          const int64_t h = ho * d.stride - d.padding + i;
          if (h < 0 || h >= d.H) continue;
          Vec row_sum{};
          for (int64_t wo = 0; wo < d.Wo; ++wo) {
            const int64_t w = wo * d.stride - d.padding + j;
            if (w < 0 || w >= d.W) continue;
            row_sum = fma(load_some(dy + (ho * d.Wo + wo) * d.C + c, left),
                          load_some(x + (h * d.W + w) * d.C + c, left), row_sum);
          }
          image_sum += row_sum;
        }
        store_some(slot, load_some(slot, left) + image_sum, left);
      }
    Vec bias_sum{};
    for (int64_t ho = 0; ho < d.Ho; ++ho) {
      Vec row_sum{};
      for (int64_t wo = 0; wo < d.Wo; ++wo)
        row_sum += load_some(dy + (ho * d.Wo + wo) * d.C + c, left);
      bias_sum += row_sum;
    }
    store_some(dbias + c, load_some(dbias + c, left) + bias_sum, left);
    for (int64_t h = 0; h < d.H; ++h)
      for (int64_t w = 0; w < d.W; ++w) {
        Vec total = residual ? load_some(dy + (h * d.W + w) * d.C + c, left) : Vec{};
        for (int64_t i = 0; i < d.K; ++i) {
          const int64_t top = h + d.padding - i;
          if (top < 0 || top % d.stride || top / d.stride >= d.Ho) continue;
          for (int64_t j = 0; j < d.K; ++j) {
            const int64_t side = w + d.padding - j;
            if (side < 0 || side % d.stride || side / d.stride >= d.Wo) continue;
            const T* from = dy + (top / d.stride * d.Wo + side / d.stride) * d.C + c;
            total =
                fma(load_some(from, left), load_some(taps + (i * d.K + j) * d.C + c, left), total);
          }
        }
        store_some(dx + (h * d.W + w) * d.C + c, total, left);
      }
  }
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

int64_t channel_block() { return 2 * kLanes; }

void depthwise_row(const void* x, Type type, const float* taps, const float* bias,
                   const Depthwise& d, int64_t ho, bool residual, bool gate, int64_t activation,
                   void* y) {
  if (type == Type::kFloat)
    row((const float*)x, taps, bias, d, ho, residual, gate, activation, (float*)y);
  else
    row((const BFloat16*)x, taps, bias, d, ho, residual, gate, activation, (BFloat16*)y);
}

void depthwise_backward(const void* dy, const void* x, Type type, const float* taps,
                        const Depthwise& d, bool residual, int64_t begin, int64_t end, void* dx,
                        float* dtaps, float* dbias) {
  if (type == Type::kFloat)
    backward((const float*)dy, (const float*)x, taps, d, residual, begin, end, (float*)dx, dtaps,
             dbias);
  else
    backward((const BFloat16*)dy, (const BFloat16*)x, taps, d, residual, begin, end, (BFloat16*)dx,
             dtaps, dbias);
}

}  // namespace hybridops::simd
