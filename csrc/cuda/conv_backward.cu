// hybridops_cuda::conv_backward: gradients of one convolution, for conv_stem and patch_embed.
//
// dweight and dbias are sums over all cells (gradient.cuh), the image's windows gathered as they
// are multiplied. dimage is a convolution itself (conv.cu): pixels that lie alike between the
// strides see the same taps of the kernel, and only those, so each of the stride^2 kinds of pixels
// is one launch, with the weight's taps of that kind and windows that go up and left.
#include "conv.cuh"
#include "gradient.cuh"

namespace hybridops::cuda {
namespace {

// Weight (Co, Ci, KH, KW) as (Ci, Co, taps i, i + S, ..., taps j, j + S, ...).
Tensor taps_of(const Tensor& weight, int64_t i, int64_t j, int64_t S) {
  const auto count = [&](int64_t d, int64_t first) {
    return std::max<int64_t>(divide_up(weight.size(d) - first, S), 0);
  };
  const int64_t sizes[4] = {weight.size(1), weight.size(0), count(2, i), count(3, j)};
  const int64_t strides[4] = {weight.stride(1), weight.stride(0), S * weight.stride(2),
                              S * weight.stride(3)};
  const int64_t first =
      sizes[0] * sizes[1] * sizes[2] * sizes[3] ? i * weight.stride(2) + j * weight.stride(3) : 0;
  AtenTensorHandle view;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(weight.get(), 4, sizes, strides, first, &view));
  return Tensor(view);
}

// The rows (or columns) of a kind: n = first + S u, and the u of the first, which no tap precedes.
struct Kind {
  int64_t first, count, u;
};
Kind kind_of(int64_t tap, int64_t S, int64_t before, int64_t size) {
  const int64_t u = std::max<int64_t>(divide_up(before - tap, S), 0), first = u * S + tap - before;
  return {first, first < size ? divide_up(size - first, S) : 0, u};
}

void image_gradient(const Device& device, const Tensor& dz, const Tensor& weight,
                    const Image& image, const Sight& sight, Tensor& dimage, const char* op) {
  const Image from = image_of_tokens(dz, sight.Ho, sight.Wo);
  const int64_t S = sight.stride, C = image.C, stride_h = image.W * C;
  // Taps beyond image and padding meet no pixel: a stride of any size costs no more than the image.
  const int64_t tap_rows = std::min(S, image.H + sight.padding.top),
                tap_columns = std::min(S, image.W + sight.padding.left);
  for (int64_t i = 0; i < tap_rows; ++i)
    for (int64_t j = 0; j < tap_columns; ++j) {
      const Kind rows = kind_of(i, S, sight.padding.top, image.H),
                 columns = kind_of(j, S, sight.padding.left, image.W);
      if (rows.count == 0 || columns.count == 0) continue;
      const Tensor taps = taps_of(weight, i, j, S);
      const Sight seen{taps.size(2), taps.size(3),  1,
                       rows.count,   columns.count, {-rows.u, -columns.u, 0, 0},
                       from.C > 1,   true};
      convolve(device, {from, taps, {}, seen, 0, {}, {}, 0.0, {}}, dimage,
               {rows.first * stride_h + columns.first * C, image.H * stride_h, S * stride_h, S * C},
               op);
    }
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(Tensor dz, Tensor image, Tensor weight,
                                                 int64_t stride, std::vector<int64_t> padding,
                                                 bool needs_dimage) {
  const char* op = "conv_backward";
  const Image x = image_of(image, weight, op);
  check_device(dz, op);
  const int64_t B = x.B, Ci = x.C, Co = weight.size(0), KH = weight.size(2), KW = weight.size(3);
  const Sight sight = sight_of(x, KH, KW, stride, padding_of(padding, 0, op), op);
  STD_TORCH_CHECK(dz.dim() == 3 && dz.size(0) == B && dz.size(1) == sight.cells() &&
                      dz.size(2) == Co && dz.scalar_type() == weight.scalar_type() &&
                      Co < kNowhere && (double)Co * KH * KW < kNowhere,
                  "conv_backward: dz does not fit image and weight");
  std::vector<int64_t> sizes{0};
  if (needs_dimage) sizes = {B, x.H, x.W, Ci};
  Tensor dimage = empty(weight, sizes, weight.scalar_type());
  Tensor dweight = empty(weight, {Co, Ci, KH, KW}, weight.scalar_type());
  Tensor dbias = empty(weight, {Co}, weight.scalar_type());
  const Device device(weight);
  dz = torch::stable::contiguous(dz);
  for_type(weight, op, [&](auto type) {
    using T = decltype(type);
    const int64_t M = B * sight.cells(), K = Ci * KH * KW;
    const Rows<T> rows = rows_of<T>(dz);
    const Order order = sight.channels_last ? Order{(int)KW, (int)Ci, KW, 1, KH * KW}
                                            : Order{(int)KH, (int)KW, KH * KW, KW, 1};
    weight_gradient(device, rows, window_of<T>(x, sight), M, Co, K, order, weight, dweight);
    bias_gradient(device, rows, M, Co, weight, dbias);
  });
  if (needs_dimage) image_gradient(device, dz, weight, x, sight, dimage, op);
  return {dimage, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
}

}  // namespace hybridops::cuda
