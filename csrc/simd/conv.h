// What a convolution needs around the product: images in and out of padded buffers.
#pragma once
#include <cstdint>

#include "product.h"

namespace hybridops::simd {

// One image of any layout: element (c, h, w) lies at c * stride_c + h * stride_h + w * stride_w.
struct Image {
  const void* data;
  Type type;
  int64_t C, H, W, stride_c, stride_h, stride_w;
};

// Rows [begin, end) of a buffer (Hp, Wp, C), of a product type, that holds the image at (top, left)
// and zeros around it.
void load_padded(const Image& image, int64_t top, int64_t left, int64_t Wp, int64_t begin,
                 int64_t end, void* buffer, Type type);

// Patches of Kh x Kw pixels, `stride` apart, the first of them `top` and `left` of the image's
// edge.
struct PatchGrid {
  int64_t Kh, Kw, stride, top, left, Wo;
};

// Patch rows [begin, end), Wo patches each, as rows (C, Kh, Kw) of a product type that lie side by
// side, plane after plane; zeros outside the image.
void load_patches(const Image& image, const PatchGrid& grid, int64_t begin, int64_t end,
                  void* patches, Type type);

struct Window2d {
  int64_t Kh, Kw, stride, C, Wp, Wo;  // of a (Hp, Wp, C) buffer
};

// patches[m] = the Kh * Kw * C numbers under output pixel begin + m, in rows of Kh * Kw * C.
void gather_patches(const float* buffer, const Window2d& w, int64_t begin, int64_t rows,
                    float* patches);
// buffer += patches, back to where gather_patches read them.
void scatter_patches(const float* patches, const Window2d& w, int64_t begin, int64_t rows,
                     float* buffer);

// Max-pool of a (Hp, Wp, C) buffer: so many rows of (Wo, C) numbers in `type`. NaN wins.
void max_pool(const void* buffer, Type buffer_type, const Window2d& w, int64_t rows, void* y,
              Type type);

}  // namespace hybridops::simd
