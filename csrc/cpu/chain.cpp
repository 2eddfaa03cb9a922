// hybridops::chain_plan, chain and chain_forget: see hybridops/ops/chain.py for the meaning.
#include <map>
#include <mutex>

#include "grid_layer.h"

namespace hybridops {
namespace {

// The operands of a chain's layers, in the order in which ops/chain.py lists them.
class Operands {
 public:
  Operands(const std::vector<MaybeTensor>& tensors, const std::vector<int64_t>& ints,
           const std::vector<double>& floats)
      : tensors_(tensors), ints_(ints), floats_(floats) {}

  const MaybeTensor& maybe() { return next(tensors_, tensor_); }
  const Tensor& tensor() {
    const MaybeTensor& x = maybe();
    STD_TORCH_CHECK(x.has_value(), "chain: a tensor is missing");
    return *x;
  }
  int64_t number() { return next(ints_, int_); }
  double real() { return next(floats_, float_); }

 private:
  template <class T>
  static const T& next(const std::vector<T>& from, size_t& at) {
    STD_TORCH_CHECK(at < from.size(), "chain: its layers want more operands");
    return from[at++];
  }
  const std::vector<MaybeTensor>& tensors_;
  const std::vector<int64_t>& ints_;
  const std::vector<double>& floats_;
  size_t tensor_ = 0, int_ = 0, float_ = 0;
};

struct Linear {
  const Tensor& weight;
  const MaybeTensor &bias, &packed;

  explicit Linear(Operands& from)
      : weight(from.tensor()), bias(from.maybe()), packed(from.maybe()) {}
};

std::unique_ptr<Layer> next_attention(Room& room, Operands& from) {
  const MaybeTensor &norm_weight = from.maybe(), &norm_bias = from.maybe();
  const Linear qkv(from);
  const MaybeTensor& bias = from.maybe();
  const Linear out(from);
  const int64_t heads = from.number(), key_dim = from.number();
  const bool interleaved = from.number();
  const int64_t activation = from.number();
  const bool residual = from.number();
  const double eps = from.real(), scale = from.real();
  return std::make_unique<Attention>(room, norm_weight, norm_bias, eps, qkv.weight, qkv.bias,
                                     qkv.packed, bias, heads, key_dim, interleaved, scale,
                                     activation, out.weight, out.bias, out.packed, residual);
}

std::unique_ptr<Layer> next_mlp(Room& room, Operands& from) {
  const MaybeTensor &norm_weight = from.maybe(), &norm_bias = from.maybe();
  const Linear up(from), down(from);
  const int64_t activation = from.number();
  const bool residual = from.number();
  return std::make_unique<Mlp>(room, norm_weight, norm_bias, from.real(), up.weight, up.bias,
                               up.packed, activation, down.weight, down.bias, down.packed,
                               residual);
}

std::unique_ptr<Layer> next_linear(Room& room, Operands& from) {
  const MaybeTensor &norm_weight = from.maybe(), &norm_bias = from.maybe();
  const Linear linear(from);
  return std::make_unique<LinearLayer>(room, norm_weight, norm_bias, from.real(), linear.weight,
                                       linear.bias, linear.packed);
}

std::unique_ptr<Layer> next_mean(Room&, Operands&) { return std::make_unique<Mean>(); }

std::unique_ptr<Layer> next_subsample(Room& room, Operands& from) {
  const Linear kv(from), q(from);
  const Tensor& bias = from.tensor();
  const Linear out(from);
  const int64_t heads = from.number(), D = from.number(), H = from.number(), W = from.number();
  const int64_t stride = from.number(), activation = from.number();
  return std::make_unique<Subsample>(room, kv.weight, kv.bias, kv.packed, q.weight, q.bias,
                                     q.packed, bias, out.weight, out.bias, out.packed, heads, D, H,
                                     W, stride, activation, from.real());
}

std::unique_ptr<Layer> next_windows(Room&, Operands& from) {
  const int64_t H = from.number(), W = from.number(), h = from.number(), w = from.number();
  return std::make_unique<Windows>(H, W, h, w, from.number());
}

std::unique_ptr<Layer> next_reduced(Room& room, Operands& from) {
  const Tensor& norm_weight = from.tensor();
  const MaybeTensor& norm_bias = from.maybe();
  const Linear q(from);
  const Tensor& weight_r = from.tensor();
  const MaybeTensor& bias_r = from.maybe();
  const Tensor &packed_r = from.tensor(), &norm_weight_r = from.tensor();
  const MaybeTensor& norm_bias_r = from.maybe();
  const Linear kv(from), out(from);
  const int64_t heads = from.number(), H = from.number(), W = from.number();
  const bool residual = from.number();
  const double eps = from.real(), eps_r = from.real();
  return std::make_unique<Reduced>(room, norm_weight, norm_bias, eps, q.weight, q.bias, q.packed,
                                   weight_r, bias_r, packed_r, norm_weight_r, norm_bias_r, eps_r,
                                   kv.weight, kv.bias, kv.packed, out.weight, out.bias, out.packed,
                                   heads, H, W, from.real(), residual);
}

std::unique_ptr<Layer> next_positions(Room& room, Operands& from) {
  const Tensor& weight = from.tensor();
  const MaybeTensor& bias = from.maybe();
  const int64_t H = from.number(), W = from.number();
  return std::make_unique<Positions>(room, weight, bias, H, W);
}

// Layers one behind the other, and the tensors that their weights lie in.
class Chain {
 public:
  Chain(const std::vector<int64_t>& layers, std::vector<MaybeTensor> tensors,
        const std::vector<int64_t>& ints, const std::vector<double>& floats)
      : tensors_(std::move(tensors)) {
    constexpr std::unique_ptr<Layer> (*kLayers[])(Room&, Operands&) = {
        next_attention, next_mlp,       next_subsample, next_windows,
        next_reduced,   next_positions, next_linear,    next_mean};
    STD_TORCH_CHECK(!layers.empty(), "chain: no layers");
    Operands operands(tensors_, ints, floats);
    for (int64_t layer : layers) {
      STD_TORCH_CHECK(layer >= 0 && layer < (int64_t)std::size(kLayers), "chain: no such layer");
      layers_.push_back(kLayers[layer](kept_, operands));
    }
  }

  Tensor run(Tensor x) const {
    const int64_t n = piece(x);
    if (n == 0) return through(x);
    const int64_t B = x.size(0);
    std::vector<Tensor> pieces;
    for (int64_t b = 0; b < B; b += n)
      pieces.push_back(torch::stable::narrow(x, 0, b, std::min(n, B - b)));
    each_on_its_own(B, n, [&](int64_t b, int64_t) { pieces[b / n] = through(pieces[b / n]); });
    std::vector<int64_t> sizes(pieces[0].sizes().begin(), pieces[0].sizes().end());
    sizes[0] = sizes[0] / n * B;  // windows are images, too
    Tensor y = empty(sizes, x.scalar_type());
    const int64_t bytes = pieces[0].numel() * size_of(type_of(y));
    parallel((int64_t)pieces.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        std::memcpy((char*)y.mutable_data_ptr() + i * bytes, pieces[i].const_data_ptr(),
                    pieces[i].numel() * size_of(type_of(y)));
    });
    return y;
  }

 private:
  Tensor through(Tensor x) const {
    for (const auto& layer : layers_) x = layer->run(x);
    return x;
  }

  // How many images go through all layers at a time, or 0: all of them. Of few tokens the bits
  // would tell, see Output::few_rows.
  int64_t piece(const Tensor& x) const {
    if (x.dim() != 3 || x.numel() == 0) return 0;
    int64_t B = 1, N = x.size(1);
    const int64_t n = images_at_once(x.size(0), N * x.size(2) * size_of(type_of(x)));
    for (const auto& layer : layers_)
      if (!layer->by_image(B, N) || B * N < 4) return 0;
    return n;
  }

  std::vector<MaybeTensor> tensors_;
  Kept kept_;
  std::vector<std::unique_ptr<Layer>> layers_;
};

// The chains that are planned, by number: what a number never given out means is settled here.
class Chains {
 public:
  int64_t add(std::shared_ptr<const Chain> chain) {
    const std::lock_guard lock(mutex_);
    chains_.emplace(++last_, std::move(chain));
    return last_;
  }
  std::shared_ptr<const Chain> at(int64_t plan) {
    const std::lock_guard lock(mutex_);
    const auto found = chains_.find(plan);
    STD_TORCH_CHECK(found != chains_.end(), "chain: there is no such plan");
    return found->second;
  }
  void remove(int64_t plan) {
    std::shared_ptr<const Chain> gone;  // and its memory after the lock
    const std::lock_guard lock(mutex_);
    const auto found = chains_.find(plan);
    if (found == chains_.end()) return;
    gone = std::move(found->second);
    chains_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Chain>> chains_;
  int64_t last_ = 0;
};

Chains& chains() {
  static auto* const all = new Chains;  // outlives torch's own statics, which its tensors need
  return *all;
}

int64_t chain_plan(std::vector<int64_t> layers, std::vector<MaybeTensor> tensors,
                   std::vector<int64_t> ints, std::vector<double> floats) {
  return chains().add(std::make_shared<const Chain>(layers, std::move(tensors), ints, floats));
}

Tensor chain(Tensor x, int64_t plan) { return chains().at(plan)->run(x); }

int64_t chain_forget(int64_t plan) {
  chains().remove(plan);
  return plan;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) {
  m.impl("chain_plan", TORCH_BOX(&chain_plan));
  m.impl("chain", TORCH_BOX(&chain));
}

STABLE_TORCH_LIBRARY_IMPL(hybridops, CompositeExplicitAutograd, m) {
  m.impl("chain_forget", TORCH_BOX(&chain_forget));
}

}  // namespace hybridops
