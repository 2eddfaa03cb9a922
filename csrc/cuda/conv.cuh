// The convolution of conv_stem and patch_embed, straight from the image to tokens: conv.cu has it.
#pragma once
#include "window.cuh"

namespace hybridops::cuda {

struct Convolution {
  Image image;
  Tensor weight;  // (Co, Ci, KH, KW), any strides
  std::optional<Tensor> bias;
  Sight sight;
  int64_t activation;
  std::optional<Tensor> norm_weight, norm_bias;  // LayerNorm over Co behind the activation
  double eps;
  std::optional<Tensor> position;  // (cells, Co), any strides, added last
};

// The four from `first` on.
Padding padding_of(const std::vector<int64_t>& sides, size_t first, const char* op);
Image image_of(const Tensor& image, const Tensor& weight, const char* op);
Image image_of_tokens(const Tensor& tokens, int64_t H, int64_t W);

// Where the Co numbers of image b, cell (h, w) go: the strides, of the whole.
struct Places {
  int64_t start, stride_b, stride_h, stride_w;
};
void convolve(const Device& device, const Convolution& c, Tensor& y, const Places& places,
              const char* op);

// Two convolutions with bias and activation, the second's on the first's tokens, which stay in
// shared memory: conv_pair.cu. y is contiguous.
struct Pair {
  Image image;
  Tensor first, second;  // weights
  std::optional<Tensor> first_bias, second_bias;
  Sight first_sight, second_sight;
  int64_t first_activation, second_activation;
};
// Whether they are small enough for it.
bool fits_pair(const Pair& pair);
void convolve(const Device& device, const Pair& pair, Tensor& y, const char* op);

}  // namespace hybridops::cuda
