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

// What follows the convolution.
struct Behind {
  bool residual, gate, far;
  int64_t activation;
};

// Apart, so that no register is kept free for it where there is neither activation nor gate.
template <class T>
__attribute__((noinline)) void activate_and_gate(Vec* z, int P, Behind behind, const T* center,
                                                 int64_t C, int64_t left) {
  activate<T>(z, P, behind.activation);
  for (int p = 0; p < P && behind.gate; ++p)
    z[p] = load_some(center + p * C, left) / (exp(-z[p]) + 1.0f);
}

// P pixels' sums become their outputs. center: the input at the same pixels.
template <int P, class T>
HYBRIDOPS_INLINE void finish(Vec (&z)[P], Behind behind, const T* center, T* y, int64_t C,
                             int64_t left) {
  if (behind.gate || behind.activation != kNone) {
    Vec flat[P];  // a copy: z itself is never indexed at run time and stays in registers
    HYBRIDOPS_UNROLL for (int p = 0; p < P; ++p) flat[p] = z[p];
    activate_and_gate<T>(flat, P, behind, center, C, left);
    HYBRIDOPS_UNROLL for (int p = 0; p < P; ++p) z[p] = flat[p];
  }
  const bool residual = behind.residual && !behind.gate;
  HYBRIDOPS_UNROLL for (int p = 0; p < P; ++p, center += C, y += C) {
    asm("" : "+r"(center), "+r"(y));  // else each of their addresses lies on the stack
    store_some(y, residual ? z[p] + load_some(center, left) : z[p], left);
  }
}

// f(c, how many channels there are from c on), a vector of channels at a time.
template <class F>
HYBRIDOPS_INLINE void each_vector(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) f(c, kLanes);
  if (c < C) f(c, C - c);
}

// P output pixels side by side, all with the same taps inside the grid; all channels.
template <int P, class T>
__attribute__((noinline)) void pixels(const T* x, const float* taps, const float* bias,
                                      const Depthwise& d, int64_t h0, int64_t w0, Window rows,
                                      Window columns, Behind behind, const T* center, T* y) {
  each_vector(d.C, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
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
    finish(z, behind, center + c, y + c, d.C, left);
  });
}

constexpr int kWide = 7;  // the grids of images of 224 are 7, 14, 28 and 56 wide

// What one row of x, `from` one pixel to the left of the outputs, adds to kWide of them by three
// taps: a pixel is loaded once for the three outputs that see it.
template <bool kLeft, bool kRight, class T>
HYBRIDOPS_INLINE void add_row(Vec (&z)[kWide], const T* from, const float* tap, int64_t C,
                              int64_t left) {
  const Vec t0 = load_some(tap, left), t1 = load_some(tap + C, left),
            t2 = load_some(tap + 2 * C, left);
  HYBRIDOPS_UNROLL for (int q = 0; q < kWide + 2; ++q) {
    if (q % 3 == 0) {  // three addresses from one register; else each of 27 lies on the stack
      if (q > 0) from += 3 * C;
      asm("" : "+r"(from));
    }
    if ((kLeft && q == 0) || (kRight && q == kWide + 1)) continue;
    const Vec pixel = load_some(from + q % 3 * C, left);
    if (q < kWide) z[q] = fma(pixel, t0, z[q]);
    if (q >= 1 && q <= kWide) z[q - 1] = fma(pixel, t1, z[q - 1]);
    if (q >= 2) z[q - 2] = fma(pixel, t2, z[q - 2]);
  }
}

// The case of CPVT and Twins, 3 x 3 with stride 1 and padding 1, unrolled: kWide pixels from w on,
// which may be the first of their row, the last, or both.
template <bool kLeft, bool kRight, class T>
__attribute__((noinline)) void wide(const T* x, const float* taps, const float* bias,
                                    const Depthwise& d, int64_t h, int64_t w, Behind behind, T* y) {
  const int64_t C = d.C, line = d.W * C;
  const bool above = h > 0, below = h + 1 < d.H;
  const T* center = x + (h * d.W + w) * C;
  each_vector(C, [&](int64_t c, int64_t left) __attribute__((always_inline)) {
    const Vec start = bias ? load_some(bias + c, left) : Vec{};
    const T* from = center - C + c;
    // A cache line's worth of the pixels that the next row adds, and of its outputs: streams this
    // short are over before the hardware has noticed them.
    if (behind.far && c % (64 / (int64_t)sizeof(T)) == 0)
      HYBRIDOPS_UNROLL for (int p = 0; p < kWide; ++p) {
        __builtin_prefetch(center + 2 * line + p * C + c);
        __builtin_prefetch(y + line + p * C + c, 1);
      }
    Vec z[kWide];
    HYBRIDOPS_UNROLL for (int p = 0; p < kWide; ++p) z[p] = start;
    if (above) add_row<kLeft, kRight>(z, from - line, taps + c, C, left);
    add_row<kLeft, kRight>(z, from, taps + 3 * C + c, C, left);
    if (below) add_row<kLeft, kRight>(z, from + line, taps + 6 * C + c, C, left);
    finish(z, behind, center + c, y + c, C, left);
  });
}

template <class T>
void row(const T* x, const float* taps, const float* bias, const Depthwise& d, int64_t ho,
         Behind behind, T* y) {
  const int64_t h0 = ho * d.stride - d.padding;
  y += ho * d.Wo * d.C;
  if (d.K == 3 && d.stride == 1 && d.padding == 1 && d.W >= kWide) {
    for (int64_t w = 0;; w = std::min(w + kWide, d.W - kWide)) {  // the last may overlap
      const bool left = w == 0, right = w + kWide == d.W;
      const auto f = left && right ? wide<true, true, T>
                     : left        ? wide<true, false, T>
                     : right       ? wide<false, true, T>
                                   : wide<false, false, T>;
      f(x, taps, bias, d, ho, w, behind, y + w * d.C);
      if (right) return;
    }
  }
  const Window rows(h0, d.K, d.H);
  for (int64_t wo = 0; wo < d.Wo;) {
    const int64_t w0 = wo * d.stride - d.padding;
    const T* center = x + (ho * d.W + wo) * d.C;  // only read where the grids are equal
    const bool inside =
        w0 >= 0 && wo + kPixels <= d.Wo && w0 + (kPixels - 1) * d.stride + d.K <= d.W;
    const auto f = inside ? pixels<kPixels, T> : pixels<1, T>;
    f(x, taps, bias, d, h0, w0, rows, Window(w0, d.K, d.W), behind, center, y + wo * d.C);
    wo += inside ? kPixels : 1;
  }
}

// sums[3 i + j] += dy * x[i, j] of the pixels around one output pixel, sums[9] += dy. `x`: the
// three rows, from the pixel to the left on.
template <bool kLeft, bool kRight, bool kAbove, bool kBelow, class T>
HYBRIDOPS_INLINE void add_pixel(Vec (&sums)[10], const T* dy, const T* const (&x)[3], int64_t C,
                                int64_t left) {
  const Vec gradient = load_some(dy, left);
  sums[9] += gradient;
  HYBRIDOPS_UNROLL for (int i = 0; i < 3; ++i) {
    if ((i == 0 && !kAbove) || (i == 2 && !kBelow)) continue;
    HYBRIDOPS_UNROLL for (int j = 0; j < 3; ++j) {
      if ((j == 0 && kLeft) || (j == 2 && kRight)) continue;
      sums[3 * i + j] = fma(gradient, load_some(x[i] + j * C, left), sums[3 * i + j]);
    }
  }
}

// The same over a row of outputs.
template <bool kAbove, bool kBelow, class T>
HYBRIDOPS_INLINE void add_pixels(Vec (&sums)[10], const T* dy, const T* x, const Depthwise& d,
                                 int64_t left) {
  const int64_t C = d.C, line = d.W * C;
  const T* rows[3] = {x - line - C, x - C, x + line - C};
  const auto next = [&]() __attribute__((always_inline)) {
    dy += C;
    HYBRIDOPS_UNROLL for (int i = 0; i < 3; ++i) rows[i] += C;
  };
  if (d.W == 1) return add_pixel<true, true, kAbove, kBelow>(sums, dy, rows, C, left);
  add_pixel<true, false, kAbove, kBelow>(sums, dy, rows, C, left);
  next();
  for (int64_t w = 1; w + 1 < d.W; ++w, next())
    add_pixel<false, false, kAbove, kBelow>(sums, dy, rows, C, left);
  add_pixel<false, true, kAbove, kBelow>(sums, dy, rows, C, left);
}

// Sums in three levels, row, image, batch: rounding errors do not grow with the number of tokens.
template <class T>
void weight_gradient_3x3(const T* dy, const T* x, const Depthwise& d, int64_t begin, int64_t end,
                         float* dtaps, float* dbias) {
  constexpr int64_t kTogether = 16;  // vectors: of a row's tokens, whole stretches are read
  for (; begin < end; begin += kTogether * kLanes) {
    const int64_t vectors = std::min((end - begin + kLanes - 1) / kLanes, kTogether);
    Vec image[kTogether][10] = {};
    for (int64_t h = 0; h < d.H; ++h)
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t c = begin + v * kLanes, at = h * d.W * d.C + c, left = end - c;
        const bool above = h > 0, below = h + 1 < d.H;
        Vec row[10] = {};
        if (above && below)
          add_pixels<true, true>(row, dy + at, x + at, d, left);
        else if (above)
          add_pixels<true, false>(row, dy + at, x + at, d, left);
        else if (below)
          add_pixels<false, true>(row, dy + at, x + at, d, left);
        else
          add_pixels<false, false>(row, dy + at, x + at, d, left);
        HYBRIDOPS_UNROLL for (int t = 0; t < 10; ++t) image[v][t] += row[t];
      }
    for (int64_t v = 0; v < vectors; ++v)
      for (int t = 0; t < 10; ++t) {
        const int64_t c = begin + v * kLanes, left = end - c;
        float* sum = t < 9 ? dtaps + t * d.C + c : dbias + c;
        store_some(sum, load_some(sum, left) + image[v][t], left);
      }
  }
}

template <class T>
void weight_gradient(const T* dy, const T* x, const Depthwise& d, int64_t begin, int64_t end,
                     float* dtaps, float* dbias) {
  if (d.K == 3 && d.stride == 1 && d.padding == 1)
    return weight_gradient_3x3(dy, x, d, begin, end, dtaps, dbias);
  for (int64_t c = begin; c < end; c += kLanes) {
    const int64_t left = end - c;
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
  }
}

template <class T>
void input_gradient(const T* dy, const float* taps, const Depthwise& d, int64_t h, T* dx) {
  each_vector(d.C, [&](int64_t c, int64_t left) {
    for (int64_t w = 0; w < d.W; ++w) {
      Vec total{};
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
  });
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

int64_t channel_block() { return 2 * kLanes; }

void depthwise_row(const void* x, Type type, const float* taps, const float* bias,
                   const Depthwise& d, int64_t ho, bool residual, bool gate, bool far,
                   int64_t activation, void* y) {
  if (type == Type::kFloat)
    row((const float*)x, taps, bias, d, ho, {residual, gate, far, activation}, (float*)y);
  else
    row((const BFloat16*)x, taps, bias, d, ho, {residual, gate, far, activation}, (BFloat16*)y);
}

void depthwise_input_gradient(const void* dy, Type type, const float* taps, const Depthwise& d,
                              int64_t h, void* dx) {
  if (type == Type::kFloat)
    input_gradient((const float*)dy, taps, d, h, (float*)dx);
  else
    input_gradient((const BFloat16*)dy, taps, d, h, (BFloat16*)dx);
}

void depthwise_weight_gradient(const void* dy, const void* x, Type type, const Depthwise& d,
                               int64_t begin, int64_t end, float* dtaps, float* dbias) {
  if (type == Type::kFloat)
    weight_gradient((const float*)dy, (const float*)x, d, begin, end, dtaps, dbias);
  else
    weight_gradient((const BFloat16*)dy, (const BFloat16*)x, d, begin, end, dtaps, dbias);
}

}  // namespace hybridops::simd
