// hybridops::attention_layer and mlp_layer: see hybridops/ops/layer.py for the meaning.
#include "layer.h"

namespace hybridops {
namespace {

Tensor mlp_layer(Tensor x, MaybeTensor norm_weight, MaybeTensor norm_bias, double eps,
                 Tensor weight1, MaybeTensor bias1, MaybeTensor packed1, int64_t activation,
                 Tensor weight2, MaybeTensor bias2, MaybeTensor packed2, bool residual) {
  Scratch scratch;
  return Mlp(scratch, norm_weight, norm_bias, eps, weight1, bias1, packed1, activation, weight2,
             bias2, packed2, residual)
      .run(x);
}

Tensor attention_layer(Tensor x, MaybeTensor norm_weight, MaybeTensor norm_bias, double eps,
                       Tensor weight_qkv, MaybeTensor bias_qkv, MaybeTensor packed_qkv,
                       MaybeTensor bias, int64_t heads, int64_t key_dim, bool interleaved,
                       double scale, int64_t activation, Tensor weight_out, MaybeTensor bias_out,
                       MaybeTensor packed_out, bool residual) {
  Scratch scratch;
  return Attention(scratch, norm_weight, norm_bias, eps, weight_qkv, bias_qkv, packed_qkv, bias,
                   heads, key_dim, interleaved, scale, activation, weight_out, bias_out, packed_out,
                   residual)
      .run(x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("attention_layer", TORCH_BOX(&attention_layer));
  m.impl("mlp_layer", TORCH_BOX(&mlp_layer));
}

}  // namespace hybridops
