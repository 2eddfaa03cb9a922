// hybridops::linear: see hybridops/ops/linear.py for the meaning.
#include "linear.h"

#include <cmath>

namespace hybridops {

using simd::Depth;
using simd::plain_rows;
using simd::product_type;
using simd::Rows;
using simd::Type;

namespace {

void pack_into(float* packed, const void* weight, Type type, int64_t stride_n, int64_t stride_k,
               int64_t N, const Depth& K) {
  parallel(simd::panel_count(N), [=](int64_t begin, int64_t end) {
    simd::pack(weight, type, stride_k, stride_n, K, N, begin, end, packed);
  });
}

}  // namespace

const float* pack_weight(Room& room, const void* weight, Type type, int64_t stride_n,
                         int64_t stride_k, int64_t N, const Depth& K) {
  float* packed = room.take(simd::packed_floats(N, K));
  pack_into(packed, weight, type, stride_n, stride_k, N, K);
  return packed;
}

const float* check_packed(const Tensor& packed, int64_t N, const Depth& K, const char* refusal) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.numel() == simd::packed_floats(N, K) &&
                      packed.is_contiguous() && packed.scalar_type() == ScalarType::Float,
                  refusal);
  return (const float*)packed.const_data_ptr();
}

namespace {

// A weight gradient takes so many tokens at a time, and so many columns of dz. With 256 tokens the
// sums of fp32 are too long for the error rule: 11 times torch's error in Twins' qkv bias.
constexpr int64_t kGradientChunk = 128, kGradientColumns = 192;
constexpr int64_t kSmallGradient = 1 << 16;  // numbers: half of a 512 KB L2

// How a product of M rows and P panels is cut into tasks.
struct Split {
  int64_t row_blocks, rows, panel_blocks, panels;

  Split(int64_t M, int64_t N, int64_t T, bool by_rows_only) {
    const int64_t P = simd::panel_count(N), tile = simd::row_tile();
    row_blocks = std::max<int64_t>(divide_up(M, kRowBlock), 1);
    row_blocks = divide_up(row_blocks, T) * T;
    rows = std::max<int64_t>(divide_up(M, row_blocks), 1);
    row_blocks = divide_up(M, rows);
    panel_blocks = 1;
    panels = P;
    // Few rows: cut the panels instead, so that every thread reads only its own part of the weight.
    const double row_balance = (double)M / (double)(divide_up(row_blocks, T) * T * rows);
    const double panel_balance = (double)P / (double)(divide_up(P, T) * T);
    const bool prefer_panels = N > M && panel_balance > row_balance - 0.02;
    if (M <= kRowBlock * T && T > 1 &&
        (by_rows_only ? M < 8 * tile : prefer_panels || panel_balance > row_balance)) {
      row_blocks = 1;
      rows = M;
      panels = divide_up(P, T);
      panel_blocks = divide_up(P, panels);
    }
  }
  int64_t tasks() const { return row_blocks * panel_blocks; }
};

// Visits [row begin, row end) x [panel begin, panel end) of every task.
template <class F>
void for_tasks(const Split& split, int64_t M, int64_t N, const F& f) {
  const int64_t P = simd::panel_count(N);
  parallel(split.tasks(), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / split.panel_blocks * split.rows,
                    panel = t % split.panel_blocks * split.panels;
      f(row, std::min(row + split.rows, M), panel, std::min(panel + split.panels, P));
    }
  });
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  return std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin(), b.sizes().end());
}

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> packed,
              std::optional<Tensor> norm_weight, std::optional<Tensor> norm_bias, double eps,
              std::optional<Tensor> residual, int64_t activation) {
  const int64_t N = weight.size(0), K = weight.size(1);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == K, "linear: x and weight do not fit");
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = N;
  Tensor y = empty(sizes, x.scalar_type());
  if (y.numel() == 0) return y;

  Scratch scratch;
  const RowView rows(x);
  STD_TORCH_CHECK(type_of(weight) == rows.type, "linear: x and weight differ in dtype");
  Output output{y.mutable_data_ptr(), rows.type, plain_rows(N)};
  output.activation = activation;
  std::optional<RowView> added;
  if (residual.has_value()) {
    STD_TORCH_CHECK(
        residual->is_cpu() && same_sizes(*residual, y) && type_of(*residual) == rows.type,
        "linear: residual does not fit");
    added.emplace(*residual);
    output.residual = added->data;
    output.residual_grid = plain_rows(added->stride);
  }
  LinearWeights weights{panels_of(scratch, weight, packed), N};
  weights.bias = vector_of(scratch, bias, N, rows.type);
  weights.norm_weight = vector_of(scratch, norm_weight, K, rows.type);
  weights.norm_bias = vector_of(scratch, norm_bias, K, rows.type);
  weights.eps = (float)eps;
  weights.check_norm();
  linear_rows(rows, weights, output);
  return y;
}

ChunkOfRows token_rows(const void* context, int64_t first, int64_t rows, float* buffer) {
  const RowView& x = *(const RowView*)context;
  const void* from = offset(x.data, x.type, first * x.stride);
  if (x.type == product_type(x.type)) return {from, x.type, x.stride};
  simd::to_float(from, x.type, x.stride, rows, x.n, buffer, x.n);
  return {buffer, Type::kFloat, x.n};
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor dy, Tensor x, Tensor weight) {
  const int64_t N = weight.size(0), K = weight.size(1);
  STD_TORCH_CHECK(dy.dim() == x.dim() && dy.size(dy.dim() - 1) == N && x.size(x.dim() - 1) == K,
                  "linear_backward: dy, x and weight do not fit");
  STD_TORCH_CHECK(type_of(dy) == type_of(x) && type_of(weight) == type_of(x),
                  "linear_backward: dtypes differ");
  Tensor dx = empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  Tensor dweight = empty({N, K}, x.scalar_type()), dbias = empty({N}, x.scalar_type());
  const RowView gradients(dy), tokens(x);
  if (dx.numel() > 0) {
    Scratch scratch;
    const Type type = type_of(weight);
    const float* panels =  // dx = dy @ weight: the weight's columns are the product's
        pack_weight(scratch, weight.const_data_ptr(), type, weight.stride(1), weight.stride(0), K,
                    {product_type(type), N});
    linear_rows(gradients, {panels, K}, {dx.mutable_data_ptr(), type_of(dx), plain_rows(K)});
  }
  weight_gradient(gradients, N, K, token_rows, &tokens, dweight, dbias);
  return {dx, dweight, dbias};
}

Tensor pack_linear(Tensor weight, int64_t runs) {
  const int64_t N = weight.size(0);
  STD_TORCH_CHECK(weight.dim() == 2 && runs > 0 && weight.size(1) % runs == 0,
                  "pack_linear: weight must be a matrix of equal runs");
  const Type type = type_of(weight);
  const Depth K{product_type(type), weight.size(1) / runs, runs};
  Tensor packed = empty({simd::packed_floats(N, K)}, ScalarType::Float);
  pack_into((float*)packed.mutable_data_ptr(), weight.const_data_ptr(), type, weight.stride(0),
            weight.stride(1), N, K);
  return packed;
}

}  // namespace

void product_parallel(const Rows& rows, int64_t M, const float* packed, int64_t N,
                      const Output& output) {
  Output whole = output;
  whole.few_rows = M < 4;
  for_tasks(Split(M, N, threads(), false), M, N,
            [&](int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
              simd::product(rows, row, row_end, packed, N, panel, panel_end, whole);
            });
}

const float* panels_of(Room& room, const Tensor& weight, const std::optional<Tensor>& packed) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_cpu(),
                  "linear: weight must be a matrix on the CPU");
  const Type type = type_of(weight);
  const Depth K{product_type(type), weight.size(1)};
  if (packed.has_value())
    return check_packed(*packed, weight.size(0), K, "linear: packed is not pack_linear(weight)");
  return pack_weight(room, weight.const_data_ptr(), type, weight.stride(0), weight.stride(1),
                     weight.size(0), K);
}

void linear_part(const RowView& x, const LinearWeights& weights, const Output& output, int64_t row,
                 int64_t row_end, int64_t panel, int64_t panel_end) {
  const int64_t K = x.n, N = weights.N;
  const Type type = product_type(x.type);
  Output part = output;
  part.bias = weights.bias;
  if (const LinearWeights* then = weights.then) {  // where this thread's part of it begins
    const Depth K{type, then->K};
    const int64_t panels = simd::panel_count(then->N);
    const int64_t first = panel * panels / std::max<int64_t>(simd::panel_count(N), 1);
    part.then = then->packed + simd::panel_offset(then->N, K, first);
    part.then_floats =
        simd::panel_offset(then->N, K, first + 1) - simd::panel_offset(then->N, K, first);
  }
  if (x.type == type && !weights.norm_weight)
    return simd::product(Rows{x.data, type, plain_rows(x.stride), K}, row, row_end, weights.packed,
                         N, panel, panel_end, part);
  // LayerNorm, or a widening to fp32, of these rows, in front of their products
  Scratch scratch;
  float* rows = scratch.take((row_end - row) * K);
  const void* from = offset(x.data, x.type, row * x.stride);
  if (weights.norm_weight)
    simd::layer_norm(from, x.type, x.stride, row_end - row, K, weights.norm_weight,
                     weights.norm_bias, weights.eps, rows, type, K);
  else
    simd::to_float(from, x.type, x.stride, row_end - row, K, rows, K);
  part.data = offset(output.data, output.type, row * output.grid.inner_stride);
  if (output.residual)
    part.residual = offset(output.residual, output.type, row * output.residual_grid.inner_stride);
  simd::product(Rows{rows, type, plain_rows(K), K}, 0, row_end - row, weights.packed, N, panel,
                panel_end, part);
}

void linear_rows(const RowView& x, const LinearWeights& weights, const Output& output) {
  Output whole = output;
  whole.few_rows = x.rows < 4;
  const bool in_place = x.type == product_type(x.type) && !weights.norm_weight;
  for_tasks(Split(x.rows, weights.N, threads(), !in_place), x.rows, weights.N,
            [&](int64_t row, int64_t row_end, int64_t panel, int64_t panel_end) {
              linear_part(x, weights, whole, row, row_end, panel, panel_end);
            });
}

void linear_pair(const RowView& x, const LinearWeights& up, int64_t activation,
                 const LinearWeights& down, const Output& output) {
  const int64_t M = x.rows, hidden = up.N, T = threads();
  const int64_t tile = simd::row_tile();
  const Type type = product_type(x.type);
  if (M < 8 * tile * T) {  // few rows: each product is cut by panels, with its own barrier
    Scratch scratch;
    float* between = scratch.take(M * hidden);
    Output middle{between, type, plain_rows(hidden)};
    middle.activation = activation;
    linear_rows(x, up, middle);
    return linear_rows(RowView(between, type, M, hidden), down, output);
  }
  // A block of rows goes through both products at once: what lies between them stays in cache.
  const int64_t blocks = divide_up(divide_up(M, kRowBlock), T) * T;
  const int64_t rows = divide_up(M, blocks);
  parallel(divide_up(M, rows), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* between = scratch.take(rows * hidden);
    for (int64_t row = begin * rows; row < std::min(end * rows, M); row += rows) {
      const int64_t n = std::min(rows, M - row);
      RowView block = x;
      block.data = offset(x.data, x.type, row * x.stride);
      Output middle{between, type, plain_rows(hidden)};
      middle.activation = activation;
      linear_part(block, up, middle, 0, n, 0, simd::panel_count(hidden));
      Output part = output;
      part.data = offset(output.data, output.type, row * output.grid.inner_stride);
      if (output.residual)
        part.residual =
            offset(output.residual, output.type, row * output.residual_grid.inner_stride);
      linear_part(RowView(between, type, n, hidden), down, part, 0, n, 0,
                  simd::panel_count(down.N));
    }
  });
}

namespace {

// What one thread adds up of a weight gradient: rows [m, m_end) of dz and x, columns [n, n_end) of
// dz, panels [panel, panel_end) of x.
struct Part {
  int64_t m, m_end, n, n_end, panel, panel_end;
};

// sums (N, K) and, where it is not null, bias (N), of that part.
void add_up(const RowView& dz, int64_t K, RowChunk chunk, const void* context, const Part& part,
            float* sums, float* bias) {
  Scratch scratch;
  // The chunk of dz is read down its columns: an odd number of cache lines per row uses every
  // cache set.
  const int64_t width = std::min(kGradientColumns, part.n_end - part.n);
  const int64_t stride_dz = (divide_up(width, 16) | 1) * 16;
  float* gradients = scratch.take(kGradientChunk * stride_dz);
  float* columns = scratch.take(width * kGradientChunk);  // bf16: dz transposed
  float* buffer = scratch.take(kGradientChunk * K);
  float* packed = scratch.take(simd::packed_floats(K, {Type::kFloat, kGradientChunk}));
  if (bias) std::fill(bias + part.n, bias + part.n_end, 0.0f);
  for (int64_t m = part.m; m < part.m_end; m += kGradientChunk) {
    const int64_t rows = std::min(kGradientChunk, part.m_end - m);
    const ChunkOfRows x = chunk(context, m, rows, buffer);
    simd::pack(x.data, x.type, x.stride, 1, {x.type, rows}, K, part.panel, part.panel_end, packed);
    for (int64_t n = part.n; n < part.n_end; n += width) {
      const int64_t count = std::min(width, part.n_end - n);
      const void* dz_rows = offset(dz.data, dz.type, m * dz.stride + n);
      simd::to_float(dz_rows, dz.type, dz.stride, rows, count, gradients, stride_dz);
      if (bias) simd::add_rows(gradients, stride_dz, rows, count, bias + n);
      float* to = sums + n * K;
      if (x.type == Type::kFloat) {
        simd::product_transposed(gradients, stride_dz, count, rows, packed, K, part.panel,
                                 part.panel_end, to, K, m > part.m);
        continue;
      }
      simd::transpose_bf16(dz_rows, dz.stride, rows, count, columns, kGradientChunk);
      Output output{to, Type::kFloat, plain_rows(K)};
      if (m > part.m) output.residual = to, output.residual_grid = plain_rows(K);
      simd::product(Rows{columns, x.type, plain_rows(kGradientChunk), rows}, 0, count, packed, K,
                    part.panel, part.panel_end, output);
    }
  }
}

// y (n) = the sum of `parts` rows of x, in order.
void collect(const float* x, int64_t parts, int64_t n, void* y, Type type) {
  constexpr int64_t kAtOnce = 1 << 12;
  parallel(divide_up(n, kAtOnce), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    float* sums = scratch.take(kAtOnce);
    for (int64_t i = begin * kAtOnce; i < std::min(end * kAtOnce, n); i += kAtOnce) {
      const int64_t count = std::min(kAtOnce, n - i);
      std::fill(sums, sums + count, 0.0f);
      simd::add_rows(x + i, n, parts, count, sums);
      simd::from_float(sums, count, 1, count, offset(y, type, i), type, count);
    }
  });
}

}  // namespace

void weight_gradient(const RowView& dz, int64_t N, int64_t K, RowChunk chunk, const void* context,
                     Tensor& dweight, Tensor& dbias) {
  const int64_t M = dz.rows, P = simd::panel_count(K), tile = simd::row_tile();
  const Type type = type_of(dweight);
  // Small gradients are summed over parts of the rows, so that no two threads pack the same rows.
  // How many follows from the shape alone, and so do the bits.
  const int64_t chunks = divide_up(M, kGradientChunk);
  const int64_t parts = N * K <= kSmallGradient ? std::clamp<int64_t>(chunks / 4, 1, 16) : 1;
  const bool in_place = parts == 1 && M > 0 && type == Type::kFloat;
  Scratch scratch;
  float* sums = in_place ? (float*)dweight.mutable_data_ptr() : scratch.take(parts * N * K);
  float* bias = scratch.take(parts * N);
  const auto add = [&](const Part& part, int64_t p, bool with_bias) {
    add_up(dz, K, chunk, context, part, sums + p * N * K, with_bias ? bias + p * N : nullptr);
  };
  if (parts > 1) {
    parallel(parts, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = p * chunks / parts, last = (p + 1) * chunks / parts;
        add({first * kGradientChunk, std::min(last * kGradientChunk, M), 0, N, 0, P}, p, true);
      }
    });
  } else if (K > N) {
    parallel(P, [&](int64_t begin, int64_t end) { add({0, M, 0, N, begin, end}, 0, begin == 0); });
  } else {
    parallel(divide_up(N, tile), [&](int64_t begin, int64_t end) {
      add({0, M, begin * tile, std::min(end * tile, N), 0, P}, 0, true);
    });
  }
  if (!in_place) collect(sums, M > 0 ? parts : 0, N * K, dweight.mutable_data_ptr(), type);
  collect(bias, M > 0 ? parts : 0, N, dbias.mutable_data_ptr(), type);
}

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
}

}  // namespace hybridops
