#include "winograd.h"

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

// Stride 1: columns are evaluated at 0, +-a, +-b and infinity, rows at 0, +-1 and infinity. Of the
// pairs a, b of small dyadic fractions these are among those with the smallest errors, half of what
// 1 and 2 would make; with 4 x 4 pixels all of them are beyond what the sum itself has.
constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b;

// A row of six numbers as a polynomial at the six points: B^T d of the paper.
HYBRIDOPS_INLINE void columns_to_points(const Vec (&d)[6], Vec (&t)[6]) {
  const Vec s = splat(-(aa + bb)), p = splat(aa * bb);
  t[0] = fma(p, d[0], fma(s, d[2], d[4]));
  t[5] = fma(p, d[1], fma(s, d[3], d[5]));
  const Vec even_a = fma(splat(-bb), d[2], d[4]), odd_a = fma(splat(-bb), d[1], d[3]);
  const Vec even_b = fma(splat(-aa), d[2], d[4]), odd_b = fma(splat(-aa), d[1], d[3]);
  t[1] = fma(splat(a), odd_a, even_a);
  t[2] = fma(splat(-a), odd_a, even_a);
  t[3] = fma(splat(b), odd_b, even_b);
  t[4] = fma(splat(-b), odd_b, even_b);
}

// One row of points: of patch rows x and z, their sum or difference.
template <bool kSum>
HYBRIDOPS_INLINE void row_to_points(const float* x, const float* z, int64_t C, int64_t left,
                                    float* y, int64_t stride) {
  Vec d[6], t[6];
  HYBRIDOPS_UNROLL for (int j = 0; j < 6; ++j) {
    const Vec p = load_some(x + j * C, left), q = load_some(z + j * C, left);
    d[j] = kSum ? p + q : p - q;
  }
  columns_to_points(d, t);
  HYBRIDOPS_UNROLL for (int j = 0; j < 6; ++j) store_some(y + j * stride, t[j], left);
}

// f(channel, how many are left) for every vector of C channels.
template <class F>
HYBRIDOPS_INLINE void for_channels(int64_t C, const F& f) {
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) f(c, kLanes);
  if (c < C) f(c, C - c);
}

void to_points1(const float* x, int64_t stride_row, int64_t C, int64_t tile, float* operands,
                int64_t stride) {
  for_channels(C, [=](int64_t c, int64_t left) {
    const float *r0 = x + c, *r1 = r0 + stride_row, *r2 = r1 + stride_row, *r3 = r2 + stride_row;
    float* to = operands + tile * C + c;
    row_to_points<false>(r2, r0, C, left, to, stride);
    row_to_points<true>(r1, r2, C, left, to + 6 * stride, stride);
    row_to_points<false>(r2, r1, C, left, to + 12 * stride, stride);
    row_to_points<false>(r3, r1, C, left, to + 18 * stride, stride);
  });
}

// y = end(z), z a row of pixels: bias is in it, the residual and the activation are not.
template <int kColumns>
HYBRIDOPS_INLINE void store_pixels(const Vec (&z)[kColumns], const Pixels& to, int64_t row,
                                   int64_t n) {
  const int64_t left = to.N - n;
  const auto end = [&](auto activated) {
    HYBRIDOPS_UNROLL for (int j = 0; j < kColumns; ++j) if (j < to.columns) {
      const int64_t at = row * to.stride_row + j * to.stride_pixel + n;
      const Vec x = to.residual ? z[j] + load_some(to.residual + at, left) : z[j];
      store_some(to.y + at, activated(x), left);
    }
  };
  if (to.activation == kNone) return end([](Vec x) { return x; });
  if (to.activation == kRelu) return end([](Vec x) { return activate<kRelu, float>(x); });
  end([&](Vec x) {
    activate<float>(&x, 1, to.activation);
    return x;
  });
}

// One row of pixels: of the points' first three rows their sum, or of the last three.
template <bool kFirst>
HYBRIDOPS_INLINE void row_of_pixels(const float* products, int64_t stride, Vec bias,
                                    const Pixels& to, int64_t n) {
  Vec m[6], z[4];
  HYBRIDOPS_UNROLL for (int j = 0; j < 6; ++j) {
    const float* p = products + j * stride + n;
    const Vec second = load(p + 6 * stride), third = load(p + 12 * stride);
    m[j] = kFirst ? load(p) + (second + third) : (second - third) + load(p + 18 * stride);
  }
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  z[0] = m[0] + even_a + even_b + bias;
  z[1] = fma(splat(a), odd_a, fma(splat(b), odd_b, bias));
  z[2] = fma(splat(aa), even_a, fma(splat(bb), even_b, bias));
  z[3] = fma(splat(a * aa), odd_a, fma(splat(b * bb), odd_b, m[5] + bias));
  store_pixels(z, to, kFirst ? 0 : 1, n);
}

// Stride 2, in one dimension: y0 = w0 x0 + w1 x1 + w2 x2 and y1 = w0 x2 + w1 x3 + w2 x4 are
//   y0 = (x0 - x2, x1) (w0, w1) + x2 (w0 + w2),  y1 = (x4 - x2, x3) (w2, w1) + x2 (w0 + w2):
// three operands with 2, 1 and 2 points, 5 products instead of 6.
constexpr int64_t kDeep[3] = {2, 1, 2};

void to_points2(const float* x, int64_t stride_row, int64_t C, int64_t tile, float* operands,
                int64_t stride) {
  for_channels(C, [=](int64_t c, int64_t left) {
    // one row of points, to slot `slot` of the operands of row i
    const auto row = [=](int i, int64_t slot, const float* p, const float* minus) {
      Vec d[5];
      HYBRIDOPS_UNROLL for (int j = 0; j < 5; ++j) {
        d[j] = load_some(p + j * C, left);
        if (minus) d[j] -= load_some(minus + j * C, left);
      }
      const Vec points[3][2] = {{d[0] - d[2], d[1]}, {d[2], Vec{}}, {d[4] - d[2], d[3]}};
      HYBRIDOPS_UNROLL for (int j = 0; j < 3; ++j) {
        const int64_t depth = kDeep[i] * kDeep[j];
        float* to = operands + (3 * i + j) * stride + (tile * depth + slot * kDeep[j]) * C + c;
        HYBRIDOPS_UNROLL for (int s = 0; s < kDeep[j]; ++s)
            store_some(to + s * C, points[j][s], left);
      }
    };
    const float* r[5];
    HYBRIDOPS_UNROLL for (int i = 0; i < 5; ++i) r[i] = x + i * stride_row + c;
    row(0, 0, r[0], r[2]);
    row(0, 1, r[1], nullptr);
    row(1, 0, r[2], nullptr);
    row(2, 0, r[4], r[2]);
    row(2, 1, r[3], nullptr);
  });
}

constexpr Filtering kStride1{
    1,         2,  4,  4,
    6,         24, 24, {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
    to_points1};
constexpr Filtering kStride2{2, 2, 2, 5, 5, 9, 25, {4, 2, 4, 2, 1, 2, 4, 2, 4}, to_points2};

}  // namespace
}  // namespace HYBRIDOPS_SIMD

const Filtering& filtering(int64_t stride) { return stride == 1 ? kStride1 : kStride2; }

void to_pixels(const Filtering& filtering, const float* products, int64_t stride,
               const Pixels& pixels) {
  for (int64_t n = 0; n < pixels.N; n += kLanes) {
    const Vec bias = pixels.bias ? load_some(pixels.bias + n, pixels.N - n) : Vec{};
    if (filtering.stride == 1) {
      row_of_pixels<true>(products, stride, bias, pixels, n);
      if (pixels.rows > 1) row_of_pixels<false>(products, stride, bias, pixels, n);
      continue;
    }
    Vec m[3][3];
    HYBRIDOPS_UNROLL for (int k = 0; k < 9; ++k) m[k / 3][k % 3] = load(products + k * stride + n);
    HYBRIDOPS_UNROLL for (int r = 0; r < 2; ++r) if (r < pixels.rows) {
      const Vec middle = m[r][1] + m[r + 1][1] + bias;
      const Vec z[2] = {m[r][0] + m[r + 1][0] + middle, m[r][2] + m[r + 1][2] + middle};
      store_pixels(z, pixels, r, n);
    }
  }
}

}  // namespace hybridops::simd
