#include "group_norm.h"

#include <algorithm>

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

constexpr int kRows =
    4;  // pixels summed by themselves: roundings grow slower, sums move less often

template <int R, class T>
HYBRIDOPS_INLINE void add_rows(const T* x, const float* pivot, int64_t C, int64_t stride,
                               float* sum, float* square) {
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t left = C - c;
    const Vec at = load_some(pivot + c, left);
    Vec s{}, q{};
    HYBRIDOPS_UNROLL for (int r = 0; r < R; ++r) {
      const Vec d = load_some(x + r * stride + c, left) - at;
      s += d;
      q = fma(d, d, q);
    }
    store_some(sum + c, load_some(sum + c, left) + s, left);
    store_some(square + c, load_some(square + c, left) + q, left);
  }
}

template <class T>
void sums_of(const T* x, const float* pivot, int64_t rows, int64_t C, int64_t stride, float* sums) {
  std::fill(sums, sums + 2 * C, 0.0f);
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    add_rows<kRows>(x + r * stride, pivot, C, stride, sums, sums + C);
  for (; r < rows; ++r) add_rows<1>(x + r * stride, pivot, C, stride, sums, sums + C);
}

// R pixels at a time, so that mean, scale and shift are loaded once for all of them.
template <int R, bool kAdds, class T, class F>
HYBRIDOPS_INLINE void scaled(const T* x, const T* residual, const float* affine, int64_t C, T* y,
                             const F& activated) {
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t left = C - c;
    const Vec mean = load_some(affine + c, left), factor = load_some(affine + C + c, left);
    const Vec term = load_some(affine + 2 * C + c, left);
    HYBRIDOPS_UNROLL for (int r = 0; r < R; ++r) {
      const int64_t at = r * C + c;
      Vec z = fma(load_some(x + at, left) - mean, factor, term);
      if constexpr (kAdds) z += load_some(residual + at, left);
      store_some(y + at, activated(z), left);
    }
  }
}

template <bool kAdds, class T, class F>
HYBRIDOPS_INLINE void scale_all(const T* x, const T* residual, const float* affine, int64_t rows,
                                int64_t C, T* y, const F& activated) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows, x += kRows * C, residual += kAdds ? kRows * C : 0)
    scaled<kRows, kAdds>(x, residual, affine, C, y + r * C, activated);
  for (; r < rows; ++r, x += C, residual += kAdds ? C : 0)
    scaled<1, kAdds>(x, residual, affine, C, y + r * C, activated);
}

template <class T>
void scale_rows_of(const T* x, const T* residual, const float* affine, int64_t rows, int64_t C,
                   int64_t activation, T* y) {
  const auto with = [&](const auto& activated) {
    residual ? scale_all<true>(x, residual, affine, rows, C, y, activated)
             : scale_all<false>(x, residual, affine, rows, C, y, activated);
  };
  if (activation == kNone) return with([](Vec z) { return z; });
  if (activation == kRelu) return with([](Vec z) { return activate<kRelu, T>(z); });
  with([=](Vec z) {
    activate<T>(&z, 1, activation);
    return z;
  });
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

void channel_sums(const void* x, Type type, const float* pivot, int64_t rows, int64_t C,
                  int64_t stride, float* sums) {
  if (type == Type::kFloat)
    sums_of((const float*)x, pivot, rows, C, stride, sums);
  else
    sums_of((const BFloat16*)x, pivot, rows, C, stride, sums);
}

void scale_rows(const void* x, const void* residual, Type type, const float* affine, int64_t rows,
                int64_t C, int64_t activation, void* y) {
  if (type == Type::kFloat)
    scale_rows_of((const float*)x, (const float*)residual, affine, rows, C, activation, (float*)y);
  else
    scale_rows_of((const BFloat16*)x, (const BFloat16*)residual, affine, rows, C, activation,
                  (BFloat16*)y);
}

}  // namespace hybridops::simd
