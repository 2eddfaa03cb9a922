// Activations by the code that hybridops/ops/_contract.py gives them.
#pragma once
#include <type_traits>

#include "vec.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {

enum Activation : int64_t { kNone, kRelu, kGelu, kGeluTanh, kSilu, kHardswish };

// The standard normal distribution's function as 1/2 + x R(x^2), minimax fits of our own: in fp32 R
// is P / Q on x^2 <= 32, 2e-8 in x^1.5 R; for results that become bf16 a polynomial on x^2 <= 18,
// 8e-5 in GELU, a third of a bf16 step at 0.1. Beyond, R is held and x goes on, so that the sum
// leaves [0, 1] and is exactly 0 or 1. The constant comes first in each comparison, so that a NaN
// passes through.
template <class T>
HYBRIDOPS_INLINE Vec normal_cdf(Vec x) {
  const Vec half = splat(0.5f);
  Vec p;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Vec u = min(splat(18.0f), x * x);
    p = splat(-8.5441184e-10f);
    p = fma(p, u, splat(7.626970699e-08f));
    p = fma(p, u, splat(-2.9539503429887235e-06f));
    p = fma(p, u, splat(6.573728751391172e-05f));
    p = fma(p, u, splat(-9.420356946066022e-04f));
    p = fma(p, u, splat(9.264168329536915e-03f));
    p = fma(p, u, splat(-6.546534597873688e-02f));
    p = fma(p, u, splat(0.39842835f));
    p = fma(x, p, half);
  } else {
    const Vec u = min(splat(32.0f), x * x);
    p = splat(1.8497319892e-02f);
    Vec q = u + splat(6.628374481e+01f);
    p = fma(p, u, splat(5.485175610e+00f));
    q = fma(q, u, splat(1.670838379e+03f));
    p = fma(p, u, splat(1.549759674e+02f));
    q = fma(q, u, splat(2.5085384766e+04f));
    p = fma(p, u, splat(4.061162109e+03f));
    q = fma(q, u, splat(2.17584953125e+05f));
    p = fma(p, u, splat(2.9992498047e+04f));
    q = fma(q, u, splat(8.544376875e+05f));
    p = fma(p, u, splat(3.4087121875e+05f));
    p = fma(x * p, reciprocal(q), half);
  }
  return max(Vec{}, min(splat(1.0f), p));
}

// T: what the result is rounded to.
template <Activation kind, class T>
HYBRIDOPS_INLINE Vec activate(Vec x) {
  if constexpr (kind == kRelu) return max(Vec{}, x);  // NaN stays NaN
  if constexpr (kind == kGelu) return x * normal_cdf<T>(x);
  if constexpr (kind == kGeluTanh) {  // 0.5 x (1 + tanh(t)) = x sigmoid(2t)
    const Vec t = x * 1.5957691216057308f * fma(x * x, splat(0.044715f), splat(1.0f));
    return x / (exp(-t) + 1.0f);  // not a reciprocal: the denominator may be infinite
  }
  if constexpr (kind == kSilu) return x / (exp(-x) + 1.0f);
  if constexpr (kind == kHardswish) {
    const Vec gate = max(min(x + 3.0f, splat(6.0f)), Vec{});
    return x * gate * (1.0f / 6.0f);
  }
  return x;
}

// Over n vectors that lie in a row; the switch stands outside the loop.
template <class T>
HYBRIDOPS_INLINE void activate(Vec* x, int n, int64_t kind) {
  switch (kind) {
    case kRelu:
      for (int i = 0; i < n; ++i) x[i] = activate<kRelu, T>(x[i]);
      break;
    case kGelu:
      for (int i = 0; i < n; ++i) x[i] = activate<kGelu, T>(x[i]);
      break;
    case kGeluTanh:
      for (int i = 0; i < n; ++i) x[i] = activate<kGeluTanh, T>(x[i]);
      break;
    case kSilu:
      for (int i = 0; i < n; ++i) x[i] = activate<kSilu, T>(x[i]);
      break;
    case kHardswish:
      for (int i = 0; i < n; ++i) x[i] = activate<kHardswish, T>(x[i]);
      break;
    default:
      break;
  }
}

}  // namespace HYBRIDOPS_SIMD
}  // namespace hybridops::simd
