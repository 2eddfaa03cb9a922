// One head of attention at a time, on a block of query rows. See hybridops/ops/attention.py for the
// meaning.
#pragma once
#include <cstdint>

#include "product.h"

namespace hybridops::simd {

// Rows of one head: row i starts at data + i * stride elements; its numbers lie side by side.
struct HeadRows {
  const void* data;
  Type type;
  int64_t stride;
};

struct Head {
  int64_t Nq, Nk, D, Dv;
  float scale;
  Type type;  // in which it is multiplied: q's product type

  Depth key_depth() const { return {type, D}; }
  Depth value_depth() const { return {type, Nk}; }
};

int64_t query_block(int64_t Nq);   // rows of a block
int64_t score_stride(int64_t Nk);  // numbers between rows of scores
int64_t packed_head_floats(const Head& head);
int64_t forward_scratch_floats(const Head& head);
int64_t backward_scratch_floats(const Head& head);

// Keys as columns (for the scores) and values as rows (for the outputs), shared by all blocks of a
// head.
void pack_head(const Head& head, HeadRows k, HeadRows v, float* packed);

// Rows [begin, begin + rows) of the output, in q's type, and of the log-sum-exp, which is in powers
// of 2: log2 sum 2^(log2(e) score), what the backward pass wants. `bias` starts
// at row `begin`.
void attention_forward(const Head& head, HeadRows q, int64_t begin, int64_t rows,
                       const float* packed, HeadRows bias, int64_t activation, void* out,
                       int64_t out_stride, float* lse, float* scratch);

// A source of bias rows: those of query rows [begin, begin + rows); data is null for no bias.
struct BiasRows {
  HeadRows (*rows)(const void* context, int64_t begin, int64_t rows);
  const void* context;
};

// dq, dk, dv of a whole head into fp32 rows, those of dk and dv side by side; dbias (Nq x Nk, or
// null) is added to.
void attention_backward(const Head& head, HeadRows q, HeadRows k, HeadRows v, HeadRows dy,
                        const float* lse, BiasRows bias, float* dq, int64_t stride_dq, float* dk,
                        float* dv, float* dbias, float* scratch);

// y = x, n numbers; whether all of them are in [0, size).
bool narrow_index(const int64_t* x, int64_t n, int64_t size, int32_t* y);
bool narrow_index(const int32_t* x, int64_t n, int64_t size, int32_t* y);
// row[j] = table[index[j]], for a block of rows
void gather_bias(const float* table, const int32_t* index, int64_t n, float* row);

}  // namespace hybridops::simd
