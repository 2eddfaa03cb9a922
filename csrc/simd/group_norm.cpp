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

template <class T>
void scaled(const T* x, const T* residual, const float* scale, const float* shift, int64_t rows,
            int64_t C, int64_t activation, T* y) {
  for (int64_t r = 0; r < rows; ++r, x += C, y += C)
    for (int64_t c = 0; c < C; c += kLanes) {
      const int64_t left = C - c;
      Vec z = fma(load_some(x + c, left), load_some(scale + c, left), load_some(shift + c, left));
      if (residual) z += load_some(residual + r * C + c, left);
      if (activation == kRelu)
        z = activate<kRelu, T>(z);
      else if (activation != kNone)
        activate<T>(&z, 1, activation);
      store_some(y + c, z, left);
    }
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

void scale_rows(const void* x, const void* residual, Type type, const float* scale,
                const float* shift, int64_t rows, int64_t C, int64_t activation, void* y) {
  if (type == Type::kFloat)
    scaled((const float*)x, (const float*)residual, scale, shift, rows, C, activation, (float*)y);
  else
    scaled((const BFloat16*)x, (const BFloat16*)residual, scale, shift, rows, C, activation,
           (BFloat16*)y);
}

}  // namespace hybridops::simd
