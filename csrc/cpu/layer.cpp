// hybridops::attention_layer and mlp_layer: see hybridops/ops/layer.py for the meaning; chain:
// hybridops/ops/chain.py. Whole layers in one dispatch; what lies between their products stays in
// scratch, in the product type.
#include <cstring>

#include "attention.h"
#include "linear.h"

namespace hybridops {
namespace {

using simd::Type;

LinearWeights weights_of(Scratch& scratch, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& packed, int64_t K, Type type) {
  LinearWeights w{panels_of(scratch, weight, packed), weight.size(0)};
  w.K = K;
  STD_TORCH_CHECK(weight.size(1) == K && type_of(weight) == type, "layer: x and weight do not fit");
  w.bias = vector_of(scratch, bias, w.N, type);
  return w;
}

void set_norm(Scratch& scratch, LinearWeights& w, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& bias, double eps, int64_t K, Type type) {
  w.norm_weight = vector_of(scratch, weight, K, type);
  w.norm_bias = vector_of(scratch, bias, K, type);
  w.eps = (float)eps;
  w.check_norm();
}

Output output_to(Tensor& y, const RowView& x, bool residual) {
  Output output{y.mutable_data_ptr(), x.type, simd::plain_rows(y.size(y.dim() - 1))};
  if (residual) {
    STD_TORCH_CHECK(y.size(y.dim() - 1) == x.n,
                    "layer: a residual needs as many channels out as in");
    output.residual = x.data;
    output.residual_grid = simd::plain_rows(x.stride);
  }
  return output;
}

Tensor mlp_layer(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                 double eps, Tensor weight1, std::optional<Tensor> bias1,
                 std::optional<Tensor> packed1, int64_t activation, Tensor weight2,
                 std::optional<Tensor> bias2, std::optional<Tensor> packed2, bool residual) {
  Scratch scratch;
  STD_TORCH_CHECK(x.dim() >= 1, "mlp_layer: x must have at least 1 dimension");
  const RowView rows(x);
  LinearWeights up = weights_of(scratch, weight1, bias1, packed1, rows.n, rows.type);
  set_norm(scratch, up, norm_weight, norm_bias, eps, rows.n, rows.type);
  const LinearWeights down = weights_of(scratch, weight2, bias2, packed2, up.N, rows.type);
  up.then = &down;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = down.N;
  Tensor y = empty(sizes, x.scalar_type());
  if (y.numel() == 0) return y;
  linear_pair(rows, up, activation, down, output_to(y, rows, residual));
  return y;
}

Tensor attention_layer(Tensor x, std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias,
                       double eps, Tensor weight_qkv, std::optional<Tensor> bias_qkv,
                       std::optional<Tensor> packed_qkv, std::optional<Tensor> bias, int64_t heads,
                       int64_t key_dim, bool interleaved, double scale, int64_t activation,
                       Tensor weight_out, std::optional<Tensor> bias_out,
                       std::optional<Tensor> packed_out, bool residual) {
  Scratch scratch;
  STD_TORCH_CHECK(x.dim() == 3, "attention_layer: x must have 3 dimensions");
  const RowView rows(x);
  const int64_t B = x.size(0), N = x.size(1), H = heads, D = key_dim;
  LinearWeights qkv = weights_of(scratch, weight_qkv, bias_qkv, packed_qkv, rows.n, rows.type);
  set_norm(scratch, qkv, norm_weight, norm_bias, eps, rows.n, rows.type);
  STD_TORCH_CHECK(H > 0 && D > 0 && D <= qkv.N && qkv.N % H == 0 && qkv.N / H > 2 * D,
                  "attention_layer: heads do not fit weight_qkv");
  const int64_t Dv = qkv.N / H - 2 * D;
  const LinearWeights out =
      weights_of(scratch, weight_out, bias_out, packed_out, H * Dv, rows.type);
  qkv.then = &out;
  Tensor y = empty({B, N, out.N}, x.scalar_type());
  if (y.numel() == 0) return y;

  const Type type = simd::product_type(rows.type);
  float* projected = scratch.take(B * N * qkv.N);
  linear_rows(rows, qkv, {projected, type, simd::plain_rows(qkv.N)});
  // q, k and v of a head: side by side (LeViT), or all heads' q, then all heads' k, then all heads'
  // v
  const int64_t step = interleaved ? 2 * D + Dv : D, step_v = interleaved ? 2 * D + Dv : Dv;
  const int64_t at_k = interleaved ? D : H * D, at_v = 2 * at_k;
  const auto part = [&](int64_t at, int64_t width, int64_t stride_h) {
    return Heads{offset(projected, type, at), type, N, width, N * qkv.N, qkv.N, stride_h};
  };
  float* mixed = scratch.take(B * N * H * Dv);
  attend(part(0, D, step), part(at_k, D, step), part(at_v, Dv, step_v), B, H, bias, std::nullopt,
         std::nullopt, scale, activation, mixed, scratch.take(B * H * N));
  linear_rows(RowView(mixed, type, B * N, H * Dv), out, output_to(y, rows, residual));
  return y;
}

// LeViT's: queries from every stride-th token down and across a grid of H x W.
Tensor subsample_layer(Tensor x, const LinearWeights& kv, const LinearWeights& q,
                       const Tensor& bias, const LinearWeights& out, Scratch& scratch,
                       int64_t heads, int64_t D, int64_t H, int64_t W, int64_t stride,
                       int64_t activation, double scale) {
  const RowView rows(x);
  const int64_t B = x.size(0), N = x.size(1), C = rows.n, Dv = kv.N / heads - D;
  const int64_t down = divide_up(H, stride), across = divide_up(W, stride), Nq = down * across;
  Tensor y = empty({B, Nq, out.N}, x.scalar_type());
  if (y.numel() == 0) return y;

  const Type type = simd::product_type(rows.type);
  void* kept = scratch.take(B * Nq * C);
  for (int64_t b = 0, to = 0; b < B; ++b)
    for (int64_t i = 0; i < H; i += stride)
      for (int64_t j = 0; j < W; j += stride, ++to)
        std::memcpy(offset(kept, rows.type, to * C),
                    offset(rows.data, rows.type, ((b * H + i) * W + j) * rows.stride),
                    C * size_of(rows.type));
  float* keys = scratch.take(B * N * kv.N);
  linear_rows(rows, kv, {keys, type, simd::plain_rows(kv.N)});
  float* queries = scratch.take(B * Nq * q.N);
  linear_rows(RowView(kept, rows.type, B * Nq, C), q, {queries, type, simd::plain_rows(q.N)});
  float* mixed = scratch.take(B * Nq * heads * Dv);
  attend({queries, type, Nq, D, Nq * q.N, q.N, D}, {keys, type, N, D, N * kv.N, kv.N, D + Dv},
         {offset(keys, type, D), type, N, Dv, N * kv.N, kv.N, D + Dv}, B, heads, bias, std::nullopt,
         std::nullopt, scale, activation, mixed, scratch.take(B * heads * Nq));
  linear_rows(RowView(mixed, type, B * Nq, heads * Dv), out,
              {y.mutable_data_ptr(), rows.type, simd::plain_rows(out.N)});
  return y;
}

// The operands of a chain's layers, in the order in which ops/chain.py lists them.
class Operands {
 public:
  using Tensors = std::vector<std::optional<Tensor>>;
  Operands(const Tensors& tensors, const std::vector<int64_t>& ints,
           const std::vector<double>& floats)
      : tensors_(tensors), ints_(ints), floats_(floats) {}

  const std::optional<Tensor>& maybe() { return next(tensors_, tensor_); }
  const Tensor& tensor() {
    const std::optional<Tensor>& x = maybe();
    STD_TORCH_CHECK(x.has_value(), "chain: a tensor is missing");
    return *x;
  }
  int64_t number() { return next(ints_, int_); }
  double real() { return next(floats_, float_); }

 private:
  template <class T>
  static const T& next(const std::vector<T>& from, size_t& at) {
    STD_TORCH_CHECK(at < from.size(), "chain: its layers want more operands");
    return from[at++];
  }
  const Tensors& tensors_;
  const std::vector<int64_t>& ints_;
  const std::vector<double>& floats_;
  size_t tensor_ = 0, int_ = 0, float_ = 0;
};

struct Linear {
  const Tensor& weight;
  const std::optional<Tensor>&bias, &packed;

  explicit Linear(Operands& from)
      : weight(from.tensor()), bias(from.maybe()), packed(from.maybe()) {}
  LinearWeights of(Scratch& scratch, int64_t K, Type type) const {
    return weights_of(scratch, weight, bias, packed, K, type);
  }
};

Tensor run_attention(const Tensor& x, Operands& from) {
  const std::optional<Tensor>&norm_weight = from.maybe(), &norm_bias = from.maybe();
  const Linear qkv(from);
  const std::optional<Tensor>& bias = from.maybe();
  const Linear out(from);
  const int64_t heads = from.number(), key_dim = from.number();
  const bool interleaved = from.number();
  const int64_t activation = from.number();
  const bool residual = from.number();
  const double eps = from.real(), scale = from.real();
  return attention_layer(x, norm_weight, norm_bias, eps, qkv.weight, qkv.bias, qkv.packed, bias,
                         heads, key_dim, interleaved, scale, activation, out.weight, out.bias,
                         out.packed, residual);
}

Tensor run_mlp(const Tensor& x, Operands& from) {
  const std::optional<Tensor>&norm_weight = from.maybe(), &norm_bias = from.maybe();
  const Linear up(from), down(from);
  const int64_t activation = from.number();
  const bool residual = from.number();
  return mlp_layer(x, norm_weight, norm_bias, from.real(), up.weight, up.bias, up.packed,
                   activation, down.weight, down.bias, down.packed, residual);
}

Tensor run_subsample(const Tensor& x, Operands& from) {
  const Linear kv(from), q(from);
  const Tensor& bias = from.tensor();
  const Linear out(from);
  const int64_t heads = from.number(), D = from.number(), H = from.number(), W = from.number();
  const int64_t stride = from.number(), activation = from.number();
  STD_TORCH_CHECK(x.dim() == 3 && H > 0 && W > 0 && H <= kLargestPadding && W <= kLargestPadding &&
                      x.size(1) == H * W && stride > 0 && stride <= kLargestPadding,
                  "chain: the tokens do not fit their grid");
  Scratch scratch;
  const int64_t C = x.size(2), rows = kv.weight.size(0);
  const Type type = type_of(x);
  STD_TORCH_CHECK(heads > 0 && D > 0 && heads <= rows && D <= rows &&  // so no product overflows
                      rows % heads == 0 && rows / heads > D && q.weight.size(0) == heads * D,
                  "chain: heads do not fit the weights");
  const int64_t Hv = rows - heads * D;
  return subsample_layer(x, kv.of(scratch, C, type), q.of(scratch, C, type), bias,
                         out.of(scratch, Hv, type), scratch, heads, D, H, W, stride, activation,
                         from.real());
}

Tensor chain(Tensor x, std::vector<int64_t> layers, Operands::Tensors tensors,
             std::vector<int64_t> ints, std::vector<double> floats) {
  constexpr Tensor (*kLayers[])(const Tensor&, Operands&) = {run_attention, run_mlp, run_subsample};
  STD_TORCH_CHECK(!layers.empty(), "chain: no layers");
  Operands operands(tensors, ints, floats);
  for (int64_t layer : layers) {
    STD_TORCH_CHECK(layer >= 0 && layer < (int64_t)std::size(kLayers), "chain: no such layer");
    x = kLayers[layer](x, operands);
  }
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("chain", TORCH_BOX(&chain));
  m.impl("attention_layer", TORCH_BOX(&attention_layer));
  m.impl("mlp_layer", TORCH_BOX(&mlp_layer));
}

}  // namespace hybridops
