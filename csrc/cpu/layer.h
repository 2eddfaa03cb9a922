// Whole layers, their weights read and checked once: hybridops/ops/layer.py has their meaning. What
// lies between their products stays in scratch, in the product type.
#pragma once
#include <cstring>

#include "attention.h"
#include "linear.h"

namespace hybridops {

using MaybeTensor = std::optional<Tensor>;

// A layer as a call finds it: its operands read and checked, so that it touches no more than what
// it computes with.
class Layer {
 public:
  virtual ~Layer() = default;
  virtual Tensor run(const Tensor& x) const = 0;
  // Whether each image goes through on its own; one that is (B, N) tokens in front of this layer
  // (B windows of N, in between) becomes what it is behind it.
  virtual bool by_image(int64_t&, int64_t&) const { return true; }
};

// Base of those that are made of products; all their weights have one dtype.
class Weighted : public Layer {
 protected:
  explicit Weighted(const Tensor& weight) : type_(type_of(weight)) {}

  LinearWeights weights(Room& room, const Tensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& packed) const {
    LinearWeights w{panels_of(room, weight, packed), weight.size(0)};
    STD_TORCH_CHECK(type_of(weight) == type_, "layer: its weights differ in dtype");
    w.K = weight.size(1);
    w.bias = vector_of(room, bias, w.N, type_);
    return w;
  }
  void set_norm(Room& room, LinearWeights& w, const MaybeTensor& weight, const MaybeTensor& bias,
                double eps) const {
    w.norm_weight = vector_of(room, weight, w.K, type_);
    w.norm_bias = vector_of(room, bias, w.K, type_);
    w.eps = (float)eps;
    w.check_norm();
  }
  RowView rows(const Tensor& x, const LinearWeights& w) const {
    RowView rows(x);
    STD_TORCH_CHECK(rows.n == w.K && rows.type == type_, "layer: x and weight do not fit");
    return rows;
  }
  simd::Type type() const { return type_; }

 private:
  simd::Type type_;
};

// Whether a bias (B or 1, heads, Nq, Nk) is that of all images.
inline bool is_shared(const MaybeTensor& bias) {
  return !bias.has_value() || (bias->dim() == 4 && bias->size(0) == 1);
}

inline Output output_to(Tensor& y, const RowView& x, bool residual) {
  Output output{y.mutable_data_ptr(), x.type, simd::plain_rows(y.size(y.dim() - 1))};
  if (residual) {
    output.residual = x.data;
    output.residual_grid = simd::plain_rows(x.stride);
  }
  return output;
}

constexpr char kResidual[] = "layer: a residual needs as many channels out as in";

class LinearLayer final : public Weighted {
 public:
  LinearLayer(Room& room, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps,
              const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed)
      : Weighted(weight), linear_(weights(room, weight, bias, packed)) {
    set_norm(room, linear_, norm_weight, norm_bias, eps);
  }

  Tensor run(const Tensor& x) const override {
    STD_TORCH_CHECK(x.dim() >= 1, "chain: x must have at least 1 dimension");
    const RowView rows = Weighted::rows(x, linear_);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = linear_.N;
    Tensor y = empty(sizes, x.scalar_type());
    if (y.numel() > 0) linear_rows(rows, linear_, output_to(y, rows, false));
    return y;
  }

 private:
  LinearWeights linear_;
};

// The mean of an image's tokens: (B, N, C) -> (B, 1, C).
class Mean final : public Layer {
 public:
  Tensor run(const Tensor& x) const override {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) > 0, "chain: there are no tokens to average");
    const RowView rows(x);
    const int64_t B = x.size(0), N = x.size(1), C = x.size(2);
    Tensor y = empty({B, 1, C}, x.scalar_type());
    if (y.numel() == 0) return y;
    void* to = y.mutable_data_ptr();
    parallel(B, [&](int64_t begin, int64_t end) {
      constexpr int64_t kBlock = 16;  // sums of sums: rounding errors do not grow with N
      Scratch scratch;
      float *block = scratch.take(kBlock * C), *sum = scratch.take(C);
      for (int64_t b = begin; b < end; ++b) {
        std::fill(sum, sum + C, 0.0f);
        for (int64_t i = 0; i < N; i += kBlock) {
          const int64_t n = std::min(kBlock, N - i);
          simd::to_float(offset(rows.data, rows.type, (b * N + i) * rows.stride), rows.type,
                         rows.stride, n, C, block, C);
          simd::add_rows(block, C, n, C, sum);
        }
        for (int64_t c = 0; c < C; ++c) sum[c] /= (float)N;
        simd::from_float(sum, C, 1, C, offset(to, rows.type, b * C), rows.type, C);
      }
    });
    return y;
  }
  bool by_image(int64_t&, int64_t& N) const override {
    N = 1;
    return true;
  }
};

class Mlp final : public Weighted {
 public:
  Mlp(Room& room, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps,
      const Tensor& weight1, const MaybeTensor& bias1, const MaybeTensor& packed1,
      int64_t activation, const Tensor& weight2, const MaybeTensor& bias2,
      const MaybeTensor& packed2, bool residual)
      : Weighted(weight1),
        up_(weights(room, weight1, bias1, packed1)),
        down_(weights(room, weight2, bias2, packed2)),
        activation_(activation),
        residual_(residual) {
    set_norm(room, up_, norm_weight, norm_bias, eps);
    STD_TORCH_CHECK(down_.K == up_.N, "mlp_layer: its weights do not fit");
    STD_TORCH_CHECK(!residual || down_.N == up_.K, kResidual);
  }

  Tensor run(const Tensor& x) const override {
    STD_TORCH_CHECK(x.dim() >= 1, "mlp_layer: x must have at least 1 dimension");
    const RowView rows = Weighted::rows(x, up_);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = down_.N;
    Tensor y = empty(sizes, x.scalar_type());
    if (y.numel() == 0) return y;
    LinearWeights up = up_;
    up.then = &down_;
    linear_pair(rows, up, activation_, down_, output_to(y, rows, residual_));
    return y;
  }

 private:
  LinearWeights up_, down_;
  int64_t activation_;
  bool residual_;
};

class Attention final : public Weighted {
 public:
  Attention(Room& room, const MaybeTensor& norm_weight, const MaybeTensor& norm_bias, double eps,
            const Tensor& weight_qkv, const MaybeTensor& bias_qkv, const MaybeTensor& packed_qkv,
            const MaybeTensor& bias, int64_t heads, int64_t key_dim, bool interleaved, double scale,
            int64_t activation, const Tensor& weight_out, const MaybeTensor& bias_out,
            const MaybeTensor& packed_out, bool residual)
      : Weighted(weight_qkv),
        qkv_(weights(room, weight_qkv, bias_qkv, packed_qkv)),
        out_(weights(room, weight_out, bias_out, packed_out)),
        bias_(bias),
        H_(heads),
        D_(key_dim),
        interleaved_(interleaved),
        scale_(scale),
        activation_(activation),
        residual_(residual) {
    set_norm(room, qkv_, norm_weight, norm_bias, eps);
    STD_TORCH_CHECK(H_ > 0 && D_ > 0 && D_ <= qkv_.N && qkv_.N % H_ == 0 && qkv_.N / H_ > 2 * D_,
                    "attention_layer: heads do not fit weight_qkv");
    Dv_ = qkv_.N / H_ - 2 * D_;
    STD_TORCH_CHECK(out_.K == H_ * Dv_, "attention_layer: its weights do not fit");
    STD_TORCH_CHECK(!residual || out_.N == qkv_.K, kResidual);
  }

  Tensor run(const Tensor& x) const override {
    STD_TORCH_CHECK(x.dim() == 3, "attention_layer: x must have 3 dimensions");
    const RowView rows = Weighted::rows(x, qkv_);
    const int64_t B = x.size(0), N = x.size(1), H = H_, D = D_, Dv = Dv_;
    Tensor y = empty({B, N, out_.N}, x.scalar_type());
    if (y.numel() == 0) return y;

    Scratch scratch;
    const simd::Type type = simd::product_type(rows.type);
    LinearWeights qkv = qkv_;
    qkv.then = &out_;
    float* projected = scratch.take(B * N * qkv.N);
    linear_rows(rows, qkv, {projected, type, simd::plain_rows(qkv.N)});
    // q, k and v of a head: side by side (LeViT), or all heads' q, then all heads' k, then all
    // heads' v
    const int64_t step = interleaved_ ? 2 * D + Dv : D, step_v = interleaved_ ? 2 * D + Dv : Dv;
    const int64_t at_k = interleaved_ ? D : H * D, at_v = 2 * at_k;
    const auto part = [&](int64_t at, int64_t width, int64_t stride_h) {
      return Heads{offset(projected, type, at), type, N, width, N * qkv.N, qkv.N, stride_h};
    };
    float* mixed = scratch.take(B * N * H * Dv);
    attend(part(0, D, step), part(at_k, D, step), part(at_v, Dv, step_v), B, H, bias_, std::nullopt,
           std::nullopt, scale_, activation_, mixed, scratch.take(B * H * N));
    linear_rows(RowView(mixed, type, B * N, H * Dv), out_, output_to(y, rows, residual_));
    return y;
  }
  bool by_image(int64_t&, int64_t&) const override { return is_shared(bias_); }

 private:
  LinearWeights qkv_, out_;
  MaybeTensor bias_;
  int64_t H_, D_, Dv_;
  bool interleaved_;
  double scale_;
  int64_t activation_;
  bool residual_;
};

// LeViT's: queries from every stride-th token down and across a grid of H x W.
class Subsample final : public Weighted {
 public:
  Subsample(Room& room, const Tensor& weight_kv, const MaybeTensor& bias_kv,
            const MaybeTensor& packed_kv, const Tensor& weight_q, const MaybeTensor& bias_q,
            const MaybeTensor& packed_q, const Tensor& bias, const Tensor& weight_out,
            const MaybeTensor& bias_out, const MaybeTensor& packed_out, int64_t heads, int64_t D,
            int64_t H, int64_t W, int64_t stride, int64_t activation, double scale)
      : Weighted(weight_kv),
        kv_(weights(room, weight_kv, bias_kv, packed_kv)),
        q_(weights(room, weight_q, bias_q, packed_q)),
        out_(weights(room, weight_out, bias_out, packed_out)),
        bias_(bias),
        heads_(heads),
        D_(D),
        H_(H),
        W_(W),
        stride_(stride),
        activation_(activation),
        scale_(scale) {
    STD_TORCH_CHECK(H > 0 && W > 0 && H <= kLargestPadding && W <= kLargestPadding && stride > 0 &&
                        stride <= kLargestPadding,
                    "chain: no such grid");
    // each by itself first, so that no product overflows
    STD_TORCH_CHECK(heads > 0 && D > 0 && heads <= kv_.N && D <= kv_.N && kv_.N % heads == 0 &&
                        kv_.N / heads > D && q_.N == heads * D,
                    "chain: heads do not fit the weights");
    Dv_ = kv_.N / heads - D;
    STD_TORCH_CHECK(q_.K == kv_.K && out_.K == heads * Dv_, "chain: a layer's weights do not fit");
  }

  Tensor run(const Tensor& x) const override {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == H_ * W_,
                    "chain: the tokens do not fit their grid");
    const RowView rows = Weighted::rows(x, kv_);
    const int64_t B = x.size(0), N = x.size(1), C = rows.n, D = D_, Dv = Dv_;
    const int64_t Nq = tokens();
    Tensor y = empty({B, Nq, out_.N}, x.scalar_type());
    if (y.numel() == 0) return y;

    Scratch scratch;
    const simd::Type type = simd::product_type(rows.type);
    void* kept = scratch.take(B * Nq * C);
    for (int64_t b = 0, to = 0; b < B; ++b)
      for (int64_t i = 0; i < H_; i += stride_)
        for (int64_t j = 0; j < W_; j += stride_, ++to)
          std::memcpy(offset(kept, rows.type, to * C),
                      offset(rows.data, rows.type, ((b * H_ + i) * W_ + j) * rows.stride),
                      C * size_of(rows.type));
    float* keys = scratch.take(B * N * kv_.N);
    linear_rows(rows, kv_, {keys, type, simd::plain_rows(kv_.N)});
    float* queries = scratch.take(B * Nq * q_.N);
    linear_rows(RowView(kept, rows.type, B * Nq, C), q_, {queries, type, simd::plain_rows(q_.N)});
    float* mixed = scratch.take(B * Nq * heads_ * Dv);
    attend({queries, type, Nq, D, Nq * q_.N, q_.N, D}, {keys, type, N, D, N * kv_.N, kv_.N, D + Dv},
           {offset(keys, type, D), type, N, Dv, N * kv_.N, kv_.N, D + Dv}, B, heads_, bias_,
           std::nullopt, std::nullopt, scale_, activation_, mixed, scratch.take(B * heads_ * Nq));
    linear_rows(RowView(mixed, type, B * Nq, heads_ * Dv), out_,
                {y.mutable_data_ptr(), rows.type, simd::plain_rows(out_.N)});
    return y;
  }
  bool by_image(int64_t&, int64_t& N) const override {
    N = tokens();
    return is_shared(bias_);
  }

 private:
  int64_t tokens() const { return divide_up(H_, stride_) * divide_up(W_, stride_); }

  LinearWeights kv_, q_, out_;
  MaybeTensor bias_;
  int64_t heads_, D_, Dv_, H_, W_, stride_, activation_;
  double scale_;
};

}  // namespace hybridops
