#include "conv.h"

#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

template <class E, class T>
HYBRIDOPS_INLINE E convert(T x) {
  if constexpr (std::is_same_v<E, T>)
    return x;
  else if constexpr (std::is_same_v<E, float>)
    return to_float(x);
  else
    return to_bfloat16(to_float(x));
}

// f(image's numbers, buffer), each of its own type.
template <class F>
void with_types(const Image& image, void* buffer, Type type, const F& f) {
  const auto to = [&](auto* y) {
    if (image.type == Type::kFloat) return f((const float*)image.data, y);
    if (image.type == Type::kByte) return f((const uint8_t*)image.data, y);
    f((const BFloat16*)image.data, y);
  };
  type == Type::kFloat ? to((float*)buffer) : to((BFloat16*)buffer);
}

template <class T, class E>
void load_rows(const Image& image, int64_t top, int64_t left, int64_t Wp, int64_t begin,
               int64_t end, const T* data, E* buffer) {
  for (int64_t row = begin; row < end; ++row) {
    E* to = buffer + row * Wp * image.C;
    const int64_t h = row - top;
    if (h < 0 || h >= image.H) {
      std::fill(to, to + Wp * image.C, E{});
      continue;
    }
    std::fill(to, to + left * image.C, E{});
    std::fill(to + (left + image.W) * image.C, to + Wp * image.C, E{});
    to += left * image.C;
    if (image.stride_c == 1) {  // channels lie side by side already
      for (int64_t w = 0; w < image.W; ++w, to += image.C) {
        const T* from = data + h * image.stride_h + w * image.stride_w;
        for (int64_t c = 0; c < image.C; ++c) to[c] = convert<E>(from[c]);
      }
      continue;
    }
    if (image.C == 3 && image.stride_w == 1) {  // in one pass: vectors of three planes interleave
      const T* from = data + h * image.stride_h;
      for (int64_t w = 0; w < image.W; ++w)
        for (int64_t c = 0; c < 3; ++c) to[3 * w + c] = convert<E>(from[c * image.stride_c + w]);
      continue;
    }
    for (int64_t c = 0; c < image.C; ++c) {
      const T* from = data + h * image.stride_h + c * image.stride_c;
      for (int64_t w = 0; w < image.W; ++w)
        to[w * image.C + c] = convert<E>(from[w * image.stride_w]);
    }
  }
}

// n numbers of a row of pixels.
template <class T, class E>
HYBRIDOPS_INLINE void copy_pixels(const T* from, int64_t stride, int64_t n, E* to) {
  if constexpr (!std::is_same_v<T, uint8_t>)
    if (stride == 1) {
      for (int64_t j = 0; j < n; j += kLanes) store_some(to + j, load_some(from + j, n - j), n - j);
      return;
    }
  for (int64_t j = 0; j < n; ++j) to[j] = convert<E>(from[j * stride]);
}

template <class T, class E>
void load_patch_rows(const Image& image, const PatchGrid& g, int64_t begin, int64_t end,
                     const T* data, E* patches) {
  const int64_t K = image.C * g.Kh * g.Kw;
  for (int64_t ho = begin; ho < end; ++ho, patches += g.Wo * K)
    for (int64_t run = 0; run < image.C * g.Kh; ++run) {  // all patches' parts of one row of pixels
      const int64_t c = run / g.Kh, h = ho * g.stride - g.top + run % g.Kh;
      const bool in_image = h >= 0 && h < image.H;
      const T* row = data + c * image.stride_c + h * image.stride_h;
      E* to = patches + run * g.Kw;
      for (int64_t wo = 0; wo < g.Wo; ++wo, to += K) {
        const int64_t w = wo * g.stride - g.left;
        if (in_image && w >= 0 && w + g.Kw <= image.W) {
          copy_pixels(row + w * image.stride_w, image.stride_w, g.Kw, to);
          continue;
        }
        const int64_t first = in_image ? std::clamp<int64_t>(-w, 0, g.Kw) : g.Kw;
        const int64_t last = std::clamp<int64_t>(image.W - w, first, g.Kw);
        std::fill(to, to + first, E{});
        copy_pixels(row + (w + first) * image.stride_w, image.stride_w, last - first, to + first);
        std::fill(to + last, to + g.Kw, E{});
      }
    }
}

template <class E>
HYBRIDOPS_INLINE const E* window_start(const E* buffer, const Window2d& w, int64_t pixel) {
  return buffer + (pixel / w.Wo * w.Wp + pixel % w.Wo) * w.stride * w.C;
}

template <class E, class T>
void pool_rows(const E* buffer, const Window2d& w, int64_t rows, T* y) {
  for (int64_t m = 0; m < rows * w.Wo; ++m) {
    const E* from = window_start(buffer, w, m);
    for (int64_t c = 0; c < w.C; c += kLanes) {
      const int64_t left = w.C - c;
      Vec best = splat(-__builtin_inff());
      for (int64_t i = 0; i < w.Kh; ++i)
        for (int64_t j = 0; j < w.Kw; ++j) {
          const Vec x = load_some(from + (i * w.Wp + j) * w.C + c, left);
          best = (x > best) | (x != x) ? x : best;
        }
      store_some(y + m * w.C + c, best, left);
    }
  }
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

void load_padded(const Image& image, int64_t top, int64_t left, int64_t Wp, int64_t begin,
                 int64_t end, void* buffer, Type type) {
  with_types(image, buffer, type, [&](const auto* from, auto* to) {
    load_rows(image, top, left, Wp, begin, end, from, to);
  });
}

void load_patches(const Image& image, const PatchGrid& grid, int64_t begin, int64_t end,
                  void* patches, Type type) {
  with_types(image, patches, type, [&](const auto* from, auto* to) {
    load_patch_rows(image, grid, begin, end, from, to);
  });
}

void gather_patches(const float* buffer, const Window2d& w, int64_t begin, int64_t rows,
                    float* patches) {
  const int64_t run = w.Kw * w.C;
  for (int64_t m = 0; m < rows; ++m) {
    const float* from = window_start(buffer, w, begin + m);
    for (int64_t i = 0; i < w.Kh; ++i, patches += run)
      std::copy_n(from + i * w.Wp * w.C, run, patches);
  }
}

void scatter_patches(const float* patches, const Window2d& w, int64_t begin, int64_t rows,
                     float* buffer) {
  const int64_t run = w.Kw * w.C;
  for (int64_t m = 0; m < rows; ++m) {
    float* to = const_cast<float*>(window_start(buffer, w, begin + m));
    for (int64_t i = 0; i < w.Kh; ++i, patches += run) {
      float* row = to + i * w.Wp * w.C;
      for (int64_t n = 0; n < run; n += kLanes)
        store_some(row + n, load_some(row + n, run - n) + load_some(patches + n, run - n), run - n);
    }
  }
}

void max_pool(const void* buffer, Type buffer_type, const Window2d& w, int64_t rows, void* y,
              Type type) {
  const auto from = [&](const auto* x) {
    type == Type::kFloat ? pool_rows(x, w, rows, (float*)y) : pool_rows(x, w, rows, (BFloat16*)y);
  };
  buffer_type == Type::kFloat ? from((const float*)buffer) : from((const BFloat16*)buffer);
}

}  // namespace hybridops::simd
