// Right-hand sides packed on the fly, and the two products of a backward pass, for the ops that
// need them.
#pragma once
#include <cmath>

#include "common.h"

namespace hybridops {

using simd::Output;

// Rows that a task takes through all panels: 96 x 768 fp32 is half of a 512 KB L2.
constexpr int64_t kRowBlock = 96;

// weight (N, K) with any strides, in panels; in parallel.
const float* pack_weight(Room& room, const void* weight, simd::Type type, int64_t stride_n,
                         int64_t stride_k, int64_t N, const simd::Depth& K);

// The numbers of `packed`, which must have been made for this size; `refusal` says so.
const float* check_packed(const Tensor& packed, int64_t N, const simd::Depth& K,
                          const char* refusal);

// Every row of `rows` times the packed weight, shared out over rows or panels, whichever balances
// and reuses better.
void product_parallel(const simd::Rows& rows, int64_t M, const float* packed, int64_t N,
                      const simd::Output& output);

// A linear layer's right-hand side and the LayerNorm in front of it (norm_weight null: none).
struct LinearWeights {
  const float* packed;
  int64_t N;
  const float* bias = nullptr;
  const float *norm_weight = nullptr, *norm_bias = nullptr;
  float eps = 0.0f;
  const LinearWeights* then = nullptr;  // those of the next product, to be fetched ahead
  int64_t K = 0;                        // a layer's: of `then`, and where x is checked

  void check_norm() const {
    STD_TORCH_CHECK(norm_weight ? std::isfinite(eps) && eps >= 0 : !norm_bias,
                    "linear: norm needs a weight and an eps that is finite and not negative");
  }
};

// output = linear(norm(x)): see Output for what follows the product. The bias is the weights'.
void linear_rows(const RowView& x, const LinearWeights& weights, const Output& output);

// output = down(activation(up(norm(x)))), the numbers in between in the product type.
void linear_pair(const RowView& x, const LinearWeights& up, int64_t activation,
                 const LinearWeights& down, const Output& output);

// The panels of a weight (N, K): `packed` if it is given and fits, else packed into `room`.
const float* panels_of(Room& room, const Tensor& weight, const std::optional<Tensor>& packed);

// dweight (N, K) = dz.T @ x and dbias (N) = sum of dz, where chunk(first, rows, buffer) gives rows
// [first, first + rows) of x, K numbers each: in fp32 in `buffer`, or wherever they already lie.
struct ChunkOfRows {
  const void* data;
  simd::Type type;  // fp32, or dz's where that is a product type
  int64_t stride;
};
using RowChunk = ChunkOfRows (*)(const void* context, int64_t first, int64_t rows, float* buffer);
void weight_gradient(const RowView& dz, int64_t N, int64_t K, RowChunk chunk, const void* context,
                     Tensor& dweight, Tensor& dbias);

}  // namespace hybridops
