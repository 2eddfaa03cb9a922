#include "winograd.h"

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

// Columns are evaluated at 0, +-a, +-b and infinity, rows at 0, +-1 and infinity. Of the pairs a, b
// of small dyadic fractions these are among those with the smallest errors, half of what 1 and 2
// would make; with 4 x 4 pixels all of them are beyond what the sum itself has.
constexpr float a = 0.75f, b = 1.5f, aa = a * a, bb = b * b;

// The six columns' polynomials at the six points: B^T d of the paper.
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
                                    float* y, int64_t stride_point) {
  Vec d[6], t[6];
  HYBRIDOPS_UNROLL for (int j = 0; j < 6; ++j) {
    const Vec p = load_some(x + j * C, left), q = load_some(z + j * C, left);
    d[j] = kSum ? p + q : p - q;
  }
  columns_to_points(d, t);
  HYBRIDOPS_UNROLL for (int j = 0; j < 6; ++j) store_some(y + j * stride_point, t[j], left);
}

// One row of pixels: of the points' first three rows their sum, or of the last three a difference.
template <bool kFirst>
HYBRIDOPS_INLINE void row_of_pixels(const float* points, int64_t stride_point, Vec shift,
                                    const float* residual, int64_t activation, int64_t columns,
                                    int64_t left, float* y, const int64_t (&places)[4]) {
  Vec m[6], z[4];
  HYBRIDOPS_UNROLL for (int j = 0; j < 6; ++j) {
    const float* p = points + j * stride_point;
    const Vec second = load(p + 6 * stride_point), third = load(p + 12 * stride_point);
    m[j] = kFirst ? load(p) + (second + third) : (second - third) + load(p + 18 * stride_point);
  }
  const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  z[0] = m[0] + even_a + even_b + shift;
  z[1] = fma(splat(a), odd_a, fma(splat(b), odd_b, shift));
  z[2] = fma(splat(aa), even_a, fma(splat(bb), even_b, shift));
  z[3] = fma(splat(a * aa), odd_a, fma(splat(b * bb), odd_b, m[5] + shift));
  const auto end = [&](auto activated) {
    HYBRIDOPS_UNROLL for (int j = 0; j < 4; ++j) if (j < columns) {
      if (residual) z[j] += load_some(residual + places[j], left);
      store_some(y + places[j], activated(z[j]), left);
    }
  };
  if (activation == kNone) return end([](Vec x) { return x; });
  if (activation == kRelu) return end([](Vec x) { return activate<kRelu, float>(x); });
  end([=](Vec x) {
    activate<float>(&x, 1, activation);
    return x;
  });
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

void to_points(const float* x, int64_t stride_row, int64_t C, float* y, int64_t stride_point) {
  const auto rows = [=](int64_t c, int64_t left) {
    const float *r0 = x + c, *r1 = r0 + stride_row, *r2 = r1 + stride_row, *r3 = r2 + stride_row;
    float* to = y + c;
    row_to_points<false>(r2, r0, C, left, to, stride_point);
    row_to_points<true>(r1, r2, C, left, to + 6 * stride_point, stride_point);
    row_to_points<false>(r2, r1, C, left, to + 12 * stride_point, stride_point);
    row_to_points<false>(r3, r1, C, left, to + 18 * stride_point, stride_point);
  };
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) rows(c, kLanes);
  if (c < C) rows(c, C - c);
}

void from_points(const float* points, int64_t stride_point, int64_t N, const float* bias,
                 const float* residual, int64_t activation, int64_t rows, int64_t columns, float* y,
                 int64_t stride_row, int64_t stride_pixel) {
  const auto vector = [=](int64_t n, int64_t left) {
    const Vec shift = bias ? load_some(bias + n, left) : Vec{};
    const float* added = residual ? residual + n : nullptr;
    const int64_t places[] = {0, stride_pixel, 2 * stride_pixel, 3 * stride_pixel};
    row_of_pixels<true>(points + n, stride_point, shift, added, activation, columns, left, y + n,
                        places);
    if (rows > 1)
      row_of_pixels<false>(points + n, stride_point, shift, added ? added + stride_row : nullptr,
                           activation, columns, left, y + n + stride_row, places);
  };
  int64_t n = 0;
  for (; n + kLanes <= N; n += kLanes) vector(n, kLanes);
  if (n < N) vector(n, N - n);
}

}  // namespace hybridops::simd
