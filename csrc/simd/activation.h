// Activations by the code that hybridops/ops/_contract.py gives them.
#pragma once
#include <type_traits>

#include "vec.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {

enum Activation : int64_t { kNone, kRelu, kGelu, kGeluTanh, kSilu, kHardswish };

// erf(z) as z P(z^2) / Q(z^2), a minimax fit of our own on |z| <= 3.92: absolute error 3e-7. At 4
// the fit is 1 + 1.5e-7, so that from there on the result is exactly +-1. The constant comes first
// in each comparison, so that a NaN passes through.
HYBRIDOPS_INLINE Vec erf(Vec z) {
  z = max(splat(-4.0f), min(splat(4.0f), z));
  const Vec u = z * z;
  Vec p = splat(2.0347802092146594e-06f), q = splat(3.8071000744821504e-05f);
  p = fma(p, u, splat(2.8747718897648156e-04f));
  q = fma(q, u, splat(1.1880795937031507e-03f));
  p = fma(p, u, splat(3.8681700825691223e-03f));
  q = fma(q, u, splat(1.5171977691352367e-02f));
  p = fma(p, u, splat(5.3059995174407959e-02f));
  q = fma(q, u, splat(1.1508304625749588e-01f));
  p = fma(p, u, splat(1.9276019930839539e-01f));
  q = fma(q, u, splat(5.0416094064712524e-01f));
  p = fma(p, u, splat(1.1283789873123169f));
  q = fma(q, u, splat(1.0f));
  return max(splat(-1.0f), min(splat(1.0f), z * p * reciprocal(q)));
}

// erf(x / sqrt 2) where x (1 + erf) / 2 becomes bf16: a polynomial in x^2, minimax in that product
// on |x| <= 3 sqrt 2 (8e-5, a third of a bf16 step at 0.1), exactly +-1 beyond. Half the work of
// erf.
HYBRIDOPS_INLINE Vec short_erf(Vec x) {
  x = max(splat(-4.2426405f), min(splat(4.2426405f), x));
  const Vec u = x * x;
  Vec p = splat(-1.7088236381468391e-09f);
  p = fma(p, u, splat(1.5253941398896131e-07f));
  p = fma(p, u, splat(-5.907900685997447e-06f));
  p = fma(p, u, splat(1.3147457502782345e-04f));
  p = fma(p, u, splat(-1.8840713892132044e-03f));
  p = fma(p, u, splat(1.852833665907383e-02f));
  p = fma(p, u, splat(-1.3093069195747375e-01f));
  p = fma(p, u, splat(7.968567e-01f));
  return max(splat(-1.0f), min(splat(1.0f), x * p));
}

// T: what the result is rounded to.
template <Activation kind, class T>
HYBRIDOPS_INLINE Vec activate(Vec x) {
  if constexpr (kind == kRelu) return max(Vec{}, x);  // NaN stays NaN
  if constexpr (kind == kGelu) {
    const Vec half = x * 0.5f;
    if constexpr (std::is_same_v<T, BFloat16>) return fma(half, short_erf(x), half);
    return fma(half, erf(x * 0.70710678118654752f), half);
  }
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
