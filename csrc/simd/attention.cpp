#include "attention.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "activation.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

constexpr int64_t kQueryBlock = 64;  // at most: 64 x 577 scores stay in a 512 KB L2

// An odd number of cache lines per row, so that walking down a column (the transposed products)
// uses every cache set.
HYBRIDOPS_INLINE int64_t skewed(int64_t n) { return ((n + 15) / 16 | 1) * 16; }

constexpr float kLog2E = 1.44269504088896341f;

// f(bias rows in their own type); a null of type None for no bias.
struct None {};
template <class F>
void with_bias(HeadRows bias, const F& f) {
  if (!bias.data) return f((const None*)nullptr);
  bias.type == Type::kFloat ? f((const float*)bias.data) : f((const BFloat16*)bias.data);
}

// scores -> 2^(t - max t), t = log2(e) (scale * scores + bias), in type E where the scores lay; lse
// = log2 sum 2^t and 1 / sum per row. A row of nothing but -inf gives zeros.
template <class E, class Bias>
void softmax_rows(float* scores, int64_t stride, int64_t rows, int64_t n, float scale,
                  const Bias* bias, int64_t bias_stride, float* lse, float* inverse_sum) {
  constexpr bool has_bias = !std::is_same_v<Bias, None>;
  const int64_t whole = n / kLanes * kLanes;
  const Vec factor = splat(scale * kLog2E);
  float* highest = inverse_sum;
  // Two loops over the rows, so that no row waits for the sums and maxima over another's lanes.
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * stride;
    const auto logits = [&](int64_t i, int64_t left) {
      Vec t = load(row + i) * factor;
      if constexpr (has_bias) {
        t = fma(load_some(bias + r * bias_stride + i, left), splat(kLog2E), t);
        store(row + i, t);
      }
      return t;
    };
    Vec top = splat(-__builtin_inff());
    for (int64_t i = 0; i < whole; i += kLanes) top = max(logits(i, kLanes), top);
    if (whole < n) top = max(keep(logits(whole, n - whole), n - whole, -__builtin_inff()), top);
    const float most = largest(top);
    highest[r] = most == -__builtin_inff() ? 0.0f : most;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = scores + r * stride;
    const Vec shift = splat(-highest[r]);
    const auto power = [&](int64_t i) {
      const Vec t = load(row + i);
      return exp2<E>(has_bias ? t + shift : fma(t, factor, shift));
    };
    E* p = (E*)row;  // a vector of E ends where it was read from, or before
    Vec total{};
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Vec y = power(i);
      total += y;
      store(p + i, y);
    }
    if (whole < n) {
      const Vec y = keep(power(whole), n - whole, 0.0f);
      total += y;
      store(p + whole, y);
    }
    lse[r] = sum(total);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float all = lse[r];
    lse[r] = highest[r] + std::log2(all);
    inverse_sum[r] = all == 0.0f ? 0.0f : 1.0f / all;
  }
}

// p: scores -> 2^(t - lse), dp -> scale * p * (dp - delta); dbias += p * (dp - delta). delta, the
// mean of dp weighted by p, is summed up here and not taken from the rounded output: what dp has in
// common over all keys cancels only against its own sum. p is divided by its sum, which is 1 but
// for the rounding of lse: that would be one error of all keys, which no sum evens out.
template <class Bias>
void softmax_backward_rows(float* p, float* dp, int64_t stride, int64_t rows, int64_t n,
                           float scale, const Bias* bias, int64_t bias_stride, const float* lse,
                           float* dbias) {
  constexpr bool has_bias = !std::is_same_v<Bias, None>;
  const Vec factor = splat(scale * kLog2E);
  for (int64_t r = 0; r < rows; ++r, p += stride, dp += stride, bias += bias_stride) {
    const bool dead = lse[r] == -__builtin_inff();
    const Vec shift = splat(-lse[r]);
    Vec all{}, weighted{};
    for (int64_t i = 0; i < n; i += kLanes) {
      // as in the forward pass, to the last bit: large scores would not forgive another rounding
      Vec t = load(p + i);
      if constexpr (has_bias)
        t = fma(load_some(bias + i, n - i), splat(kLog2E), t * factor) + shift;
      else
        t = fma(t, factor, shift);
      Vec prob = dead ? Vec{} : exp2<float>(t);
      if (n - i < kLanes) prob = keep(prob, n - i, 0.0f);
      all += prob;
      weighted = fma(prob, load(dp + i), weighted);
      store(p + i, prob);
    }
    const float share = dead ? 0.0f : 1.0f / sum(all), delta = sum(weighted) * share;
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec prob = load(p + i) * share, ds = prob * (load(dp + i) - delta);
      store(p + i, prob);
      if (dbias) {
        float* d = dbias + r * n + i;
        store_some(d, load_some(d, n - i) + ds, n - i);
      }
      store(dp + i, ds * scale);
    }
  }
}

template <class T>
bool narrow(const T* x, int64_t n, int64_t size, int32_t* y) {
  uint64_t outside = size > INT32_MAX;
  for (int64_t i = 0; i < n; ++i) {
    outside |= (uint64_t)x[i] >= (uint64_t)size;
    y[i] = (int32_t)x[i];
  }
  return !outside;
}

HeadRows from(HeadRows rows, int64_t begin) {
  const int64_t size = rows.type == Type::kFloat ? sizeof(float) : sizeof(BFloat16);
  return {(const char*)rows.data + begin * rows.stride * size, rows.type, rows.stride};
}

void multiply_all(const void* a, int64_t stride, const Depth& K, int64_t rows, const float* packed,
                  int64_t N, const Output& output) {
  Output whole = output;
  whole.few_rows = rows < 4;
  product(Rows{a, K.type, plain_rows(stride), K.length}, 0, rows, packed, N, 0, panel_count(N),
          whole);
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
  return packed_floats(h.Nk, h.key_depth()) + packed_floats(h.Dv, h.value_depth());
}

int64_t forward_scratch_floats(const Head& h) {
  return kQueryBlock * (score_stride(h.Nk) + h.D + 1);
}

int64_t backward_scratch_floats(const Head& h) {
  const auto packed = [](int64_t N, int64_t K) { return packed_floats(N, {Type::kFloat, K}); };
  return packed(h.Nk, h.D) + packed(h.Nk, h.Dv) + packed(h.D, h.Nk) + packed(h.D, kQueryBlock) +
         packed(h.Dv, kQueryBlock) + kQueryBlock * (2 * score_stride(h.Nk) + h.D + h.Dv);
}

void pack_head(const Head& h, HeadRows k, HeadRows v, float* packed) {
  pack(k.data, k.type, 1, k.stride, h.key_depth(), h.Nk, 0, panel_count(h.Nk), packed);
  pack(v.data, v.type, v.stride, 1, h.value_depth(), h.Dv, 0, panel_count(h.Dv),
       packed + packed_floats(h.Nk, h.key_depth()));
}

void attention_forward(const Head& h, HeadRows q, int64_t begin, int64_t rows, const float* packed,
                       HeadRows bias, int64_t activation, void* out, int64_t out_stride, float* lse,
                       float* scratch) {
  const int64_t stride = score_stride(h.Nk);
  float* scores = scratch;
  float* queries = scores + kQueryBlock * stride;
  float* inverse_sum = queries + kQueryBlock * h.D;
  HeadRows block = from(q, begin);
  if (q.type != h.type) {
    to_float(block.data, q.type, q.stride, rows, h.D, queries, h.D);
    block = {queries, Type::kFloat, h.D};
  }
  plain_product(block.data, block.stride, rows, h.key_depth(), packed, h.Nk, scores, stride);
  with_element(h.type == Type::kBFloat16, [&](auto element) {
    with_bias(bias, [&](const auto* b) {
      softmax_rows<decltype(element)>(scores, stride, rows, h.Nk, h.scale, b, bias.stride, lse,
                                      inverse_sum);
    });
  });
  Output output{out, q.type, plain_rows(out_stride)};
  output.row_scale = inverse_sum;
  output.activation = activation;
  const int64_t per_float = h.type == Type::kBFloat16 ? 2 : 1;
  multiply_all(scores, stride * per_float, h.value_depth(), rows,
               packed + packed_floats(h.Nk, h.key_depth()), h.Dv, output);
}

void attention_backward(const Head& h, HeadRows q, HeadRows k, HeadRows v, HeadRows dy,
                        const float* lse, BiasRows bias, float* dq, int64_t stride_dq, float* dk,
                        float* dv, float* dbias, float* scratch) {
  float* next = scratch;
  const auto take = [&next](int64_t n) {
    float* p = next;
    next += n;
    return p;
  };
  const int64_t stride = score_stride(h.Nk);
  const Depth keys{Type::kFloat, h.Nk}, D{Type::kFloat, h.D}, Dv{Type::kFloat, h.Dv};
  const Depth queries_depth{Type::kFloat, kQueryBlock};
  float* k_columns = take(packed_floats(h.Nk, D));
  float* v_columns = take(packed_floats(h.Nk, Dv));
  float* k_rows = take(packed_floats(h.D, keys));
  float* q_packed = take(packed_floats(h.D, queries_depth));
  float* dy_packed = take(packed_floats(h.Dv, queries_depth));
  float* p = take(kQueryBlock * stride);
  float* dp = take(kQueryBlock * stride);
  float* queries = take(kQueryBlock * h.D);
  float* gradients = take(kQueryBlock * h.Dv);

  pack(k.data, k.type, 1, k.stride, D, h.Nk, 0, panel_count(h.Nk), k_columns);
  pack(v.data, v.type, 1, v.stride, Dv, h.Nk, 0, panel_count(h.Nk), v_columns);
  pack(k.data, k.type, k.stride, 1, keys, h.D, 0, panel_count(h.D), k_rows);
  if (h.Nq == 0) {
    std::fill(dk, dk + h.Nk * h.D, 0.0f);
    std::fill(dv, dv + h.Nk * h.Dv, 0.0f);
  }
  for (int64_t begin = 0, block = query_block(h.Nq); begin < h.Nq; begin += block) {
    const int64_t rows = std::min(block, h.Nq - begin);
    to_float(from(q, begin).data, q.type, q.stride, rows, h.D, queries, h.D);
    to_float(from(dy, begin).data, dy.type, dy.stride, rows, h.Dv, gradients, h.Dv);

    plain_product(queries, h.D, rows, D, k_columns, h.Nk, p, stride);
    plain_product(gradients, h.Dv, rows, Dv, v_columns, h.Nk, dp, stride);
    const HeadRows bias_rows = bias.rows(bias.context, begin, rows);
    with_bias(bias_rows, [&](const auto* b) {
      softmax_backward_rows(p, dp, stride, rows, h.Nk, h.scale, b, bias_rows.stride, lse + begin,
                            dbias ? dbias + begin * h.Nk : nullptr);
    });

    const Depth block_depth{Type::kFloat, rows};
    pack(queries, Type::kFloat, h.D, 1, block_depth, h.D, 0, panel_count(h.D), q_packed);
    pack(gradients, Type::kFloat, h.Dv, 1, block_depth, h.Dv, 0, panel_count(h.Dv), dy_packed);
    product_transposed(dp, stride, h.Nk, rows, q_packed, h.D, 0, panel_count(h.D), dk, h.D,
                       begin > 0);
    product_transposed(p, stride, h.Nk, rows, dy_packed, h.Dv, 0, panel_count(h.Dv), dv, h.Dv,
                       begin > 0);
    const Output output{dq + begin * stride_dq, Type::kFloat, plain_rows(stride_dq)};
    multiply_all(dp, stride, keys, rows, k_rows, h.D, output);
  }
}

bool narrow_index(const int64_t* x, int64_t n, int64_t size, int32_t* y) {
  return narrow(x, n, size, y);
}
bool narrow_index(const int32_t* x, int64_t n, int64_t size, int32_t* y) {
  return narrow(x, n, size, y);
}

void gather_bias(const float* table, const int32_t* index, int64_t n, float* row) {
  for (int64_t j = 0; j < n; ++j) row[j] = table[index[j]];
}

}  // namespace hybridops::simd
