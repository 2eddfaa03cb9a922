#include "batch_norm.h"

#include <algorithm>
#include <type_traits>

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

constexpr int kTogether = 4;  // taken together: what belongs to a channel is loaded once for them

// dy * activation'(z), as torch has it at the corners.
template <Activation kind>
HYBRIDOPS_INLINE Vec through(Vec dy, Vec z) {
  if constexpr (kind == kRelu) return z <= 0.0f ? Vec{} : dy;
  if constexpr (kind == kSilu) {
    const Vec gate = 1.0f / (exp(-z) + 1.0f);
    return dy * gate * fma(z, 1.0f - gate, splat(1.0f));
  }
  if constexpr (kind == kHardswish) {
    const Vec between = dy * fma(z, splat(1.0f / 3.0f), splat(0.5f));
    return z < -3.0f ? Vec{} : (z <= 3.0f ? between : dy);
  }
  return dy;
}

// Sums move through memory every kTogether rows only, and roundings grow slower for it.
template <Activation kind, int R, class T>
HYBRIDOPS_INLINE void add_rows(const T* dy, const T* x, const Normed& at, int64_t C, float* sums) {
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t left = C - c;
    const Vec scale = load_some(at.scale + c, left), shift = load_some(at.shift + c, left),
              mean = load_some(at.mean + c, left);
    Vec s{}, w{};
    HYBRIDOPS_UNROLL for (int r = 0; r < R; ++r) {
      const Vec value = load_some(x + r * C + c, left);
      const Vec g = through<kind>(load_some(dy + r * C + c, left), fma(value, scale, shift));
      s += g;
      w = fma(g, value - mean, w);
    }
    store_some(sums + c, load_some(sums + c, left) + s, left);
    store_some(sums + C + c, load_some(sums + C + c, left) + w, left);
  }
}

template <Activation kind, int R, class T>
HYBRIDOPS_INLINE void write_rows(const T* dy, const T* x, const Normed& at, const float* slope,
                                 const float* offset, int64_t C, T* dx) {
  for (int64_t c = 0; c < C; c += kLanes) {
    const int64_t left = C - c;
    const Vec scale = load_some(at.scale + c, left), shift = load_some(at.shift + c, left),
              mean = load_some(at.mean + c, left), k = load_some(slope + c, left),
              o = load_some(offset + c, left);
    HYBRIDOPS_UNROLL for (int r = 0; r < R; ++r) {
      const Vec value = load_some(x + r * C + c, left);
      const Vec g = through<kind>(load_some(dy + r * C + c, left), fma(value, scale, shift));
      store_some(dx + r * C + c, fma(scale, g, fma(k, value - mean, o)), left);
    }
  }
}

// f(kind): the activation is chosen outside the loops.
template <class F>
void with_activation(int64_t activation, const F& f) {
  switch (activation) {
    case kRelu:
      return f(std::integral_constant<Activation, kRelu>{});
    case kSilu:
      return f(std::integral_constant<Activation, kSilu>{});
    case kHardswish:
      return f(std::integral_constant<Activation, kHardswish>{});
    default:
      return f(std::integral_constant<Activation, kNone>{});
  }
}

template <class F>
void with_type(Type type, const F& f) {
  type == Type::kFloat ? f(float{}) : f(BFloat16{});
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

void gradient_sums(const void* dy, const void* x, Type type, const Normed& normed, int64_t rows,
                   int64_t C, float* sums) {
  std::fill(sums, sums + 2 * C, 0.0f);
  with_type(type, [&](auto number) {
    with_activation(normed.activation, [&](auto kind) {
      const auto *from = (const decltype(number)*)dy, *at = (const decltype(number)*)x;
      int64_t r = 0;
      for (; r + kTogether <= rows; r += kTogether)
        add_rows<kind(), kTogether>(from + r * C, at + r * C, normed, C, sums);
      for (; r < rows; ++r) add_rows<kind(), 1>(from + r * C, at + r * C, normed, C, sums);
    });
  });
}

void gradient_rows(const void* dy, const void* x, Type type, const Normed& normed,
                   const float* slope, const float* offset, int64_t rows, int64_t C, void* dx) {
  with_type(type, [&](auto number) {
    with_activation(normed.activation, [&](auto kind) {
      const auto *from = (const decltype(number)*)dy, *at = (const decltype(number)*)x;
      auto* to = (decltype(number)*)dx;
      int64_t r = 0;
      for (; r + kTogether <= rows; r += kTogether)
        write_rows<kind(), kTogether>(from + r * C, at + r * C, normed, slope, offset, C,
                                      to + r * C);
      for (; r < rows; ++r)
        write_rows<kind(), 1>(from + r * C, at + r * C, normed, slope, offset, C, to + r * C);
    });
  });
}

}  // namespace hybridops::simd
