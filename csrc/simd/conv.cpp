#include "conv.h"

#include <algorithm>

#include "vec.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

template <class T>
void load_rows(const Image& image, int64_t top, int64_t left, int64_t Wp, int64_t begin,
               int64_t end, float* buffer) {
  const T* data = (const T*)image.data;
  for (int64_t row = begin; row < end; ++row) {
    float* to = buffer + row * Wp * image.C;
    const int64_t h = row - top;
    if (h < 0 || h >= image.H) {
      std::fill(to, to + Wp * image.C, 0.0f);
      continue;
    }
    std::fill(to, to + left * image.C, 0.0f);
    std::fill(to + (left + image.W) * image.C, to + Wp * image.C, 0.0f);
    to += left * image.C;
    if (image.stride_c == 1) {  // channels lie side by side already
      for (int64_t w = 0; w < image.W; ++w, to += image.C) {
        const T* from = data + h * image.stride_h + w * image.stride_w;
        for (int64_t c = 0; c < image.C; ++c) to[c] = to_float(from[c]);
      }
      continue;
    }
    for (int64_t c = 0; c < image.C; ++c) {
      const T* from = data + h * image.stride_h + c * image.stride_c;
      for (int64_t w = 0; w < image.W; ++w)
        to[w * image.C + c] = to_float(from[w * image.stride_w]);
    }
  }
}

template <class T>
void load_plane_rows(const Image& image, int64_t top, int64_t left, int64_t Hp, int64_t Wp,
                     float* buffer) {
  const T* data = (const T*)image.data;
  std::fill(buffer, buffer + image.C * Hp * Wp, 0.0f);
  for (int64_t c = 0; c < image.C; ++c)
    for (int64_t h = 0; h < image.H; ++h) {
      const T* from = data + c * image.stride_c + h * image.stride_h;
      float* to = buffer + (c * Hp + h + top) * Wp + left;
      for (int64_t w = 0; w < image.W; ++w) to[w] = to_float(from[w * image.stride_w]);
    }
}

HYBRIDOPS_INLINE const float* window_start(const float* buffer, const Window2d& w, int64_t pixel) {
  return buffer + (pixel / w.Wo * w.Wp + pixel % w.Wo) * w.stride * w.C;
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

void load_padded(const Image& image, int64_t top, int64_t left, int64_t Wp, int64_t begin,
                 int64_t end, float* buffer) {
  if (image.type == Type::kFloat) return load_rows<float>(image, top, left, Wp, begin, end, buffer);
  if (image.type == Type::kByte)
    return load_rows<uint8_t>(image, top, left, Wp, begin, end, buffer);
  load_rows<BFloat16>(image, top, left, Wp, begin, end, buffer);
}

void load_planes(const Image& image, int64_t top, int64_t left, int64_t Hp, int64_t Wp,
                 float* buffer) {
  if (image.type == Type::kFloat) return load_plane_rows<float>(image, top, left, Hp, Wp, buffer);
  if (image.type == Type::kByte) return load_plane_rows<uint8_t>(image, top, left, Hp, Wp, buffer);
  load_plane_rows<BFloat16>(image, top, left, Hp, Wp, buffer);
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

void max_pool_row(const float* buffer, const Window2d& w, int64_t ho, void* y, Type type) {
  for (int64_t wo = 0; wo < w.Wo; ++wo) {
    const float* from = window_start(buffer, w, ho * w.Wo + wo);
    for (int64_t c = 0; c < w.C; c += kLanes) {
      const int64_t left = w.C - c;
      Vec best = splat(-__builtin_inff());
      for (int64_t i = 0; i < w.Kh; ++i)
        for (int64_t j = 0; j < w.Kw; ++j) {
          const Vec x = load_some(from + (i * w.Wp + j) * w.C + c, left);
          best = (x > best) | (x != x) ? x : best;
        }
      const int64_t at = (ho * w.Wo + wo) * w.C + c;
      if (type == Type::kFloat)
        store_some((float*)y + at, best, left);
      else
        store_some((BFloat16*)y + at, best, left);
    }
  }
}

}  // namespace hybridops::simd
