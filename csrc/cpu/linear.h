// Right-hand sides packed on the fly, and the two products of a backward pass, for the ops that need them.
#pragma once
#include "common.h"

namespace hybridops {

// weight (N, K) with any strides, in panels; in parallel.
const float* pack_weight(Scratch& scratch, const void* weight, simd::Type type, int64_t stride_n, int64_t stride_k,
                         int64_t N, int64_t K);

// Every row of `rows` times the packed weight, shared out over rows or panels, whichever balances and reuses better.
void product_parallel(const simd::Rows& rows, int64_t M, const float* packed, int64_t N, const simd::Output& output);

// dweight (N, K) = dz.T @ x and dbias (N) = sum of dz, where chunk(first, rows, buffer) gives rows [first, first + rows)
// of x as fp32 rows of K numbers, in `buffer` or wherever they already lie (*stride apart).
using RowChunk = const float* (*)(const void* context, int64_t first, int64_t rows, float* buffer, int64_t* stride);
void weight_gradient(const RowView& dz, int64_t N, int64_t K, RowChunk chunk, const void* context, Tensor& dweight,
                     Tensor& dbias);

}  // namespace hybridops
