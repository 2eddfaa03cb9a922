// dbias out of partial sums over slices of the images: dense, or by the entries of a table. Every
// sum has a fixed order. For attention_backward.cu alone.
#pragma once
#include "attention.cuh"

namespace hybridops::cuda {
namespace {

// Sums of partial (slices, H, Nq, Nk) over the dimensions where kept is 1, one warp a number.
struct Reduction {
  int sizes[4], kept[4];
};
__global__ void __launch_bounds__(kMostWarps* kWarp)
    sum_kernel(Global<const float> partial, Global<float> sums, Reduction r, int64_t outputs) {
  const int64_t o = block_index() * (thread_count() / kWarp) + thread_index() / kWarp;
  if (o >= outputs) return;
  int64_t rest = o, start = 0, stride = 1, lengths[4], strides[4];
  for (int d = 3; d >= 0; --d) {
    start += rest % r.kept[d] * stride;
    rest /= r.kept[d];
    lengths[d] = r.sizes[d] / r.kept[d];
    strides[d] = stride;
    stride *= r.sizes[d];
  }
  const int64_t count = lengths[0] * lengths[1] * lengths[2] * lengths[3];
  float sum = 0.0f;
  for (int64_t i = lane_index(); i < count; i += kWarp) {
    int64_t left = i, place = start;
    for (int d = 3; d >= 0; --d) {
      place += left % lengths[d] * strides[d];
      left /= lengths[d];
    }
    sum += partial.load(place);
  }
  sum = sum_over<kWarp>(sum);
  if (lane_index() == 0) sums.store(o, sum);
}

// The gradient of table entries by rows of queries: sums (rows, H, T) from dense (H, Nq, Nk). Each
// thread looks for its entry among all indices of the row.
constexpr int kTableThreads = 256;
__global__ void __launch_bounds__(kTableThreads)
    table_kernel(Global<const float> dense, Global<const int64_t> wide,
                 Global<const int32_t> narrow, Global<float> sums, int H, int Nq, int Nk,
                 int size) {
  const int pieces = (size + kTableThreads - 1) / kTableThreads;
  const int piece = (int)(block_index() % pieces), h = (int)(block_index() / pieces % H);
  const int i = (int)(block_index() / pieces / H);
  const int entry = piece * kTableThreads + thread_index();
  SharedMemory memory;
  const Shared<float> values = memory.take<float>(kTableThreads);
  const Shared<int32_t> entries = memory.take<int32_t>(kTableThreads);
  float sum = 0.0f;
  for (int j0 = 0; j0 < Nk; j0 += kTableThreads) {
    const int j = j0 + thread_index();
    block_barrier();
    if (j < Nk) {
      const int64_t place = (int64_t)i * Nk + j;
      values.store(thread_index(), dense.load((int64_t)h * Nq * Nk + place));
      entries.store(thread_index(), wide ? (int32_t)wide.load(place) : narrow.load(place));
    }
    block_barrier();
    const int count = Nk - j0 < kTableThreads ? Nk - j0 : kTableThreads;
    for (int n = 0; n < count && entry < size; ++n)
      if (entries.load(n) == entry) sum += values.load(n);
  }
  if (entry < size) sums.store(((int64_t)i * H + h) * size + entry, sum);
}

// dbias (like bias, fp32) from partial (slices, H, Nq, Nk).
Tensor reduce_bias(const Device& device, const Tensor& partial, const Tensor& bias,
                   const std::optional<Tensor>& index) {
  const auto sum = [&](const Tensor& from, const std::vector<int64_t>& kept) {
    Tensor to = empty(from, kept, ScalarType::Float);
    Reduction r{};
    for (int d = 0; d < 4; ++d) {
      r.sizes[d] = (int)from.size(d);
      r.kept[d] = (int)kept[d];
    }
    if (to.numel() > 0)
      device.launch(sum_kernel, divide_up(to.numel(), kMostWarps), kMostWarps * kWarp, 0,
                    memory_of<const float>(from), memory_of<float>(to), r, to.numel());
    return to;
  };
  const int64_t H = partial.size(1), Nq = partial.size(2), Nk = partial.size(3);
  if (!index.has_value())
    return sum(partial, {bias.size(0), bias.size(1), bias.size(2), bias.size(3)});
  const int64_t size = bias.size(1);
  const Tensor dense = sum(partial, {1, H, Nq, Nk});
  const Tensor rows = empty(partial, {Nq, H, size, 1}, ScalarType::Float);
  const Bias<float> at = bias_of<float>(dense, index, std::nullopt);
  if (rows.numel() > 0)
    device.launch(table_kernel, Nq * H * divide_up(size, kTableThreads), kTableThreads,
                  shared_bytes<float>(kTableThreads) + shared_bytes<int32_t>(kTableThreads),
                  memory_of<const float>(dense), at.wide, at.narrow, memory_of<float>(rows), (int)H,
                  (int)Nq, (int)Nk, (int)size);
  return torch::stable::view(sum(rows, {1, H, size, 1}), {H, size});
}

}  // namespace
}  // namespace hybridops::cuda
