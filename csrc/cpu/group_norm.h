// GroupNorm of channels_last images in two steps, so that what computes an image can add up its
// numbers while they are in cache.
#pragma once
#include "../simd/group_norm.h"
#include "common.h"

namespace hybridops {

struct GroupNorm {
  int64_t groups;
  const float *weight, *bias;  // null: ones, zeros
  double eps;

  GroupNorm(Room& room, int64_t channels, int64_t groups, const std::optional<Tensor>& weight,
            const std::optional<Tensor>& bias, double eps, simd::Type type);
};

// Per channel the sums of B images of M pixels, each image cut into the same parts: differences to
// a pivot near a part's mean, and their squares, so that nothing cancels where the variance is
// formed. By which threads the parts are added changes no bit.
class ImageSums {
 public:
  ImageSums(Room& room, int64_t B, int64_t M, int64_t C, int64_t parts)
      : B(B), M(M), C(C), parts(parts), numbers_(room.take(B * parts * 3 * C)) {}

  const int64_t B, M, C, parts;
  int64_t first(int64_t part) const { return part * M / parts; }  // pixel of the image

  // Of part `part` of image b, whose pixels, of all channels, begin at x: these channels.
  void add(int64_t b, int64_t part, const void* x, simd::Type type, int64_t channel,
           int64_t channels) const;

  // y = activation(norm(x) + residual), x (B, M, C); y and residual like x, residual null: none.
  void normalize(const GroupNorm& norm, const void* x, simd::Type type, const void* residual,
                 int64_t activation, void* y) const;

 private:
  void affine(const GroupNorm& norm, int64_t b, float* affine) const;
  float* numbers_;  // (B, parts, 3, C): pivot, sum, sum of squares
};

}  // namespace hybridops
