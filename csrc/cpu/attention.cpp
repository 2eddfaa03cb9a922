// hybridops::attention: see hybridops/ops/attention.py for the meaning.
#include "attention.h"

#include <cmath>
#include <cstring>

namespace hybridops {
namespace {

using simd::BiasRows;
using simd::Head;
using simd::HeadRows;
using simd::Type;

// A tensor as Heads; copied only where the numbers of a row are not side by side.
struct TensorHeads : Heads {
  Tensor tensor;

  explicit TensorHeads(const Tensor& x) : tensor(x) {
    if (x.size(3) != 1 && x.stride(3) != 1) tensor = torch::stable::contiguous(x);
    data = tensor.const_data_ptr();
    type = type_of(x);
    N = tensor.size(1);
    D = tensor.size(3);
    stride_b = tensor.stride(0);
    stride_n = tensor.stride(1);
    stride_h = tensor.stride(2);
  }
};

// The bias in any of its forms, row by row in fp32; a key-padding mask beside a bias goes in as
// -inf.
struct Bias {
  enum Form { kNoBias, kDense, kTable } form = kNoBias;
  const void* data = nullptr;
  Type type = Type::kFloat;
  int64_t stride_b = 0, stride_h = 0, stride_i = 0, stride_j = 0, Nk = 0, table_size = 0;
  const int32_t* index = nullptr;
  const bool* padding = nullptr;

  Bias(Scratch& scratch, const std::optional<Tensor>& bias, const std::optional<Tensor>& bias_index,
       const std::optional<Tensor>& mask, int64_t B, int64_t H, int64_t Nq, int64_t keys)
      : Nk(keys) {
    if (!bias.has_value()) return;
    type = type_of(*bias);
    data = bias->const_data_ptr();
    if (mask.has_value()) padding = (const bool*)mask->const_data_ptr();
    if (bias_index.has_value()) {
      form = kTable;
      STD_TORCH_CHECK(bias->is_cpu() && bias_index->is_cpu() && bias->dim() == 2 &&
                          bias->size(0) == H && bias_index->dim() == 2 &&
                          bias_index->size(0) == Nq && bias_index->size(1) == Nk &&
                          (bias_index->scalar_type() == ScalarType::Long ||
                           bias_index->scalar_type() == ScalarType::Int),
                      "attention: bias table and index do not fit");
      table_size = bias->size(1);
      index = indices(scratch, *bias_index);
      // Read number by number, so once for all images.
      const int64_t scores = Nq * Nk;
      float* table = scratch.take(bias->numel());
      float* dense = scratch.take(H * scores);
      parallel(H, [&](int64_t begin, int64_t end) {
        for (int64_t h = begin; h < end; ++h) {
          float* row = table + h * table_size;  // whatever its strides were
          simd::to_float(offset(data, type, h * bias->stride(0)), type, bias->stride(1), table_size,
                         1, row, 1);
          simd::gather_bias(row, index, scores, dense + h * scores);
        }
      });
      data = dense;
      type = Type::kFloat;
      stride_h = scores, stride_i = Nk, stride_j = 1;
    } else {
      form = kDense;
      const auto fits = [&](int64_t d, int64_t n) {
        return bias->size(d) == 1 || bias->size(d) == n;
      };
      STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 4 && fits(0, B) && fits(1, H) &&
                          fits(2, Nq) && fits(3, Nk),
                      "attention: bias does not broadcast to the scores");
      const auto stride = [&](int64_t d) { return bias->size(d) == 1 ? 0 : bias->stride(d); };
      stride_b = stride(0), stride_h = stride(1), stride_i = stride(2), stride_j = stride(3);
    }
  }
  bool in_place() const { return form != kNoBias && !padding && (stride_j == 1 || Nk == 1); }

  // Rows [begin, begin + rows) of head (b, h), where they lie or, in fp32, in `buffer`.
  HeadRows rows(int64_t b, int64_t h, int64_t begin, int64_t rows, float* buffer) const {
    if (form == kNoBias) return {nullptr, type, 0};
    const int64_t at = b * stride_b + h * stride_h;
    if (in_place()) return {offset(data, type, at + begin * stride_i), type, stride_i};
    for (int64_t r = 0; r < rows; ++r) {
      float* row = buffer + r * Nk;
      const void* from = offset(data, type, at + (begin + r) * stride_i);
      if (stride_j == 1)
        simd::to_float(from, type, Nk, 1, Nk, row, Nk);
      else
        simd::to_float(from, type, stride_j, Nk, 1, row, 1);
      if (padding)
        for (int64_t j = 0; j < Nk; ++j)
          if (padding[b * Nk + j]) row[j] = -INFINITY;
    }
    return {buffer, Type::kFloat, Nk};
  }

 private:
  const int32_t* indices(Scratch& scratch, const Tensor& x) const {
    const Tensor t = torch::stable::contiguous(x);
    auto* y = (int32_t*)scratch.take(t.numel());
    const bool inside =
        t.scalar_type() == ScalarType::Long
            ? simd::narrow_index((const int64_t*)t.const_data_ptr(), t.numel(), table_size, y)
            : simd::narrow_index((const int32_t*)t.const_data_ptr(), t.numel(), table_size, y);
    STD_TORCH_CHECK(inside, "attention: bias_index points outside the table");
    return y;
  }
};

// The keys of one image that take part: all, or, with a mask and no bias, only those that are not
// padding.
struct Keys {
  std::vector<int64_t> kept;
  bool compact;
  int64_t count;

  Keys(const std::optional<Tensor>& mask, bool has_bias, int64_t b, int64_t Nk)
      : compact(mask.has_value() && !has_bias), count(Nk) {
    if (!compact) return;
    const bool* padding = (const bool*)mask->const_data_ptr() + b * Nk;
    for (int64_t j = 0; j < Nk; ++j)
      if (!padding[j]) kept.push_back(j);
    count = (int64_t)kept.size();
    compact = count < Nk;
  }
  HeadRows gather(Scratch& scratch, HeadRows rows, int64_t D) const {
    if (!compact) return rows;
    float* y = scratch.take(count * D);
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(offset(y, rows.type, j * D), offset(rows.data, rows.type, kept[j] * rows.stride),
                  D * size_of(rows.type));
    return {y, rows.type, D};
  }
  // Gradient rows back to their keys in (Nk, stride) rows; keys that took no part get zeros.
  void scatter(const float* d, int64_t D, int64_t Nk, void* to, Type type, int64_t stride) const {
    if (!compact) return simd::from_float(d, D, Nk, D, to, type, stride);
    const std::vector<float> zeros(D, 0.0f);
    int64_t next = 0;
    for (int64_t j = 0; j < Nk; ++j) {
      const bool taken = next < count && kept[next] == j;
      simd::from_float(taken ? d + next++ * D : zeros.data(), D, 1, D, offset(to, type, j * stride),
                       type, stride);
    }
  }
};

void check(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& bias_index, const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "attention: q, k and v must have 4 dimensions");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) &&
                      k.size(2) == q.size(2) && v.size(2) == q.size(2) && k.size(3) == q.size(3),
                  "attention: q, k and v do not fit");
  STD_TORCH_CHECK(type_of(k) == type_of(q) && type_of(v) == type_of(q), "attention: dtypes differ");
  STD_TORCH_CHECK(k.is_cpu() && v.is_cpu(), "attention: k and v must be on the CPU like q");
  STD_TORCH_CHECK(bias.has_value() ? type_of(*bias) == type_of(q) : !bias_index.has_value(),
                  "attention: bias must have q's dtype, and bias_index needs it");
  STD_TORCH_CHECK(!mask.has_value() || (mask->is_cpu() && mask->scalar_type() == ScalarType::Bool &&
                                        mask->dim() == 2 && mask->size(0) == k.size(0) &&
                                        mask->size(1) == k.size(1)),
                  "attention: key_padding_mask does not fit");
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*x)) : x;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
                                     std::optional<Tensor> bias_index,
                                     std::optional<Tensor> key_padding_mask, double scale,
                                     int64_t activation) {
  check(q, k, v, bias, bias_index, key_padding_mask);
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), Dv = v.size(3);
  Tensor out = empty({B, Nq, H, Dv}, q.scalar_type()), lse = empty({B, H, Nq}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  attend(TensorHeads(q), TensorHeads(k), TensorHeads(v), B, H, bias, bias_index, key_padding_mask,
         scale, activation, out.mutable_data_ptr(), (float*)lse.mutable_data_ptr());
  return {out, lse};
}
// Sums dbias (Bb, H, Nq, Nk) over what the bias was broadcast along, or into its table; a fixed
// order throughout.
Tensor reduce_bias(const Tensor& full, const Tensor& bias, const Bias& form, int64_t H,
                   int64_t Nq) {
  const int64_t Nk = form.Nk, Bb = full.size(0);
  Tensor reduced =
      empty(std::vector<int64_t>(bias.sizes().begin(), bias.sizes().end()), ScalarType::Float);
  const auto* from = (const float*)full.const_data_ptr();
  auto* to = (float*)reduced.mutable_data_ptr();
  std::fill(to, to + reduced.numel(), 0.0f);
  if (form.form == Bias::kTable) {
    parallel(H, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        for (int64_t n = 0; n < Nq * Nk; ++n)
          to[h * form.table_size + form.index[n]] += from[h * Nq * Nk + n];
    });
    return reduced;
  }
  const auto stride = [&](int64_t d) { return bias.size(d) == 1 ? 0 : reduced.stride(d); };
  const int64_t sb = stride(0), sh = stride(1), si = stride(2), sj = stride(3);
  for (int64_t b = 0; b < Bb; ++b)
    for (int64_t h = 0; h < H; ++h)
      for (int64_t i = 0; i < Nq; ++i)
        for (int64_t j = 0; j < Nk; ++j) to[b * sb + h * sh + i * si + j * sj] += *from++;
  return reduced;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor dy, Tensor q, Tensor k, Tensor v, std::optional<Tensor> bias,
    std::optional<Tensor> bias_index, std::optional<Tensor> key_padding_mask, Tensor out,
    Tensor lse, double scale, bool needs_dbias) {  // `out` is what kernels for GPUs read
  check(q, k, v, bias, bias_index, key_padding_mask);
  const int64_t B = q.size(0), Nq = q.size(1), H = q.size(2), Nk = k.size(1), D = q.size(3),
                Dv = v.size(3);
  const ScalarType dtype = q.scalar_type();
  Tensor dq = empty({B, Nq, H, D}, dtype), dk = empty({B, Nk, H, D}, dtype),
         dv = empty({B, Nk, H, Dv}, dtype);
  const TensorHeads queries(q), keys(k), values(v), gradients(dy);
  STD_TORCH_CHECK(gradients.type == queries.type && dy.numel() == B * Nq * H * Dv &&
                      out.numel() == dy.numel() && lse.numel() == B * H * Nq,
                  "attention_backward: dy, out and lse do not fit q, k and v");
  const std::optional<Tensor> mask = contiguous(key_padding_mask);
  const Tensor sums = torch::stable::contiguous(lse);
  Scratch shared;
  const Bias biases(shared, bias, bias_index, mask, B, H, Nq, Nk);
  const bool per_image = needs_dbias && !bias_index.has_value() && bias->size(0) != 1;
  Tensor full = empty({needs_dbias ? (per_image ? B : 1) : 0, H, Nq, Nk}, ScalarType::Float);
  auto* dbias = (float*)full.mutable_data_ptr();
  std::fill(dbias, dbias + full.numel(), 0.0f);

  const auto run_head = [&](int64_t b, int64_t h) {
    Scratch scratch;
    const Keys taking(mask, bias.has_value(), b, Nk);
    const Head head{Nq, taking.count, D, Dv, (float)scale, Type::kFloat};
    const Type type = queries.type;
    void* dq_head = offset(dq.mutable_data_ptr(), type, (b * Nq * H + h) * D);
    const bool in_place = type == Type::kFloat;
    float* dq_rows = in_place ? (float*)dq_head : scratch.take(Nq * D);
    float* dk_rows = scratch.take(Nk * D);  // not in place: rows far apart share cache sets
    float* dv_rows = scratch.take(Nk * Dv);
    struct Context {
      const Bias& biases;
      int64_t b, h;
      float* buffer;
    } context{biases, b, h,
              biases.form == Bias::kNoBias || biases.in_place()
                  ? nullptr
                  : scratch.take(simd::query_block(Nq) * Nk)};
    const BiasRows source{[](const void* c, int64_t begin, int64_t rows) {
                            const auto& at = *(const Context*)c;
                            return at.biases.rows(at.b, at.h, begin, rows, at.buffer);
                          },
                          &context};
    float* bias_sum = needs_dbias ? dbias + ((per_image ? b : 0) * H + h) * Nq * Nk : nullptr;
    simd::attention_backward(head, queries.head(b, h), taking.gather(scratch, keys.head(b, h), D),
                             taking.gather(scratch, values.head(b, h), Dv), gradients.head(b, h),
                             (const float*)sums.const_data_ptr() + (b * H + h) * Nq, source,
                             dq_rows, in_place ? H * D : D, dk_rows, dv_rows, bias_sum,
                             scratch.take(simd::backward_scratch_floats(head)));
    if (!in_place) simd::from_float(dq_rows, D, Nq, D, dq_head, type, H * D);
    taking.scatter(dk_rows, D, Nk, offset(dk.mutable_data_ptr(), type, (b * Nk * H + h) * D), type,
                   H * D);
    taking.scatter(dv_rows, Dv, Nk, offset(dv.mutable_data_ptr(), type, (b * Nk * H + h) * Dv),
                   type, H * Dv);
  };
  if (needs_dbias &&
      !per_image) {  // one thread per head adds up its images in order: deterministic
    parallel(H, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        for (int64_t b = 0; b < B; ++b) run_head(b, h);
    });
  } else {
    parallel(B * H, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) run_head(t / H, t % H);
    });
  }
  return {dq, dk, dv,
          needs_dbias ? reduce_bias(full, *bias, biases, H, Nq) : empty({0}, ScalarType::Float)};
}

}  // namespace

void attend(const Heads& queries, const Heads& keys, const Heads& values, int64_t B, int64_t H,
            const std::optional<Tensor>& bias, const std::optional<Tensor>& bias_index,
            const std::optional<Tensor>& key_padding_mask, double scale, int64_t activation,
            void* y, float* sums) {
  const int64_t Nq = queries.N, Nk = keys.N, D = queries.D, Dv = values.D;
  const std::optional<Tensor> mask = contiguous(key_padding_mask);
  Scratch shared;
  const Bias biases(shared, bias, bias_index, mask, B, H, Nq, Nk);
  const int64_t block = simd::query_block(Nq), blocks = divide_up(Nq, block);

  // Tasks of one head lie side by side, so a thread packs that head's keys and values once.
  parallel(B * H * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end;) {
      const int64_t b = t / blocks / H, h = t / blocks % H;
      Scratch scratch;
      const Keys taking(mask, bias.has_value(), b, Nk);
      const Head head{Nq, taking.count, D, Dv, (float)scale, simd::product_type(queries.type)};
      float* packed = scratch.take(simd::packed_head_floats(head));
      simd::pack_head(head, taking.gather(scratch, keys.head(b, h), D),
                      taking.gather(scratch, values.head(b, h), Dv), packed);
      float* work = scratch.take(simd::forward_scratch_floats(head));
      float* bias_buffer =
          biases.form == Bias::kNoBias || biases.in_place() ? nullptr : scratch.take(block * Nk);
      for (; t < end && t / blocks == b * H + h; ++t) {
        const int64_t i = t % blocks * block, rows = std::min(block, Nq - i);
        simd::attention_forward(head, queries.head(b, h), i, rows, packed,
                                biases.rows(b, h, i, rows, bias_buffer), activation,
                                offset(y, queries.type, ((b * Nq + i) * H + h) * Dv), H * Dv,
                                sums + (b * H + h) * Nq + i, work);
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace hybridops
