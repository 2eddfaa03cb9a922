// hybridops::activation: see hybridops/ops/activation.py for the meaning.
#include "../simd/product.h"
#include "common.h"

namespace hybridops {
namespace {

constexpr int64_t kChunk = 1 << 13;  // numbers per task

Tensor activation(Tensor x, int64_t kind) {
  const Tensor from = torch::stable::contiguous(x);
  const simd::Type type = type_of(from);
  STD_TORCH_CHECK(type != simd::Type::kByte, "activation: x must be numbers");
  Tensor y = empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()), x.scalar_type());
  const int64_t n = y.numel();
  parallel(divide_up(n, kChunk), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunk, last = std::min(end * kChunk, n);
    simd::activate_numbers(offset(from.const_data_ptr(), type, first), type, last - first, kind,
                           offset(y.mutable_data_ptr(), type, first));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hybridops, CPU, m) { m.impl("activation", TORCH_BOX(&activation)); }

}  // namespace hybridops
