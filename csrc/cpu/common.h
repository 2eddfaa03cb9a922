// What the registering files share: tensors as raw rows, scratch that stays alive, one way to share
// out work.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <vector>

#include "../simd/product.h"

namespace hybridops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// As in ops/_contract.py: sides of an output multiply without overflow.
constexpr int64_t kLargestPadding = 1 << 15;

// Contiguous and uninitialised.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_int64();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(),
                                                  strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline simd::Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return simd::Type::kFloat;
    case ScalarType::BFloat16:
      return simd::Type::kBFloat16;
    case ScalarType::Byte:
      return simd::Type::kByte;
    default:
      STD_TORCH_CHECK(false, "hybridops: the CPU kernels take float32 and bfloat16");
  }
}

inline int64_t size_of(simd::Type type) {
  return type == simd::Type::kFloat ? 4 : type == simd::Type::kBFloat16 ? 2 : 1;
}

inline void* offset(void* data, simd::Type type, int64_t elements) {
  return (char*)data + elements * size_of(type);
}
inline const void* offset(const void* data, simd::Type type, int64_t elements) {
  return (const char*)data + elements * size_of(type);
}

// Memory for what a kernel reads in another form: 64-byte aligned, uninitialised.
class Room {
 public:
  virtual float* take(int64_t floats) = 0;

 protected:
  ~Room() = default;
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  using Block = std::unique_ptr<float, Free>;
  static Block block(size_t floats) {
    auto* data = (float*)std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
    STD_TORCH_CHECK(data != nullptr, "hybridops: out of memory for scratch");
    return Block(data);
  }
  static constexpr size_t kSlack =
      31;  // rounding, and a vector's worth of slack behind every array
};

// Room that lasts as long as its owner.
class Kept final : public Room {
 public:
  float* take(int64_t floats) override {
    blocks_.push_back(block((size_t)std::max<int64_t>(floats, 1) + kSlack));
    return blocks_.back().get();
  }

 private:
  std::vector<Block> blocks_;
};

// Per-thread scratch for the length of a scope. Blocks stay with the thread: fresh pages cost more
// than the arithmetic.
class Scratch final : public Room {
 public:
  Scratch() : block_(state().block), used_(state().used) {}
  ~Scratch() {
    State& s = state();
    s.block = block_;
    s.used = used_;
    if (block_ == 0 && used_ == 0 &&
        s.blocks.size() > 1) {  // outermost: one block that would have held all of it
      size_t total = 0;
      for (const Piece& b : s.blocks) total += b.floats;
      s.blocks.clear();
      s.add(total);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Valid until the scope ends.
  float* take(int64_t floats) override {
    State& s = state();
    const size_t n = ((size_t)std::max<int64_t>(floats, 1) + kSlack) / 16 * 16;
    while (s.block < s.blocks.size() && s.used + n > s.blocks[s.block].floats)
      ++s.block, s.used = 0;
    if (s.block == s.blocks.size()) s.add(n);
    float* p = s.blocks[s.block].data.get() + s.used;
    s.used += n;
    return p;
  }

 private:
  struct Piece {
    Block data;
    size_t floats;
  };
  struct State {
    std::vector<Piece> blocks;
    size_t block = 0, used = 0;
    void add(size_t floats) {
      floats = std::max<size_t>(floats, 1 << 14);
      blocks.push_back({Room::block(floats), floats});
    }
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  size_t block_, used_;
};

// A small vector (bias, norm weight) as fp32.
inline const float* floats(Room& room, const std::optional<Tensor>& x) {
  if (!x.has_value()) return nullptr;
  const int64_t n = x->numel(), stride = x->dim() ? x->stride(x->dim() - 1) : 1;
  if (type_of(*x) == simd::Type::kFloat && (stride == 1 || n <= 1))
    return (const float*)x->const_data_ptr();
  float* y = room.take(n);
  if (stride == 1)
    simd::to_float(x->const_data_ptr(), type_of(*x), n, 1, n, y, n);
  else
    simd::to_float(x->const_data_ptr(), type_of(*x), stride, n, 1, y, 1);
  return y;
}

// The same for a vector that must have n numbers of a type.
inline const float* vector_of(Room& room, const std::optional<Tensor>& x, int64_t n,
                              simd::Type type) {
  if (!x.has_value()) return nullptr;
  STD_TORCH_CHECK(x->is_cpu() && x->dim() == 1 && x->size(0) == n && type_of(*x) == type,
                  "hybridops: a bias or norm vector does not fit");
  return floats(room, x);
}

// A tensor (..., n) as rows that lie a constant stride apart; copied only where its strides do not
// allow that.
struct RowView {
  Tensor tensor;
  const void* data;
  simd::Type type;
  int64_t rows, n, stride;

  // Rows of the caller's own, in scratch.
  RowView(const void* x, simd::Type type, int64_t M, int64_t K)
      : data(x), type(type), rows(M), n(K), stride(K) {}

  explicit RowView(const Tensor& x) : tensor(x), type(type_of(x)) {
    if (!collapses(x)) tensor = torch::stable::contiguous(x);
    const int64_t dim = tensor.dim();
    n = tensor.size(dim - 1);
    rows = 1;
    stride = n;
    for (int64_t d = 0; d + 1 < dim; ++d) rows *= tensor.size(d);
    for (int64_t d = dim - 1; d-- > 0;)
      if (tensor.size(d) != 1) {
        stride = tensor.stride(d);
        break;
      }
    data = tensor.const_data_ptr();
  }

 private:
  static bool collapses(const Tensor& x) {
    const int64_t dim = x.dim();
    if (x.size(dim - 1) != 1 && x.stride(dim - 1) != 1) return false;
    int64_t expected = -1;
    for (int64_t d = dim - 1; d-- > 0;) {
      if (x.size(d) == 1) continue;
      if (expected >= 0 && x.stride(d) != expected) return false;
      expected = x.stride(d) * x.size(d);
    }
    return true;
  }
};

// Whether the pixels of an image (B, C, H, W) lie side by side, and their channels.
inline bool is_channels_last(const Tensor& x) {
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  return (C == 1 || x.stride(1) == 1) && (W == 1 || x.stride(3) == C) &&
         (H == 1 || x.stride(2) == W * C) && (x.size(0) == 1 || x.stride(0) == H * W * C);
}

// Whether this thread is one of several that take images of their own through whole layers.
inline thread_local bool on_its_own = false;

template <class F>
void parallel(int64_t tasks, const F& f) {
  if (tasks <= 0) return;
  if (tasks == 1 || on_its_own) return f(0, tasks);
  torch::stable::parallel_for(0, tasks, 1, f);
}

inline int64_t threads() { return on_its_own ? 1 : torch::stable::get_num_threads(); }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether pieces of n of B images can be shared out, each to one thread: the busiest then has at
// most an eighth more than an even share.
inline bool is_shared_evenly(int64_t B, int64_t n = 1) {
  const int64_t T = threads(), most = divide_up(divide_up(B, n), T) * n;
  return most * T * 8 <= B * 9;
}

// How many of B images a thread takes through many layers at a time, so that what lies between
// these stays in its cache, and no thread waits for another before the end. 0: all threads take
// each layer together, because such pieces would not be shared out evenly.
inline int64_t images_at_once(int64_t B, int64_t bytes_of_one) {
  constexpr int64_t kInCache = 1 << 18;  // a part of L2: the layers' weights pass through it, too
  const int64_t fit = std::max<int64_t>(kInCache / std::max<int64_t>(bytes_of_one, 1), 1);
  const int64_t n = std::min(fit, std::max<int64_t>(divide_up(B, threads()), 1));
  return n < B && is_shared_evenly(B, n) ? n : 0;
}

// f(first, n) for pieces of B images, each by one thread.
template <class F>
void each_on_its_own(int64_t B, int64_t n, const F& f) {
  parallel(divide_up(B, n), [&](int64_t begin, int64_t end) {
    struct Alone {
      bool before = on_its_own;
      Alone() { on_its_own = true; }
      ~Alone() { on_its_own = before; }
    } alone;
    for (int64_t b = begin * n; b < std::min(end * n, B); b += n) f(b, std::min(n, B - b));
  });
}

}  // namespace hybridops
