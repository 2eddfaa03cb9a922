// hybridops::conv_stem and conv_backward: see hybridops/ops/conv_stem.py for the meaning.
//
// A convolution is the product with its rows read in place: in a padded (H, W, C) buffer the patch
// under an output pixel is Kh runs of Kw * C numbers, so nothing is unfolded. Images go through the
// chain one at a time, which keeps the intermediates in cache.
#include <cmath>
#include <cstring>

#include "../simd/conv.h"
#include "linear.h"

namespace hybridops {
namespace {

using simd::Depth;
using simd::Grid;
using simd::Image;
using simd::Output;
using simd::Rows;
using simd::Type;
using simd::Window2d;

struct Sides {
  int64_t top, left, bottom, right;
};

struct Size {
  int64_t H, W;
  Size after(int64_t Kh, int64_t Kw, int64_t stride, const Sides& p) const {
    return {(H + p.top + p.bottom - Kh) / stride + 1, (W + p.left + p.right - Kw) / stride + 1};
  }
};

struct Layer {
  const float *packed, *bias;
  int64_t Kh, Kw, Ci, Co, stride, activation;
  Sides padding;
  Size in, out;
};

Image image_of(const Tensor& x, int64_t b) {
  return {offset(x.const_data_ptr(), type_of(x), b * x.stride(0)),
          type_of(x),
          x.size(1),
          x.size(2),
          x.size(3),
          x.stride(1),
          x.stride(2),
          x.stride(3)};
}

// The rows of a (Hp, Wp, C) buffer under the output pixels of a convolution.
Rows patches(const void* buffer, Type type, int64_t Wp, const Layer& l) {
  const Grid grid{l.out.W, l.stride * Wp * l.Ci, l.stride * l.Ci};
  return {buffer, type, grid, l.Kw * l.Ci, l.Kh, Wp * l.Ci};
}

template <class E>
void clear_border(E* buffer, int64_t C, const Size& inner, const Sides& p, E value) {
  const int64_t Wp = inner.W + p.left + p.right;
  std::fill(buffer, buffer + p.top * Wp * C, value);
  for (int64_t h = 0; h < inner.H; ++h) {
    E* row = buffer + (p.top + h) * Wp * C;
    std::fill(row, row + p.left * C, value);
    std::fill(row + (p.left + inner.W) * C, row + Wp * C, value);
  }
  std::fill(buffer + (p.top + inner.H) * Wp * C, buffer + (p.top + inner.H + p.bottom) * Wp * C,
            value);
}

constexpr uint16_t kMinusInfinity = 0xff80;  // in bf16

// Zeros around what a convolution reads, -infinity around what a pool does.
void clear_border(void* buffer, Type type, int64_t C, const Size& inner, const Sides& p,
                  bool for_pool) {
  if (type == Type::kFloat)
    clear_border((float*)buffer, C, inner, p, for_pool ? -INFINITY : 0.0f);
  else
    clear_border((uint16_t*)buffer, C, inner, p, for_pool ? kMinusInfinity : uint16_t{0});
}

int64_t padded_floats(const Size& s, const Sides& p, int64_t C) {
  return (s.H + p.top + p.bottom) * (s.W + p.left + p.right) * C;
}

Sides sides_at(const std::vector<int64_t>& paddings, size_t i) {
  STD_TORCH_CHECK(paddings.size() >= 4 * i + 4, "conv_stem: paddings are too few");
  for (size_t s = 0; s < 4; ++s)
    STD_TORCH_CHECK(paddings[4 * i + s] >= 0 && paddings[4 * i + s] <= kLargestPadding,
                    "conv_stem: bad padding");
  return {paddings[4 * i], paddings[4 * i + 1], paddings[4 * i + 2], paddings[4 * i + 3]};
}

// Of a pool {kernel, stride, top, left, bottom, right} over images of that size.
Sides pool_sides(const std::vector<int64_t>& pool, const Size& size) {
  STD_TORCH_CHECK(pool.size() == 6 && pool[0] > 0 && pool[1] > 0, "conv_stem: no such pool");
  for (size_t i = 2; i < 6; ++i)
    STD_TORCH_CHECK(pool[i] >= 0 && pool[i] <= kLargestPadding, "conv_stem: bad padding");
  STD_TORCH_CHECK(pool[0] <= size.H + pool[2] + pool[4] && pool[0] <= size.W + pool[3] + pool[5],
                  "conv_stem: the pool does not fit");
  return {pool[2], pool[3], pool[4], pool[5]};
}

std::vector<Layer> plan(Scratch& scratch, const Tensor& image, const std::vector<Tensor>& weights,
                        const std::vector<Tensor>& biases, const std::vector<Tensor>& packed,
                        const std::vector<int64_t>& strides, const std::vector<int64_t>& paddings,
                        const std::vector<int64_t>& activations) {
  const size_t L = weights.size();
  STD_TORCH_CHECK(image.dim() == 4 && L > 0 && image.is_cpu() && biases.size() == L &&
                      strides.size() == L && activations.size() == L &&
                      (packed.empty() || packed.size() == L),
                  "conv_stem: the lists of layers differ in length");
  std::vector<Layer> layers;
  Size size{image.size(2), image.size(3)};
  int64_t channels = image.size(1);
  for (size_t i = 0; i < L; ++i) {
    STD_TORCH_CHECK(weights[i].dim() == 4 && weights[i].size(1) == channels &&
                        biases[i].numel() == weights[i].size(0) && weights[i].is_cpu() &&
                        type_of(weights[i]) == type_of(weights[0]) && biases[i].is_cpu(),
                    "conv_stem: weight or bias does not fit");
    Layer l{};
    l.Co = weights[i].size(0), l.Ci = channels, l.Kh = weights[i].size(2),
    l.Kw = weights[i].size(3);
    l.stride = strides[i], l.activation = activations[i], l.padding = sides_at(paddings, i);
    STD_TORCH_CHECK(l.stride > 0 && size.H + l.padding.top + l.padding.bottom >= l.Kh &&
                        size.W + l.padding.left + l.padding.right >= l.Kw,
                    "conv_stem: a layer does not fit its input");
    l.in = size, l.out = size = size.after(l.Kh, l.Kw, l.stride, l.padding);
    const Depth K{simd::product_type(type_of(weights[i])), l.Kw * l.Ci, l.Kh};
    if (packed.empty()) {  // (Co, Kh, Kw, Ci): the order in which a patch lies in the buffer
      Tensor w = torch::stable::contiguous(
          torch::stable::transpose(torch::stable::transpose(weights[i], 1, 2), 2, 3));
      l.packed =
          pack_weight(scratch, w.const_data_ptr(), type_of(w), K.length * K.runs, 1, l.Co, K);
    } else {
      l.packed = check_packed(packed[i], l.Co, K, "conv_stem: packed is not pack_conv(weight)");
    }
    l.bias = floats(scratch, biases[i]);
    layers.push_back(l);
    channels = l.Co;
  }
  return layers;
}

// The last layer and the pool behind it, a band of pooled rows at a time: what the layer gives for
// an 800 x 1066 image is 55 MB, and here never leaves the cache.
void pooled_layer(const Rows& patches, const Layer& l, Type between,
                  const std::vector<int64_t>& pool, const Sides& around, const Size& size,
                  void* out, Type type) {
  constexpr int64_t kBand = 1 << 18;  // bytes of a band, about
  const int64_t K = pool[0], C = l.Co;
  const int64_t Wp = around.left + l.out.W + around.right, row = Wp * C;
  // no more than there are: of one row of windows any stride is as good
  const int64_t stride = std::min(pool[1], around.top + l.out.H + around.bottom);
  const int64_t band = std::clamp<int64_t>(kBand / (row * stride * size_of(between)), 1, size.H);
  const Window2d window{K, K, pool[1], C, Wp, size.W};
  parallel(size.H, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    void* buffer = scratch.take(((band - 1) * stride + K) * row);
    int64_t done = 0;  // rows in front of this one are computed, or will not be read
    for (int64_t ho = begin; ho < end; ho += band) {
      const int64_t n = std::min(band, end - ho);
      const int64_t first = ho * stride, last = first + (n - 1) * stride + K;  // padding included
      if (done > first)  // the last band's last rows are this one's first
        std::memmove(buffer, offset(buffer, between, band * stride * row),
                     (done - first) * row * size_of(between));
      done = std::max(done, first);
      const int64_t top = std::clamp(around.top, done, last);
      const int64_t bottom = std::clamp(around.top + l.out.H, top, last);
      const auto at = [&](int64_t r) { return offset(buffer, between, (r - first) * row); };
      clear_border(at(done), between, C, {bottom - top, l.out.W},
                   {top - done, around.left, last - bottom, around.right}, true);
      const int64_t from = top - around.top;  // of the layer's own rows
      Rows rows = patches;
      rows.data = offset(patches.data, between, from * patches.grid.outer_stride);
      Output output{offset(at(top), between, around.left * C), between, {l.out.W, row, C}};
      output.bias = l.bias;
      output.activation = l.activation;
      output.few_rows = l.out.H * l.out.W < 4;
      simd::product(rows, 0, (bottom - top) * l.out.W, l.packed, C, 0, simd::panel_count(C),
                    output);
      done = last;
      for (int64_t i = 0; i < n; ++i)
        simd::max_pool_row(buffer, between, window, i, offset(out, type, ho * size.W * C), type);
    }
  });
}

Tensor conv_stem(Tensor image, std::vector<Tensor> weights, std::vector<Tensor> biases,
                 std::vector<Tensor> packed, std::vector<int64_t> strides,
                 std::vector<int64_t> paddings, std::vector<int64_t> activations,
                 std::vector<int64_t> pool) {
  Scratch scratch;
  const std::vector<Layer> layers =
      plan(scratch, image, weights, biases, packed, strides, paddings, activations);
  const Layer& last = layers.back();
  const bool has_pool = !pool.empty();
  const Sides around = has_pool ? pool_sides(pool, last.out) : Sides{};
  const Size size = has_pool ? last.out.after(pool[0], pool[0], pool[1], around) : last.out;
  const int64_t B = image.size(0), C = last.Co;
  Tensor tokens = empty({B, size.H * size.W, C}, weights[0].scalar_type());
  const Type type = type_of(tokens), between = simd::product_type(type);
  if (tokens.numel() == 0) return tokens;

  // Buffer i holds the input of layer i with that layer's padding around it.
  std::vector<float*> buffers;
  for (const Layer& l : layers) {
    buffers.push_back(scratch.take(padded_floats(l.in, l.padding, l.Ci)));
    if (buffers.size() > 1) clear_border(buffers.back(), between, l.Ci, l.in, l.padding, false);
  }
  for (int64_t b = 0; b < B; ++b) {
    const Layer& first = layers[0];
    const Image source = image_of(image, b);
    const int64_t Hp = first.in.H + first.padding.top + first.padding.bottom;
    parallel(Hp, [&](int64_t begin, int64_t end) {
      simd::load_padded(source, first.padding.top, first.padding.left,
                        first.in.W + first.padding.left + first.padding.right, begin, end,
                        buffers[0], between);
    });
    void* out = offset(tokens.mutable_data_ptr(), type, b * size.H * size.W * C);
    for (size_t i = 0; i < layers.size(); ++i) {
      const Layer& l = layers[i];
      const Rows rows = patches(buffers[i], between, l.in.W + l.padding.left + l.padding.right, l);
      const bool is_last = i + 1 == layers.size();
      if (is_last && has_pool) {
        pooled_layer(rows, l, between, pool, around, size, out, type);
        break;
      }
      Output output{out, type, simd::plain_rows(C)};
      if (!is_last) {
        const Sides& p = layers[i + 1].padding;
        const int64_t Wp = l.out.W + p.left + p.right;
        output = {offset(buffers[i + 1], between, (p.top * Wp + p.left) * l.Co), between,
                  Grid{l.out.W, Wp * l.Co, l.Co}};
      }
      output.bias = l.bias;
      output.activation = l.activation;
      product_parallel(rows, l.out.H * l.out.W, l.packed, l.Co, output);
    }
  }
  return tokens;
}

// Patches of the padded images, as the rows that weight_gradient wants.
struct PatchSource {
  const Tensor& image;
  const Layer& layer;
  const float* buffers;  // all images, padded
  int64_t buffer_floats;

  static ChunkOfRows rows(const void* context, int64_t first, int64_t rows, float* buffer) {
    const auto& s = *(const PatchSource*)context;
    const Layer& l = s.layer;
    const int64_t pixels = l.out.H * l.out.W, K = l.Kh * l.Kw * l.Ci;
    const Window2d window{l.Kh,   l.Kw, l.stride, l.Ci, l.in.W + l.padding.left + l.padding.right,
                          l.out.W};
    for (int64_t done = 0; done < rows;) {
      const int64_t b = (first + done) / pixels, at = (first + done) % pixels;
      const int64_t n = std::min(rows - done, pixels - at);
      simd::gather_patches(s.buffers + b * s.buffer_floats, window, at, n, buffer + done * K);
      done += n;
    }
    return {buffer, Type::kFloat, K};
  }
};

// dimage comes as (B, H, W, Ci), the order of tokens.
std::tuple<Tensor, Tensor, Tensor> conv_backward(Tensor dz, Tensor image, Tensor weight,
                                                 int64_t stride, std::vector<int64_t> padding,
                                                 bool needs_dimage) {
  const ScalarType dtype = weight.scalar_type();
  Scratch scratch;
  STD_TORCH_CHECK(
      image.dim() == 4 && weight.dim() == 4 && weight.size(1) == image.size(1) && stride > 0,
      "conv_backward: image and weight do not fit");
  Layer l{};
  l.Co = weight.size(0), l.Ci = weight.size(1), l.Kh = weight.size(2), l.Kw = weight.size(3);
  l.stride = stride, l.padding = sides_at(padding, 0), l.in = {image.size(2), image.size(3)};
  l.out = l.in.after(l.Kh, l.Kw, stride, l.padding);
  const int64_t B = image.size(0), pixels = l.out.H * l.out.W, K = l.Kh * l.Kw * l.Ci;
  STD_TORCH_CHECK(l.out.H > 0 && l.out.W > 0 && dz.numel() == B * pixels * l.Co &&
                      type_of(dz) == type_of(weight),
                  "conv_backward: dz does not fit");
  const Type type = type_of(weight);
  const int64_t Wp = l.in.W + l.padding.left + l.padding.right,
                Hp = l.in.H + l.padding.top + l.padding.bottom;
  const int64_t buffer_floats = Hp * Wp * l.Ci;

  float* buffers = scratch.take(B * buffer_floats);
  parallel(B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      simd::load_padded(image_of(image, b), l.padding.top, l.padding.left, Wp, 0, Hp,
                        buffers + b * buffer_floats, Type::kFloat);
  });
  const RowView gradients(dz);
  Tensor rows = empty({l.Co, K}, dtype), dbias = empty({l.Co}, dtype);  // (Co, Kh, Kw, Ci)
  const PatchSource source{image, l, buffers, buffer_floats};
  weight_gradient(gradients, l.Co, K, PatchSource::rows, &source, rows, dbias);
  Tensor dweight = torch::stable::contiguous(torch::stable::transpose(
      torch::stable::transpose(torch::stable::view(rows, {l.Co, l.Kh, l.Kw, l.Ci}), 2, 3), 1, 2));
  if (!needs_dimage) return {empty({0}, dtype), dweight, dbias};

  Tensor dimage = empty({B, l.in.H, l.in.W, l.Ci}, dtype);
  const Tensor w = torch::stable::contiguous(
      torch::stable::transpose(torch::stable::transpose(weight, 1, 2), 2, 3));
  const float* packed =
      pack_weight(scratch, w.const_data_ptr(), type, 1, K, K, {Type::kFloat, l.Co});
  const Window2d window{l.Kh, l.Kw, stride, l.Ci, Wp, l.out.W};
  void* to = dimage.mutable_data_ptr();
  parallel(B, [&](int64_t begin, int64_t end) {
    Scratch own;
    float* sums = own.take(buffer_floats);
    float* dpatches = own.take(l.out.W * K);
    float* row = own.take(l.out.W * l.Co);
    for (int64_t b = begin; b < end; ++b) {
      std::fill(sums, sums + buffer_floats, 0.0f);
      for (int64_t ho = 0; ho < l.out.H;
           ++ho) {  // patches overlap: one thread adds up an image in order
        const int64_t first = b * pixels + ho * l.out.W;
        simd::to_float(offset(gradients.data, type, first * gradients.stride), type,
                       gradients.stride, l.out.W, l.Co, row, l.Co);
        simd::product(Rows{row, Type::kFloat, simd::plain_rows(l.Co), l.Co}, 0, l.out.W, packed, K,
                      0, simd::panel_count(K), Output{dpatches, Type::kFloat, simd::plain_rows(K)});
        simd::scatter_patches(dpatches, window, ho * l.out.W, l.out.W, sums);
      }
      const int64_t run = l.in.W * l.Ci;
      simd::from_float(sums + (l.padding.top * Wp + l.padding.left) * l.Ci, Wp * l.Ci, l.in.H, run,
                       offset(to, type, b * l.in.H * run), type, run);
    }
  });
  return {dimage, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("conv_stem", TORCH_BOX(&conv_stem));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
}

}  // namespace hybridops
