// hybridops::conv_stem: see hybridops/ops/conv_stem.py for the meaning.
//
// A convolution is the product with its rows read in place: in a padded (H, W, C) buffer the patch
// under an output pixel is Kh runs of Kw * C numbers, so nothing is unfolded. Images go through the
// chain one at a time, which keeps the intermediates in cache.
#include <cmath>
#include <cstring>

#include "conv.h"
#include "linear.h"

namespace hybridops {
namespace {

using simd::Depth;
using simd::Grid;
using simd::Output;
using simd::Rows;
using simd::Type;
using simd::Window2d;

struct Layer {
  const float *packed, *bias;
  int64_t Kh, Kw, Ci, Co, stride, activation;
  Sides padding;
  Size in, out;
};

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
  const Type type = type_of(weights[0]);
  STD_TORCH_CHECK(type_of(image) == type || type_of(image) == Type::kByte,
                  "conv_stem: image and weights differ in dtype");
  std::vector<Layer> layers;
  Size size{image.size(2), image.size(3)};
  int64_t channels = image.size(1);
  for (size_t i = 0; i < L; ++i) {
    STD_TORCH_CHECK(weights[i].dim() == 4 && weights[i].size(1) == channels &&
                        weights[i].is_cpu() && type_of(weights[i]) == type,
                    "conv_stem: a weight does not fit");
    Layer l{};
    l.Co = weights[i].size(0), l.Ci = channels, l.Kh = weights[i].size(2),
    l.Kw = weights[i].size(3);
    l.stride = strides[i], l.activation = activations[i], l.padding = sides_at(paddings, i);
    STD_TORCH_CHECK(l.stride > 0 && size.H + l.padding.top + l.padding.bottom >= l.Kh &&
                        size.W + l.padding.left + l.padding.right >= l.Kw,
                    "conv_stem: a layer does not fit its input");
    l.in = size, l.out = size = size.after(l.Kh, l.Kw, l.stride, l.padding);
    const Depth K{simd::product_type(type), l.Kw * l.Ci, l.Kh};
    if (packed.empty()) {  // (Co, Kh, Kw, Ci): the order in which a patch lies in the buffer
      Tensor w = torch::stable::contiguous(
          torch::stable::transpose(torch::stable::transpose(weights[i], 1, 2), 2, 3));
      l.packed = pack_weight(scratch, w.const_data_ptr(), type, K.length * K.runs, 1, l.Co, K);
    } else {
      l.packed = check_packed(packed[i], l.Co, K, "conv_stem: packed is not pack_conv(weight)");
    }
    l.bias = vector_of(scratch, biases[i], l.Co, type);
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
    const simd::Image source = image_of(image, b);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) { m.impl("conv_stem", TORCH_BOX(&conv_stem)); }

}  // namespace hybridops
