// hybridops_cuda::conv_stem: a chain of convolutions and a max-pool, to tokens;
// hybridops/ops/conv_stem.py has the meaning.
//
// Each layer is one convolution (conv.cu) with its bias and activation; the next reads its tokens
// as the channels-last image they are.
#include "conv.cuh"

namespace hybridops::cuda {
namespace {

struct Pool {
  int kernel, stride, top, left, H, W, Ho, Wo, C;
};

// Tokens (B, H * W, C) to (B, Ho * Wo, C), a number a thread; NaN wins, padding never does.
template <class T>
__global__ void __launch_bounds__(256)
    pool_kernel(Global<const T> x, Global<T> y, Pool p, int64_t count) {
  const int64_t i = block_index() * thread_count() + thread_index();
  if (i >= count) return;
  const int c = (int)(i % p.C), cell = (int)(i / p.C % (p.Ho * p.Wo));
  const int64_t b = i / p.C / (p.Ho * p.Wo);
  const int h0 = cell / p.Wo * p.stride - p.top, w0 = cell % p.Wo * p.stride - p.left;
  float highest = -INFINITY;
  for (int h = h0 < 0 ? 0 : h0; h < least(h0 + p.kernel, p.H); ++h)
    for (int w = w0 < 0 ? 0 : w0; w < least(w0 + p.kernel, p.W); ++w) {
      const float value = to_float(x.load(((b * p.H + h) * p.W + w) * p.C + c));
      if (value > highest || value != value) highest = value;
    }
  y.store(i, cast<T>(highest));
}

Tensor conv_stem(Tensor image, std::vector<Tensor> weights, std::vector<Tensor> biases,
                 std::vector<Tensor>, std::vector<int64_t> strides, std::vector<int64_t> paddings,
                 std::vector<int64_t> activations, std::vector<int64_t> pool) {
  const char* op = "conv_stem";
  const size_t layers = weights.size();
  STD_TORCH_CHECK(layers > 0 && biases.size() == layers && strides.size() == layers &&
                      activations.size() == layers && (pool.empty() || pool.size() == 6),
                  "conv_stem: layers do not fit each other");
  Image x = image_of(image, weights[0], op);
  const Device device(weights[0]);
  const auto sight_at = [&](const Image& from, size_t i) {
    const Tensor& weight = weights[i];
    check_device(weight, op);
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == from.C &&
                        weight.scalar_type() == weights[0].scalar_type(),
                    "conv_stem: weights do not fit each other");
    return sight_of(from, weight.size(2), weight.size(3), strides[i],
                    padding_of(paddings, 4 * i, op), op);
  };
  size_t i = 0;
  if (layers > 1) {
    const Sight first = sight_at(x, 0);
    Image between = x;  // as its tokens would lie
    between.C = weights[0].size(0), between.H = first.Ho, between.W = first.Wo;
    between.stride_c = 1;
    const Pair pair{x,     weights[0],           weights[1],     biases[0],     biases[1],
                    first, sight_at(between, 1), activations[0], activations[1]};
    if (fits_pair(pair)) {
      const Sight& last = pair.second_sight;
      Tensor y = empty(x.tensor, {x.B, last.cells(), weights[1].size(0)}, weights[1].scalar_type());
      convolve(device, pair, y, op);
      x = image_of_tokens(y, last.Ho, last.Wo);
      i = 2;
    }
  }
  for (; i < layers; ++i) {
    const Sight sight = sight_at(x, i);
    const int64_t C = weights[i].size(0);
    Tensor y = empty(x.tensor, {x.B, sight.cells(), C}, weights[i].scalar_type());
    convolve(device, {x, weights[i], biases[i], sight, activations[i], {}, {}, 0.0, {}}, y,
             {0, sight.cells() * C, sight.Wo * C, C}, op);
    x = image_of_tokens(y, sight.Ho, sight.Wo);
  }
  if (pool.empty()) return x.tensor;
  const Padding around = padding_of(pool, 2, op);
  const Sight sight = sight_of(x, pool[0], pool[0], pool[1], around, op);
  Tensor y = empty(x.tensor, {x.B, sight.cells(), x.C}, x.tensor.scalar_type());
  if (y.numel() == 0) return y;
  const Pool p{(int)pool[0], (int)pool[1],  (int)around.top, (int)around.left, (int)x.H,
               (int)x.W,     (int)sight.Ho, (int)sight.Wo,   (int)x.C};
  for_type(y, op, [&](auto type) {
    using T = decltype(type);
    device.launch(pool_kernel<T>, divide_up(y.numel(), 256), 256, 0, memory_of<const T>(x.tensor),
                  memory_of<T>(y), p, y.numel());
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops_cuda, HYBRIDOPS_KEY, m) {
  m.impl("conv_stem", TORCH_BOX(&conv_stem));
}

}  // namespace hybridops::cuda
