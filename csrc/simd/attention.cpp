#include "attention.h"

#include <algorithm>
#include <cmath>

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

constexpr int64_t kQueryBlock = 64;  // at most: 64 x 577 scores stay in a 512 KB L2

HYBRIDOPS_INLINE int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// An odd number of cache lines per row, so that walking down a column (the transposed products)
// uses every cache set.
HYBRIDOPS_INLINE int64_t skewed(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

// scores <- exp(scores + bias - max); lse and 1 / sum per row. A row of nothing but -inf gives
// zeros.
void softmax_rows(float* scores, int64_t stride, int64_t rows, int64_t n, const float* bias,
                  int64_t bias_stride, float* lse, float* inverse_sum) {
  const int64_t padded = round_up(n);
  for (int64_t r = 0; r < rows; ++r, scores += stride) {
    std::fill(scores + n, scores + padded, -__builtin_inff());
    Vec top = splat(-__builtin_inff());
    for (int64_t i = 0; i < padded; i += kLanes) {
      Vec s = load(scores + i);
      if (bias) {
        s += load_some(bias + r * bias_stride + i, n - i);
        store(scores + i, s);
      }
      top = max(s, top);
    }
    float highest = largest(top);
    if (highest == -__builtin_inff()) highest = 0.0f;
    Vec total{};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Vec p = exp(load(scores + i) - highest);
      store(scores + i, p);
      total += p;
    }
    const float all = sum(total);
    inverse_sum[r] = all == 0.0f ? 0.0f : 1.0f / all;
    lse[r] = highest + std::log(all);
  }
}

// p <- exp(p + bias - lse), dp <- p * (dp - delta); dbias += dp
void softmax_backward_rows(float* p, float* dp, int64_t stride, int64_t rows, int64_t n,
                           const float* bias, int64_t bias_stride, const float* lse,
                           const float* delta, float* dbias) {
  for (int64_t r = 0; r < rows; ++r, p += stride, dp += stride) {
    const bool dead = lse[r] == -__builtin_inff();
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec shift = bias ? load_some(bias + r * bias_stride + i, n - i) : Vec{};
      Vec prob = exp(load(p + i) + shift - lse[r]);
      if (dead) prob = Vec{};
      const Vec ds = prob * (load(dp + i) - delta[r]);
      if (dbias) {
        float* d = dbias + r * n + i;
        store_some(d, load_some(d, n - i) + ds, n - i);
      }
      store(p + i, prob);
      store(dp + i, ds);
    }
  }
}

// Queries as fp32 with the scale in them, as the reference scales them.
void scaled_queries(HeadRows q, int64_t rows, int64_t D, float scale, float* y) {
  to_float(q.data, q.type, q.stride, rows, D, y, D);
  const int64_t n = rows * D;
  for (int64_t i = 0; i < n; i += kLanes) store_some(y + i, load_some(y + i, n - i) * scale, n - i);
}

float dot(const float* a, const float* b, int64_t n) {
  Vec total{};
  for (int64_t i = 0; i < n; i += kLanes)
    total = fma(load_some(a + i, n - i), load_some(b + i, n - i), total);
  return sum(total);
}

HeadRows from(HeadRows rows, int64_t begin) {
  const int64_t size = rows.type == Type::kFloat ? sizeof(float) : sizeof(BFloat16);
  return {(const char*)rows.data + begin * rows.stride * size, rows.type, rows.stride};
}

void multiply_all(const float* a, int64_t stride, int64_t length, int64_t rows, const float* packed,
                  int64_t N, const Output& output) {
  Output whole = output;
  whole.few_rows = rows < 4;
  product(Rows{a, plain_rows(stride), length}, 0, rows, packed, N, 0, panel_count(N), whole);
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

int64_t query_block(int64_t Nq) {
  // Equal blocks, so that no block is left with a few rows: 49 tokens are one block, 197 are 50 +
  // 50 + 50 + 47.
  const int64_t blocks = (Nq + kQueryBlock - 1) / kQueryBlock;
  return blocks ? (Nq + blocks - 1) / blocks : 1;
}
int64_t score_stride(int64_t Nk) { return skewed(Nk); }
int64_t packed_head_floats(const Head& h) {
  return packed_floats(h.Nk, h.D) + packed_floats(h.Dv, h.Nk);
}

int64_t forward_scratch_floats(const Head& h) {
  return kQueryBlock * (score_stride(h.Nk) + h.D + 1);
}

int64_t backward_scratch_floats(const Head& h) {
  return packed_floats(h.Nk, h.D) + packed_floats(h.Nk, h.Dv) + packed_floats(h.D, h.Nk) +
         packed_floats(h.D, kQueryBlock) + packed_floats(h.Dv, kQueryBlock) +
         kQueryBlock * (2 * score_stride(h.Nk) + h.D + 2 * h.Dv + 2);
}

void pack_head(const Head& h, HeadRows k, HeadRows v, float* packed) {
  pack(k.data, k.type, 1, k.stride, h.D, h.Nk, 0, panel_count(h.Nk), packed);
  pack(v.data, v.type, v.stride, 1, h.Nk, h.Dv, 0, panel_count(h.Dv),
       packed + packed_floats(h.Nk, h.D));
}

void attention_forward(const Head& h, HeadRows q, int64_t begin, int64_t rows, const float* packed,
                       const float* bias, int64_t bias_stride, int64_t activation, void* out,
                       int64_t out_stride, float* lse, float* scratch) {
  const int64_t stride = score_stride(h.Nk);
  float* scores = scratch;
  float* queries = scores + kQueryBlock * stride;
  float* inverse_sum = queries + kQueryBlock * h.D;
  scaled_queries(from(q, begin), rows, h.D, h.scale, queries);
  plain_product(queries, h.D, rows, h.D, packed, h.Nk, scores, stride);
  softmax_rows(scores, stride, rows, h.Nk, bias, bias_stride, lse, inverse_sum);
  Output output{out, q.type, plain_rows(out_stride)};
  output.row_scale = inverse_sum;
  output.activation = activation;
  multiply_all(scores, stride, h.Nk, rows, packed + packed_floats(h.Nk, h.D), h.Dv, output);
}

void attention_backward(const Head& h, HeadRows q, HeadRows k, HeadRows v, HeadRows dy,
                        HeadRows out, const float* lse, BiasRows bias, float* dq, float* dk,
                        float* dv, float* dbias, float* scratch) {
  float* next = scratch;
  const auto take = [&next](int64_t n) {
    float* p = next;
    next += n;
    return p;
  };
  const int64_t stride = score_stride(h.Nk);
  float* k_columns = take(packed_floats(h.Nk, h.D));
  float* v_columns = take(packed_floats(h.Nk, h.Dv));
  float* k_rows = take(packed_floats(h.D, h.Nk));
  float* q_packed = take(packed_floats(h.D, kQueryBlock));
  float* dy_packed = take(packed_floats(h.Dv, kQueryBlock));
  float* p = take(kQueryBlock * stride);
  float* dp = take(kQueryBlock * stride);
  float* queries = take(kQueryBlock * h.D);
  float* gradients = take(kQueryBlock * h.Dv);
  float* outputs = take(kQueryBlock * h.Dv);
  float* delta = take(kQueryBlock);
  float* scales = take(kQueryBlock);
  std::fill(scales, scales + kQueryBlock, h.scale);

  pack(k.data, k.type, 1, k.stride, h.D, h.Nk, 0, panel_count(h.Nk), k_columns);
  pack(v.data, v.type, 1, v.stride, h.Dv, h.Nk, 0, panel_count(h.Nk), v_columns);
  pack(k.data, k.type, k.stride, 1, h.Nk, h.D, 0, panel_count(h.D), k_rows);
  if (h.Nq == 0) {
    std::fill(dk, dk + h.Nk * h.D, 0.0f);
    std::fill(dv, dv + h.Nk * h.Dv, 0.0f);
  }
  for (int64_t begin = 0, block = query_block(h.Nq); begin < h.Nq; begin += block) {
    const int64_t rows = std::min(block, h.Nq - begin);
    scaled_queries(from(q, begin), rows, h.D, h.scale, queries);
    to_float(from(dy, begin).data, dy.type, dy.stride, rows, h.Dv, gradients, h.Dv);
    to_float(from(out, begin).data, out.type, out.stride, rows, h.Dv, outputs, h.Dv);
    for (int64_t r = 0; r < rows; ++r)
      delta[r] = dot(gradients + r * h.Dv, outputs + r * h.Dv, h.Dv);

    plain_product(queries, h.D, rows, h.D, k_columns, h.Nk, p, stride);
    plain_product(gradients, h.Dv, rows, h.Dv, v_columns, h.Nk, dp, stride);
    int64_t bias_stride = 0;
    const float* bias_rows =
        bias.rows ? bias.rows(bias.context, begin, rows, &bias_stride) : nullptr;
    softmax_backward_rows(p, dp, stride, rows, h.Nk, bias_rows, bias_stride, lse + begin, delta,
                          dbias ? dbias + begin * h.Nk : nullptr);

    pack(queries, Type::kFloat, h.D, 1, rows, h.D, 0, panel_count(h.D), q_packed);
    pack(gradients, Type::kFloat, h.Dv, 1, rows, h.Dv, 0, panel_count(h.Dv), dy_packed);
    product_transposed(dp, stride, h.Nk, rows, q_packed, h.D, dk, h.D, begin > 0);
    product_transposed(p, stride, h.Nk, rows, dy_packed, h.Dv, dv, h.Dv, begin > 0);
    Output output{dq + begin * h.D, Type::kFloat, plain_rows(h.D)};
    output.row_scale = scales;
    multiply_all(dp, stride, h.Nk, rows, k_rows, h.D, output);
  }
}

void gather_bias(const float* table, const int64_t* index, int64_t n, float* row) {
  for (int64_t j = 0; j < n; ++j) row[j] = table[index[j]];
}

}  // namespace hybridops::simd
