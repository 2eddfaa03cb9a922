// What happens to rows of numbers around a product: conversions, activations, LayerNorm, sums.
#include <cmath>
#include <type_traits>

#include "activation.h"
#include "product.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

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

template <class T, class Y>
void layer_norm_rows(const T* x, int64_t stride_x, int64_t rows, int64_t n, const float* weight,
                     const float* bias, float eps, Y* y, int64_t stride_y) {
  for (int64_t r = 0; r < rows; ++r, x += stride_x, y += stride_y) {
    const float near = sum_row(x, n, [](Vec v) { return v; }) / (float)n;
    // What rounding took from it: a row of equal numbers is then that number exactly.
    const float mean = near + sum_row(x, n, [near](Vec v) { return v - near; }) / (float)n;
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

void activate_numbers(const void* x, Type type, int64_t n, int64_t activation, void* y) {
  constexpr int64_t kTogether = 4 * kLanes;
  const auto run = [=](const auto* from, auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    for (int64_t i = 0; i < n; i += kTogether) {
      Vec some[4];
      HYBRIDOPS_UNROLL for (int v = 0; v < 4; ++v) {
        const int64_t at = i + v * kLanes;
        some[v] = at < n ? load_some(from + at, n - at) : Vec{};
      }
      activate<T>(some, 4, activation);
      HYBRIDOPS_UNROLL for (int v = 0; v < 4; ++v) {
        const int64_t at = i + v * kLanes;
        if (at < n) store_some(to + at, some[v], n - at);
      }
    }
  };
  type == Type::kFloat ? run((const float*)x, (float*)y) : run((const BFloat16*)x, (BFloat16*)y);
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
                const float* weight, const float* bias, float eps, void* y, Type type_y,
                int64_t stride_y) {
  const auto run = [&](const auto* from, auto* to) {
    layer_norm_rows(from, stride_x, rows, n, weight, bias, eps, to, stride_y);
  };
  const auto run_to = [&](auto* to) {
    type == Type::kFloat ? run((const float*)x, to) : run((const BFloat16*)x, to);
  };
  type_y == Type::kFloat ? run_to((float*)y) : run_to((BFloat16*)y);
}

void add_rows(const float* x, int64_t stride_x, int64_t rows, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += kLanes) {
    Vec total{};
    for (int64_t r = 0; r < rows; ++r) total += load_some(x + r * stride_x + i, n - i);
    store_some(y + i, load_some(y + i, n - i) + total, n - i);
  }
}

}  // namespace hybridops::simd
