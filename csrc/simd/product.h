// The matrix product that every op shares: rows read in place (tokens, image patches), a packed
// right-hand side, and bias, activation, residual and the final layout written straight from
// registers. The seam between cpu/ and simd/: tile sizes, panel order and ISA are known only behind
// it.
#pragma once
#include <cstdint>

namespace hybridops::simd {

enum class Type : int64_t { kFloat, kBFloat16, kByte };

// The type in which numbers of type `x` are multiplied here: bf16 where the ISA multiplies it, else
// fp32. Left-hand sides and scratch are in it; sums are fp32 always.
Type product_type(Type x);

// K of a product: `runs` runs of `length` numbers of a product type. A bf16 run of odd length is
// padded in the panels, so that no slot of two numbers straddles runs.
struct Depth {
  Type type;
  int64_t length, runs = 1;
};

// Row m lies (m / inner) * outer_stride + (m % inner) * inner_stride elements behind the start.
struct Grid {
  int64_t inner, outer_stride, inner_stride;
};
inline Grid plain_rows(int64_t stride) { return {INT64_MAX, 0, stride}; }

// The left-hand side: K = runs * length numbers per row, in runs of `length` that lie side by side,
// of a product type. A row of tokens is one run; a convolution's patch is one run per kernel row.
struct Rows {
  const void* data;
  Type type;
  Grid grid;
  int64_t length;
  int64_t runs = 1, stride_run = 0;
};

// y = activation(row_scale * (rows * packed + bias)) + residual, in `type`, N numbers side by side
// per row; the residual inside the activation where `residual_first`.
struct Output {
  void* data;
  Type type;
  Grid grid;
  const float* bias = nullptr;
  const float* row_scale = nullptr;  // one per row
  int64_t activation = 0;
  const void* residual = nullptr;  // in `type`
  Grid residual_grid = {1, 0, 0};
  bool residual_first = false;
  bool few_rows = false;        // of the whole product, not of a task's part: sums in short chains
  const float* then = nullptr;  // what the next product reads first: fetched with the last panel
  int64_t then_floats = 0;
};

// The right-hand side (K, N) in panels: groups of columns that a register tile covers, K rows each,
// padded with zeros.
int64_t panel_count(int64_t N);
int64_t panel_offset(int64_t N, const Depth& K, int64_t panel);  // in floats
int64_t packed_floats(int64_t N, const Depth& K);
int64_t row_tile();  // rows a register tile covers

// Element (k, n) of the source, of type `type` or of K's, lies at k * stride_k + n * stride_n.
void pack(const void* source, Type type, int64_t stride_k, int64_t stride_n, const Depth& K,
          int64_t N, int64_t panel_begin, int64_t panel_end, float* packed);

void product(const Rows& rows, int64_t row_begin, int64_t row_end, const float* packed, int64_t N,
             int64_t panel_begin, int64_t panel_end, const Output& output);

// The bare product for scores: c (M, N) = a (M, K) * packed, a in rows of K's type, c of fp32.
// Writes whole vectors: rows of c need room for padded_columns(N) numbers. `then`: what the next
// product reads first, fetched with each panel.
void plain_product(const void* a, int64_t stride_a, int64_t M, const Depth& K, const float* packed,
                   int64_t N, float* c, int64_t stride_c, const float* then = nullptr,
                   int64_t then_floats = 0);
int64_t padded_columns(int64_t N);

// c (M, N) = or += a.T * packed, with a (K, M) in rows of `stride_a` numbers and c in rows of
// `stride_c`; those of c's columns that the panels hold.
void product_transposed(const float* a, int64_t stride_a, int64_t M, int64_t K, const float* packed,
                        int64_t N, int64_t panel_begin, int64_t panel_end, float* c,
                        int64_t stride_c, bool accumulate);

// x (rows, n) of bf16 as its transpose y (n, rows), rows of y `stride_y` apart; an odd number of
// rows gains one of zeros.
void transpose_bf16(const void* x, int64_t stride_x, int64_t rows, int64_t n, void* y,
                    int64_t stride_y);

// y = activation(x), n numbers, with the bits that `product` gives them.
void activate_numbers(const void* x, Type type, int64_t n, int64_t activation, void* y);

// Rows of n numbers converted to and from fp32.
void to_float(const void* x, Type type, int64_t stride_x, int64_t rows, int64_t n, float* y,
              int64_t stride_y);
void from_float(const float* x, int64_t stride_x, int64_t rows, int64_t n, void* y, Type type,
                int64_t stride_y);

// LayerNorm over rows of n numbers, computed in fp32. bias may be null.
void layer_norm(const void* x, Type type, int64_t stride_x, int64_t rows, int64_t n,
                const float* weight, const float* bias, float eps, void* y, Type type_y,
                int64_t stride_y);

// y[n] += sum over rows of x[row][n]
void add_rows(const float* x, int64_t stride_x, int64_t rows, int64_t n, float* y);

}  // namespace hybridops::simd
