// hybridops::attention_layer and mlp_layer: see hybridops/ops/layer.py for the meaning. Whole
// layers in one dispatch; what lies between their products stays in scratch, in the product type.
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
  STD_TORCH_CHECK(H > 0 && D > 0 && qkv.N % H == 0 && qkv.N / H > 2 * D,
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("attention_layer", TORCH_BOX(&attention_layer));
  m.impl("mlp_layer", TORCH_BOX(&mlp_layer));
}

}  // namespace hybridops
