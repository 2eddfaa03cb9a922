// hybridops_cuda::patch_embed: image to tokens; hybridops/ops/patch_embed.py has the meaning.
//
// The convolution (conv.cu) writes the patches behind the prefix, with position embedding and
// LayerNorm; the prefix is a small launch of its own.
#include "conv.cuh"

namespace hybridops::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(256)
    prefix_kernel(Global<const T> prefix, int64_t stride, int64_t stride_c,
                  Global<const T> position, int64_t position_stride, int64_t position_stride_c,
                  Global<T> y, int64_t y_stride_b, int P, int C, int64_t count) {
  const int64_t i = block_index() * thread_count() + thread_index();
  if (i >= count) return;
  const int c = (int)(i % C), p = (int)(i / C % P);
  float value = to_float(prefix.load(p * stride + c * stride_c));
  if (position) value += to_float(position.load(p * position_stride + c * position_stride_c));
  y.store(i / C / P * y_stride_b + (int64_t)p * C + c, cast<T>(value));
}

Tensor patch_embed(Tensor image, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor>,
                   std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
                   std::optional<Tensor> position, std::optional<Tensor> prefix, int64_t stride,
                   std::vector<int64_t> padding) {
  const char* op = "patch_embed";
  const Image from = image_of(image, weight, op);
  const Sight sight =
      sight_of(from, weight.size(2), weight.size(3), stride, padding_of(padding, 0, op), op);
  const int64_t B = from.B, C = weight.size(0), cells = sight.cells();
  const auto fits = [&](const std::optional<Tensor>& rows) {
    return !rows.has_value() ||
           (rows->dim() == 2 && rows->size(1) == C && rows->scalar_type() == weight.scalar_type());
  };
  const int64_t P = prefix.has_value() ? prefix->size(0) : 0;
  STD_TORCH_CHECK(
      fits(prefix) && fits(position) && P < kNowhere &&
          (!position.has_value() || position->size(0) == cells || position->size(0) == P + cells),
      "patch_embed: prefix or pos_embed do not fit");
  Tensor y = empty(weight, {B, P + cells, C}, weight.scalar_type());
  if (y.numel() == 0) return y;
  const Device device(weight);
  const bool covers_prefix = position.has_value() && position->size(0) != cells;
  if (P > 0)
    for_type(weight, op, [&](auto type) {
      using T = decltype(type);
      device.launch(prefix_kernel<T>, divide_up(B * P * C, 256), 256, 0, memory_of<const T>(prefix),
                    prefix->stride(0), prefix->stride(1),
                    covers_prefix ? memory_of<const T>(position) : Global<const T>{},
                    covers_prefix ? position->stride(0) : 0,
                    covers_prefix ? position->stride(1) : 0, memory_of<T>(y), (P + cells) * C,
                    (int)P, (int)C, B * P * C);
    });
  if (covers_prefix) position = torch::stable::narrow(*position, 0, P, cells);
  const Places places{P * C, (P + cells) * C, sight.Wo * C, C};
  convolve(device, {from, weight, bias, sight, 0, norm_weight, norm_bias, eps, position}, y, places,
           op);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
}

}  // namespace hybridops::cuda
