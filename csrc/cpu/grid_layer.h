// Layers that know where on the grid a token lies: see hybridops/ops/grid_steps.py for the meaning.
#pragma once
#include "layer.h"
#include "peg.h"

namespace hybridops {

inline void check_grid(int64_t H, int64_t W) {
  STD_TORCH_CHECK(H > 0 && W > 0 && H <= kLargestPadding && W <= kLargestPadding,
                  "chain: no such grid");
}

// Tokens (B, H * W, C) into windows (B * windows, h * w, C), or back.
class Windows final : public Layer {
 public:
  Windows(int64_t H, int64_t W, int64_t h, int64_t w, bool back)
      : H_(H), W_(W), h_(h), w_(w), back_(back) {
    check_grid(H, W);
    STD_TORCH_CHECK(h > 0 && w > 0 && H % h == 0 && W % w == 0,
                    "chain: the windows do not fill their grid");
  }

  Tensor run(const Tensor& x) const override {
    const int64_t across = W_ / w_, windows = H_ / h_ * across;
    STD_TORCH_CHECK(x.dim() == 3 && (back_ ? x.size(1) == h_ * w_ && x.size(0) % windows == 0
                                           : x.size(1) == H_ * W_),
                    "chain: the tokens do not fit their windows");
    const RowView rows(x);
    const int64_t B = back_ ? x.size(0) / windows : x.size(0), C = rows.n;
    Tensor y = back_ ? empty({B, H_ * W_, C}, x.scalar_type())
                     : empty({B * windows, h_ * w_, C}, x.scalar_type());
    if (y.numel() == 0) return y;
    void* to = y.mutable_data_ptr();
    const auto copy = [&](int64_t from_row, int64_t to_row) {  // a window's row: w tokens
      const int64_t run = rows.stride == C ? w_ : 1;
      for (int64_t i = 0; i < w_; i += run)
        std::memcpy(offset(to, rows.type, (to_row + i) * C),
                    offset(rows.data, rows.type, (from_row + i) * rows.stride),
                    run * C * size_of(rows.type));
    };
    parallel(B * H_, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t b = t / H_, i = t % H_;
        for (int64_t j = 0; j < across; ++j) {
          const int64_t token = t * W_ + j * w_;
          const int64_t placed =
              ((b * windows + i / h_ * across + j) * h_ + i % h_) * w_;  // in its window
          back_ ? copy(placed, token) : copy(token, placed);
        }
      }
    });
    return y;
  }

  bool by_image(int64_t& B, int64_t& N) const override {
    const int64_t windows = H_ / h_ * (W_ / w_);
    B = back_ ? B / windows : B * windows;  // 0, too few: a chain that begins with windows
    N = back_ ? H_ * W_ : h_ * w_;
    return true;
  }

 private:
  int64_t H_, W_, h_, w_;
  bool back_;
};

// Depthwise convolution of the tokens, added to them.
class Positions final : public Layer {
 public:
  Positions(Room& room, const Tensor& weight, const MaybeTensor& bias, int64_t H, int64_t W)
      : weight_(weight), taps_(taps_of(room, weight)), H_(H), W_(W) {
    check_grid(H, W);
    STD_TORCH_CHECK(weight.dim() == 4, "chain: weight must have 4 dimensions");
    shift_ = vector_of(room, bias, weight.size(0), type_of(weight));
  }

  Tensor run(const Tensor& x) const override {
    STD_TORCH_CHECK(x.dim() == 3, "chain: the tokens do not fit their grid");
    const int64_t padding = weight_.size(3) / 2;
    return depthwise(x, depthwise_of(x, weight_, H_, W_, 0, 1, padding), taps_, shift_, 0, true, 0,
                     false);
  }

 private:
  Tensor weight_;
  const float *taps_, *shift_;
  int64_t H_, W_;
};

// Queries of all tokens, keys and values of what a convolution makes of every r x r of them.
class Reduced final : public Weighted {
 public:
  Reduced(Room& room, const Tensor& norm_weight, const MaybeTensor& norm_bias, double eps,
          const Tensor& weight_q, const MaybeTensor& bias_q, const MaybeTensor& packed_q,
          const Tensor& weight_r, const MaybeTensor& bias_r, const Tensor& packed_r,
          const Tensor& norm_weight_r, const MaybeTensor& norm_bias_r, double eps_r,
          const Tensor& weight_kv, const MaybeTensor& bias_kv, const MaybeTensor& packed_kv,
          const Tensor& weight_out, const MaybeTensor& bias_out, const MaybeTensor& packed_out,
          int64_t heads, int64_t H, int64_t W, double scale, bool residual)
      : Weighted(weight_q),
        q_(weights(room, weight_q, bias_q, packed_q)),
        kv_(weights(room, weight_kv, bias_kv, packed_kv)),
        out_(weights(room, weight_out, bias_out, packed_out)),
        heads_(heads),
        H_(H),
        W_(W),
        scale_(scale),
        residual_(residual) {
    check_grid(H, W);
    norm_.N = q_.N, norm_.K = q_.K;
    set_norm(room, norm_, norm_weight, norm_bias, eps);
    STD_TORCH_CHECK(weight_r.dim() == 4 && type_of(weight_r) == type() &&
                        weight_r.size(1) == q_.K && weight_r.size(2) == weight_r.size(3),
                    "chain: the reduction does not fit");
    r_ = weight_r.size(2);
    // four channels and fewer may be packed in the other order: see is_planar() in patch_embed.py
    STD_TORCH_CHECK(r_ > 0 && H % r_ == 0 && W % r_ == 0 && q_.K > 4,
                    "chain: the reduction does not fit its grid");
    const simd::Depth depth{simd::product_type(type()), r_ * q_.K, r_};
    reduce_ = {
        check_packed(packed_r, weight_r.size(0), depth, "chain: packed is not pack_patch(weight)"),
        weight_r.size(0)};
    reduce_.bias = vector_of(room, bias_r, reduce_.N, type());
    reduce_.K = reduce_.N;  // of the norm behind it
    set_norm(room, reduce_, norm_weight_r, norm_bias_r, eps_r);
    STD_TORCH_CHECK(heads > 0 && heads <= q_.N && q_.N % heads == 0 && kv_.N == 2 * q_.N &&
                        kv_.K == reduce_.N && out_.K == q_.N,
                    "chain: heads do not fit the weights");
    STD_TORCH_CHECK(!residual || out_.N == q_.K, kResidual);
  }

  Tensor run(const Tensor& x) const override {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(1) == H_ * W_,
                    "chain: the tokens do not fit their grid");
    const RowView rows = Weighted::rows(x, q_);
    const int64_t B = x.size(0), N = x.size(1), C = rows.n, D = q_.N / heads_;
    const int64_t Nr = H_ / r_ * (W_ / r_), width = reduce_.N;
    Tensor y = empty({B, N, out_.N}, x.scalar_type());
    if (y.numel() == 0) return y;

    Scratch scratch;
    const simd::Type type = simd::product_type(rows.type);
    float* normed = scratch.take(B * N * C);
    normalize(rows, norm_, normed);
    float* queries = scratch.take(B * N * q_.N);
    linear_rows(RowView(normed, type, B * N, C), q_, {queries, type, simd::plain_rows(q_.N)});
    float* reduced = scratch.take(B * Nr * width);
    Output to{reduced, simd::Type::kFloat, simd::plain_rows(width)};
    to.bias = reduce_.bias;
    const simd::Grid patches{W_ / r_, r_ * W_ * C, r_ * C};
    product_parallel({normed, type, patches, r_ * C, r_, W_ * C}, B * Nr, reduce_.packed, width,
                     to);
    float* tokens = scratch.take(B * Nr * width);
    normalize(RowView(reduced, simd::Type::kFloat, B * Nr, width), reduce_, tokens);
    float* keys = scratch.take(B * Nr * kv_.N);
    linear_rows(RowView(tokens, type, B * Nr, width), kv_, {keys, type, simd::plain_rows(kv_.N)});
    float* mixed = scratch.take(B * N * q_.N);
    attend({queries, type, N, D, N * q_.N, q_.N, D}, {keys, type, Nr, D, Nr * kv_.N, kv_.N, D},
           {offset(keys, type, q_.N), type, Nr, D, Nr * kv_.N, kv_.N, D}, B, heads_, std::nullopt,
           std::nullopt, std::nullopt, scale_, 0, mixed, scratch.take(B * heads_ * N));
    linear_rows(RowView(mixed, type, B * N, q_.N), out_, output_to(y, rows, residual_));
    return y;
  }

 private:
  // LayerNorm of rows, in the product type of the weights.
  void normalize(const RowView& rows, const LinearWeights& norm, void* to) const {
    const simd::Type type = simd::product_type(this->type());
    constexpr int64_t kBlock = 16;
    parallel(divide_up(rows.rows, kBlock), [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kBlock, count = std::min(end * kBlock, rows.rows) - first;
      simd::layer_norm(offset(rows.data, rows.type, first * rows.stride), rows.type, rows.stride,
                       count, rows.n, norm.norm_weight, norm.norm_bias, norm.eps,
                       offset(to, type, first * rows.n), type, rows.n);
    });
  }

  LinearWeights norm_{}, q_, reduce_{}, kv_, out_;
  int64_t heads_, H_, W_, r_;
  double scale_;
  bool residual_;
};

}  // namespace hybridops
