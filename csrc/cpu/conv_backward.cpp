// hybridops::conv_backward: see hybridops/ops/conv_stem.py for the meaning.
#include <cstring>

#include "conv.h"
#include "linear.h"

namespace hybridops {
namespace {

using simd::Output;
using simd::Rows;
using simd::Type;
using simd::Window2d;

struct Conv {
  int64_t Kh, Kw, Ci, Co, stride;
  Sides padding;
  Size in, out;
  int64_t padded_width() const { return in.W + padding.left + padding.right; }
  int64_t padded_height() const { return in.H + padding.top + padding.bottom; }
};

// Patches of the padded images, as the rows that weight_gradient wants.
struct PatchSource {
  const Conv& conv;
  const float* buffers;  // all images, padded
  int64_t buffer_floats;

  static ChunkOfRows rows(const void* context, int64_t first, int64_t rows, float* buffer) {
    const auto& s = *(const PatchSource*)context;
    const Conv& c = s.conv;
    const int64_t pixels = c.out.H * c.out.W, K = c.Kh * c.Kw * c.Ci;
    const Window2d window{c.Kh, c.Kw, c.stride, c.Ci, c.padded_width(), c.out.W};
    for (int64_t done = 0; done < rows;) {
      const int64_t b = (first + done) / pixels, at = (first + done) % pixels;
      const int64_t n = std::min(rows - done, pixels - at);
      simd::gather_patches(s.buffers + b * s.buffer_floats, window, at, n, buffer + done * K);
      done += n;
    }
    return {buffer, Type::kFloat, K};
  }
};

// Along one axis, what the pixels i * stride + phase get something from: tap first + t * stride of
// the kernel times dz's row (or column) i + shift - t, for t < count.
struct Taps {
  int64_t first, count, shift;
  Taps(int64_t phase, int64_t padding, int64_t kernel, int64_t stride)
      : first((phase + padding) % stride),
        count(first < kernel ? (kernel - 1 - first) / stride + 1 : 0),
        shift((phase + padding) / stride) {}
  int64_t begin() const { return shift - count + 1; }  // dz's first one for i = 0
  int64_t tap(int64_t u, int64_t stride) const {       // that dz's u-th one meets
    return first + (count - 1 - u) * stride;
  }
};

// Pixels that see the same taps: a convolution of dz gives all of them, and nothing is added up
// twice. Where patches lie side by side, `width` of them in a row are one with all their channels.
struct Phase {
  int64_t row, column, width;
  Taps rows, columns;
  const float* packed;  // (count, count, Co) by (width, Ci)
};

struct ImageGradient {
  const Conv& conv;
  std::vector<Phase> phases;
  int64_t above = 0, left = 0, below = 0, right = 0;  // dz's rows and columns around those of i

  ImageGradient(Scratch& scratch, const Conv& conv, const Tensor& weight) : conv(conv) {
    const int64_t s = conv.stride, W = conv.in.W;
    const bool side_by_side = conv.Kw == s && conv.padding.left == 0 && W % s == 0;
    const int64_t width = side_by_side ? s : 1;
    const Tensor w = torch::stable::contiguous(weight);
    for (int64_t row = 0; row < std::min(s, conv.in.H); ++row)
      for (int64_t column = 0; column < std::min(s, W); column += width) {
        const Taps rows(row, conv.padding.top, conv.Kh, s),
            columns(column, conv.padding.left, conv.Kw, s);
        if (rows.count == 0 || columns.count == 0) continue;
        above = std::max(above, -rows.begin()), below = std::max(below, rows.shift);
        left = std::max(left, -columns.begin()), right = std::max(right, columns.shift);
        phases.push_back({row, column, width, rows, columns, nullptr});
      }
    for (Phase& p : phases) p.packed = pack(scratch, p, w.const_data_ptr(), type_of(w));
  }

  const float* pack(Scratch& scratch, const Phase& p, const void* weight, Type type) const {
    const int64_t Ci = conv.Ci, Co = conv.Co, N = p.width * Ci, plane = conv.Kh * conv.Kw;
    float* matrix = scratch.take(p.rows.count * p.columns.count * Co * N);
    parallel(Co, [&](int64_t begin, int64_t end) {
      Scratch own;
      float* filter = own.take(Ci * plane);
      for (int64_t co = begin; co < end; ++co) {
        simd::to_float(offset(weight, type, co * Ci * plane), type, 0, 1, Ci * plane, filter, 0);
        for (int64_t u = 0; u < p.rows.count; ++u)
          for (int64_t v = 0; v < p.columns.count; ++v) {
            float* to = matrix + ((u * p.columns.count + v) * Co + co) * N;
            const int64_t at = p.rows.tap(u, conv.stride) * conv.Kw + p.columns.tap(v, conv.stride);
            for (int64_t w = 0; w < p.width; ++w)
              for (int64_t ci = 0; ci < Ci; ++ci) *to++ = filter[ci * plane + at + w];
          }
      }
    });
    return pack_weight(scratch, matrix, Type::kFloat, 1, N, N,
                       {Type::kFloat, p.columns.count * Co, p.rows.count});
  }

  // Rows [begin, end) of every phase of image b, from dz as an image of fp32 or bf16.
  void write(const simd::Image& dz, int64_t begin, int64_t end, void* dimage, Type type) const {
    const int64_t s = conv.stride, Co = conv.Co, H = conv.in.H, W = conv.in.W;
    const int64_t Wp = std::max(left + conv.out.W, left + divide_up(W, s) + right);
    Scratch scratch;
    float* buffer = scratch.take((above + end - begin + below) * Wp * Co);
    simd::load_padded(dz, above - begin, left, Wp, 0, above + end - begin + below, buffer,
                      Type::kFloat);
    for (const Phase& p : phases) {
      const int64_t n = std::min(end, divide_up(H - p.row, s)) - begin,
                    pixels = divide_up(W - p.column, s);
      if (n <= 0) continue;
      const int64_t row = Wp * Co, N = p.width * conv.Ci;
      const Rows rows{buffer + (above + p.rows.begin()) * row + (left + p.columns.begin()) * Co,
                      Type::kFloat,
                      {pixels, row, Co},
                      p.columns.count * Co,
                      p.rows.count,
                      row};
      void* to = offset(dimage, type, ((begin * s + p.row) * W + p.column) * conv.Ci);
      simd::product(rows, 0, n * pixels, p.packed, N, 0, simd::panel_count(N),
                    Output{to, type, {pixels, s * W * conv.Ci, s * conv.Ci}});
    }
  }
};

// dimage comes as (B, H, W, Ci), the order of tokens.
std::tuple<Tensor, Tensor, Tensor> conv_backward(Tensor dz, Tensor image, Tensor weight,
                                                 int64_t stride, std::vector<int64_t> padding,
                                                 bool needs_dimage) {
  const ScalarType dtype = weight.scalar_type();
  STD_TORCH_CHECK(
      image.dim() == 4 && weight.dim() == 4 && weight.size(1) == image.size(1) && stride > 0,
      "conv_backward: image and weight do not fit");
  Conv c{weight.size(2),
         weight.size(3),
         weight.size(1),
         weight.size(0),
         stride,
         sides_at(padding, 0),
         {image.size(2), image.size(3)},
         {}};
  c.out = c.in.after(c.Kh, c.Kw, stride, c.padding);
  const int64_t B = image.size(0), pixels = c.out.H * c.out.W, K = c.Kh * c.Kw * c.Ci;
  STD_TORCH_CHECK(c.out.H > 0 && c.out.W > 0 && dz.numel() == B * pixels * c.Co &&
                      type_of(dz) == type_of(weight),
                  "conv_backward: dz does not fit");
  const Type type = type_of(weight);

  Scratch scratch;
  const int64_t buffer_floats = c.padded_height() * c.padded_width() * c.Ci;
  float* buffers = scratch.take(B * buffer_floats);
  parallel(B, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      simd::load_padded(image_of(image, b), c.padding.top, c.padding.left, c.padded_width(), 0,
                        c.padded_height(), buffers + b * buffer_floats, Type::kFloat);
  });
  const RowView gradients(dz);
  Tensor rows = empty({c.Co, K}, dtype), dbias = empty({c.Co}, dtype);  // (Co, Kh, Kw, Ci)
  const PatchSource source{c, buffers, buffer_floats};
  weight_gradient(gradients, c.Co, K, PatchSource::rows, &source, rows, dbias);
  Tensor dweight = torch::stable::contiguous(torch::stable::transpose(
      torch::stable::transpose(torch::stable::view(rows, {c.Co, c.Kh, c.Kw, c.Ci}), 2, 3), 1, 2));
  if (!needs_dimage) return {empty({0}, dtype), dweight, dbias};

  Tensor dimage = empty({B, c.in.H, c.in.W, c.Ci}, dtype);
  if (dimage.numel() == 0) return {dimage, dweight, dbias};
  void* to = dimage.mutable_data_ptr();
  const ImageGradient gradient(scratch, c, weight);
  const int64_t height = divide_up(c.in.H, stride);  // rows of a phase
  constexpr int64_t kBand = 1 << 17;                 // bytes of dz, about: every phase reads them
  const int64_t row_bytes = (c.out.W + gradient.left + gradient.right) * c.Co * sizeof(float);
  const int64_t band = std::clamp<int64_t>(kBand / std::max<int64_t>(row_bytes, 1), 1, height);
  const bool has_gaps = c.Kh < stride || c.Kw < stride;
  parallel(B * height, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / height, from = begin % height;
      const int64_t until = std::min({from + end - begin, from + band, height});
      const simd::Image source{offset(gradients.data, type, b * pixels * gradients.stride),
                               type,
                               c.Co,
                               c.out.H,
                               c.out.W,
                               1,
                               c.out.W * gradients.stride,
                               gradients.stride};
      void* image_to = offset(to, type, b * c.in.H * c.in.W * c.Ci);
      if (has_gaps) {
        const int64_t row = c.in.W * c.Ci * size_of(type), first = from * stride;
        std::memset((char*)image_to + first * row, 0,
                    (std::min(until * stride, c.in.H) - first) * row);
      }
      gradient.write(source, from, until, image_to, type);
      begin += until - from;
    }
  });
  return {dimage, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) { m.impl("conv_backward", TORCH_BOX(&conv_backward)); }

}  // namespace hybridops
