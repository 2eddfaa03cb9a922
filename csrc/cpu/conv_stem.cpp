// hybridops::conv_stem: see hybridops/ops/conv_stem.py for the meaning.
//
// A convolution is the product with its rows read in place: in a padded (H, W, C) buffer the patch
// under an output pixel is Kh runs of Kw * C numbers, so nothing is unfolded. An image goes through
// all layers a band of rows at a time, so that what lies between them stays in cache.
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

// A convolution, or the pool behind the last.
struct Layer {
  bool is_pool;
  const float *packed, *bias;
  int64_t Kh, Kw, Ci, Co, stride, activation;
  Sides padding;
  Size in, out;

  int64_t padded_height() const { return in.H + padding.top + padding.bottom; }
  int64_t padded_width() const { return in.W + padding.left + padding.right; }
  int64_t row() const { return padded_width() * Ci; }  // numbers of its padded input
};

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

// The rows of a padded buffer under the output pixels of a convolution, from a row of them on.
Rows patches(const void* buffer, Type type, const Layer& l) {
  const Grid grid{l.out.W, l.stride * l.row(), l.stride * l.Ci};
  return {buffer, type, grid, l.Kw * l.Ci, l.Kh, l.row()};
}

Output output_of(const Layer& l, void* data, Type type, int64_t row_stride) {
  Output output{data, type, Grid{l.out.W, row_stride, l.Co}};
  output.bias = l.bias;
  output.activation = l.activation;
  output.few_rows = l.out.H * l.out.W < 4;
  return output;
}

// Layers of a plan, by one thread, a band of rows at a time. Each keeps the rows of its padded
// input that are still to be read, and asks the layer in front of it for more.
class Bands {
 public:
  Bands(Scratch& scratch, const Layer* layers, size_t count, Type between)
      : layers_(layers), between_(between) {
    for (size_t i = 0; i < count; ++i) bands_.push_back(band_of(scratch, layers[i]));
  }

  // Rows [begin, end) of what the layers make of `image`, or of the first one's padded input.
  void run(const simd::Image* image, const void* padded, int64_t begin, int64_t end, void* to,
           Type type, int64_t row_stride) {
    image_ = image, padded_ = padded;
    for (Band& b : bands_) b.first = b.done = 0;
    rows(bands_.size() - 1, begin, end, to, type, row_stride);
  }

 private:
  struct Band {
    int64_t height;  // rows of output at a time
    void* data;      // rows [first, done) of padded input
    int64_t first = 0, done = 0;
  };

  Band band_of(Scratch& scratch, const Layer& l) const {
    // as many bytes of input as the weights that are read beside it have, or a part of L2
    const int64_t weights = l.is_pool ? 0 : l.Kh * l.Kw * l.Ci * l.Co * 4;
    const int64_t bytes = std::max<int64_t>(kBand, weights);
    const int64_t stride = std::min(l.stride, l.padded_height());  // of one row any is as good
    const int64_t row = std::max<int64_t>(l.row(), 1);
    const int64_t height =
        std::clamp<int64_t>(bytes / (row * stride * size_of(between_)), 1, l.out.H);
    return {height, scratch.take(((height - 1) * stride + l.Kh) * row)};
  }

  void rows(size_t i, int64_t begin, int64_t end, void* to, Type type, int64_t row_stride) {
    const Layer& l = layers_[i];
    const int64_t count = divide_up(end - begin, bands_[i].height);
    const int64_t height = divide_up(end - begin, std::max<int64_t>(count, 1));
    for (int64_t h = begin; h < end; h += height) {
      const int64_t n = std::min(height, end - h);
      const void* in = input(i, h * l.stride, (h + n - 1) * l.stride + l.Kh);
      void* out = offset(to, type, (h - begin) * row_stride);
      if (l.is_pool) {
        const Window2d window{l.Kh, l.Kw, l.stride, l.Ci, l.padded_width(), l.out.W};
        simd::max_pool(in, between_, window, n, out, type);
      } else {
        simd::product(patches(in, between_, l), 0, n * l.out.W, l.packed, l.Co, 0,
                      simd::panel_count(l.Co), output_of(l, out, type, row_stride));
      }
    }
  }

  // Rows [first, last) of layer i's padded input; those in front of them will not be read again.
  const void* input(size_t i, int64_t first, int64_t last) {
    const Layer& l = layers_[i];
    const int64_t row = l.row();
    if (i == 0 && padded_) return offset(padded_, between_, first * row);
    Band& b = bands_[i];
    if (b.done > first)
      std::memmove(b.data, offset(b.data, between_, (first - b.first) * row),
                   (b.done - first) * row * size_of(between_));
    const int64_t done = std::max(b.done, first);
    const Sides& p = l.padding;
    if (i == 0) {
      simd::load_padded(*image_, p.top - first, p.left, l.padded_width(), done - first,
                        last - first, b.data, between_);
    } else {
      const auto at = [&](int64_t r) { return offset(b.data, between_, (r - first) * row); };
      const int64_t top = std::clamp(p.top, done, last);
      const int64_t bottom = std::clamp(p.top + l.in.H, top, last);
      clear_border(at(done), between_, l.Ci, {bottom - top, l.in.W},
                   {top - done, p.left, last - bottom, p.right}, l.is_pool);
      rows(i - 1, top - p.top, bottom - p.top, offset(at(top), between_, p.left * l.Ci), between_,
           row);
    }
    b.first = first, b.done = last;
    return b.data;
  }

  static constexpr int64_t kBand = 1 << 17;
  const Layer* layers_;
  Type between_;
  std::vector<Band> bands_;
  const simd::Image* image_ = nullptr;
  const void* padded_ = nullptr;
};

// All threads take each layer together.
void layer_by_layer(const std::vector<Layer>& layers, const simd::Image& image, Type between,
                    void* tokens, Type type) {
  Scratch scratch;
  const void* padded = nullptr;  // the input of layer i, from the second on
  for (size_t i = 0, count; i < layers.size(); i += count) {
    count = i + 2 == layers.size() && layers.back().is_pool ? 2 : 1;  // a pool with its layer
    const Layer& l = layers[i + count - 1];
    void *out = tokens, *next = nullptr;
    Type to = type;
    int64_t row = l.out.W * l.Co;
    if (i + count < layers.size()) {
      const Layer& after = layers[i + count];
      next = scratch.take(after.padded_height() * after.row());
      clear_border(next, between, after.Ci, after.in, after.padding, false);
      to = between, row = after.row();
      out = offset(next, to, after.padding.top * row + after.padding.left * after.Ci);
    }
    if (padded && count == 1) {
      product_parallel(patches(padded, between, l), l.out.H * l.out.W, l.packed, l.Co,
                       output_of(l, out, to, row));
    } else {
      parallel(l.out.H, [&](int64_t begin, int64_t end) {
        Scratch own;
        Bands(own, &layers[i], count, between)
            .run(&image, padded, begin, end, offset(out, to, begin * row), to, row);
      });
    }
    padded = next;
  }
}

Tensor conv_stem(Tensor image, std::vector<Tensor> weights, std::vector<Tensor> biases,
                 std::vector<Tensor> packed, std::vector<int64_t> strides,
                 std::vector<int64_t> paddings, std::vector<int64_t> activations,
                 std::vector<int64_t> pool) {
  Scratch scratch;
  std::vector<Layer> layers =
      plan(scratch, image, weights, biases, packed, strides, paddings, activations);
  if (!pool.empty()) {
    const Size in = layers.back().out;
    const Sides around = pool_sides(pool, in);
    const int64_t C = layers.back().Co, K = pool[0];
    layers.push_back({true, nullptr, nullptr, K, K, C, C, pool[1], 0, around, in,
                      in.after(K, K, pool[1], around)});
  }
  const Layer& last = layers.back();
  const int64_t B = image.size(0), one = last.out.H * last.out.W * last.Co;
  Tensor tokens = empty({B, last.out.H * last.out.W, last.Co}, weights[0].scalar_type());
  const Type type = type_of(tokens), between = simd::product_type(type);
  if (tokens.numel() == 0) return tokens;

  const auto tokens_of = [&](int64_t b) {
    return offset(tokens.mutable_data_ptr(), type, b * one);
  };
  if (is_shared_evenly(B)) {  // an image each: no thread waits for another before the end
    parallel(B, [&](int64_t begin, int64_t end) {
      Scratch own;
      Bands bands(own, layers.data(), layers.size(), between);
      for (int64_t b = begin; b < end; ++b) {
        const simd::Image source = image_of(image, b);
        bands.run(&source, nullptr, 0, last.out.H, tokens_of(b), type, last.out.W * last.Co);
      }
    });
  } else {
    for (int64_t b = 0; b < B; ++b)
      layer_by_layer(layers, image_of(image, b), between, tokens_of(b), type);
  }
  return tokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) { m.impl("conv_stem", TORCH_BOX(&conv_stem)); }

}  // namespace hybridops
