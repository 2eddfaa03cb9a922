// A convolution's weight as rows in the order in which a window (window.cuh) takes its numbers.
#pragma once
#include "window.cuh"

namespace hybridops::cuda {
namespace {  // so that each file that includes this has kernels of its own

// (Co, K) in the order of the window, from a weight of any strides.
template <class T>
__global__ void __launch_bounds__(256)
    weight_kernel(Global<const T> weight, int64_t stride_n, int64_t stride_outer,
                  int64_t stride_middle, int64_t stride_inner, int middle, int inner, int K,
                  int padded, Global<T> to, int64_t count) {
  const int64_t i = block_index() * thread_count() + thread_index();
  if (i >= count) return;
  const int64_t n = i / padded;
  const int k = (int)(i % padded);
  const int64_t from = n * stride_n + k / inner / middle * stride_outer +
                       k / inner % middle * stride_middle + k % inner * stride_inner;
  to.store(i, k < K ? weight.load(from) : cast<T>(0.0f));
}

// The weight as rows in the window's order: as it lies, or a copy that is kept in `copy`.
template <class T>
Rows<T> weight_of(const Device& device, const Tensor& weight, bool channels_last,
                  std::optional<Tensor>& copy) {
  const int64_t group = 16 / sizeof(T), N = weight.size(0);
  const int64_t K = weight.size(1) * weight.size(2) * weight.size(3), padded = round_up(K, group);
  // strides of (outer, middle, inner), and how often inner's own dimension is
  int64_t outer = weight.stride(1), middle = weight.stride(2), inner = weight.stride(3);
  int middles = (int)weight.size(2), inners = (int)weight.size(3);
  if (channels_last) {
    outer = weight.stride(2), middle = weight.stride(3), inner = weight.stride(1);
    middles = (int)weight.size(3), inners = (int)weight.size(1);
  }
  const auto fits = [](int64_t count, int64_t stride, int64_t expected) {
    return count <= 1 || stride == expected;
  };
  if (padded == K && fits(inners, inner, 1) && fits(middles, middle, inners) &&
      fits(K / std::max(middles * inners, 1), outer, middles * inners) &&
      fits(N, weight.stride(0), K) && is_aligned(weight, 16))
    return {memory_of<const T>(weight), K, 1, true};
  copy = empty(weight, {N, padded}, weight.scalar_type());
  if (copy->numel() > 0)
    device.launch(weight_kernel<T>, divide_up(N * padded, 256), 256, 0, memory_of<const T>(weight),
                  weight.stride(0), outer, middle, inner, middles, inners, (int)K, (int)padded,
                  memory_of<T>(*copy), N * padded);
  return {memory_of<const T>(*copy), padded, 1, true};
}

}  // namespace
}  // namespace hybridops::cuda
