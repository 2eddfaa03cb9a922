// What the registering files share: tensors as checked memory, allocation by torch, launches on
// torch's current stream.
//
// The library registers hybridops_cuda::<op> for CUDA; built with HYBRIDOPS_EMULATE, for CPU, where
// tests run the same kernels.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "device.cuh"

#ifdef HYBRIDOPS_EMULATE
#define HYBRIDOPS_KEY CPU
#else
#include <dlfcn.h>
#define HYBRIDOPS_KEY CUDA
#endif

namespace hybridops::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Contiguous, uninitialised, on the device of `like`; from torch's allocator, so graphs capture it.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;)
    strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                                                       : aoti_torch_dtype_float16();
  const int32_t device =
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), dtype, device,
                               like.is_cuda() ? like.get_device_index() : 0, &handle));
  return Tensor(handle);
}

// The tensor's memory as T, or a null Global for none. Only what its strides span may be touched.
template <class T>
Global<T> memory_of(const Tensor& x) {
  T* p = std::is_const_v<T> ? (T*)x.const_data_ptr() : (T*)x.mutable_data_ptr();
#ifdef HYBRIDOPS_EMULATE
  int64_t span = x.numel() ? 1 : 0;
  for (int64_t d = 0; d < x.dim() && span; ++d) span += (x.size(d) - 1) * x.stride(d);
  return {p, p, p + span};
#else
  return {p};
#endif
}
template <class T>
Global<T> memory_of(const std::optional<Tensor>& x) {
  return x.has_value() ? memory_of<T>(*x) : Global<T>{};
}

// The same tensor, or its contiguous copy.
inline std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x.has_value() ? std::optional(torch::stable::contiguous(*x)) : x;
}

// Calls f with a number of the tensor's type.
template <class F>
void for_type(const Tensor& x, const char* op, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BF16{});
    case ScalarType::Half:
      return f(F16{});
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, float16 and bfloat16");
  }
}

inline bool is_aligned(const Tensor& x, int64_t bytes) {
  return (uintptr_t)x.data_ptr() % bytes == 0;
}

inline void check_device(const Tensor& x, const char* op) {
#ifdef HYBRIDOPS_EMULATE
  STD_TORCH_CHECK(x.is_cpu(), op, ": the emulated kernels take CPU tensors");
#else
  STD_TORCH_CHECK(x.is_cuda(), op, ": a tensor is not on a CUDA device");
#endif
}

#ifdef HYBRIDOPS_EMULATE

class Device {
 public:
  explicit Device(const Tensor&) {}
  int64_t shared_limit() const { return simt::kSharedLimit; }
  int64_t processors() const { return 4; }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              const Arguments&... arguments) const {
    simt::launch(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  }
};

#else

// Makes the tensor's device current for the length of a scope; launches on torch's stream there.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(index_, &stream));
    stream_ = (cudaStream_t)stream;
  }
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
  int64_t processors() const { return attribute(cudaDevAttrMultiProcessorCount); }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              const Arguments&... arguments) const {
    STD_TORCH_CHECK(blocks <= 0x7fffffff, "hybridops: too many blocks for one launch: ", blocks);
    if (shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 (int)shared_bytes));
    cudaLaunchConfig_t config{};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
  }

 private:
  using CurrentStream = AOTITorchError (*)(int32_t, void**);

  // libtorch_cuda.so is asked at the first launch, so that this library loads beside a CPU torch.
  static CurrentStream current_stream() {
    static const CurrentStream found = [] {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return torch_cuda ? (CurrentStream)dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")
                        : nullptr;
    }();
    STD_TORCH_CHECK(found != nullptr, "hybridops: this torch has no CUDA");
    return found;
  }
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "hybridops: CUDA: ", cudaGetErrorString(error));
  }
  int64_t attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index_));
    return value;
  }

  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

#endif

}  // namespace hybridops::cuda
