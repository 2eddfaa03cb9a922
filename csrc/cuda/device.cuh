// The seam: every hardware instruction a kernel uses goes through here, so that the same .cu file
// also builds for the host, where tests/emulation/simt.h stands in for the GPU.
//
// Memory is reached through Global<T> and Shared<T> alone: plain pointers on the GPU, checked ones
// in the emulation. Everything else in a kernel is ordinary C++. sm_80 instructions only.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#ifndef HYBRIDOPS_EMULATE
#define HYBRIDOPS_DEVICE __device__ __forceinline__
#else
#define HYBRIDOPS_DEVICE inline
#endif

namespace hybridops::cuda {

// 16-bit floats by their bits alone: no CUDA header, and the same type on the host.
struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

template <class T, int N>
struct alignas(N * sizeof(T)) Vec {
  T v[N];
};

// What an array of T may be read and written as.
template <class V, class T>
constexpr bool kFits = std::is_same_v<V, std::remove_const_t<T>>;
template <class U, int N, class T>
constexpr bool kFits<Vec<U, N>, T> = std::is_same_v<U, std::remove_const_t<T>>;

constexpr int kWarp = 32;

}  // namespace hybridops::cuda

#ifdef HYBRIDOPS_EMULATE
#include "simt.h"
#else

namespace hybridops::cuda {

// Where a thread stands.
HYBRIDOPS_DEVICE int thread_index() { return threadIdx.x; }
HYBRIDOPS_DEVICE int thread_count() { return blockDim.x; }
HYBRIDOPS_DEVICE int64_t block_index() { return blockIdx.x; }

// Memory. Offsets count elements of T; V is T or a Vec of it, at a multiple of its own size.
template <class T>
struct Global {
  T* p;
  HYBRIDOPS_DEVICE Global operator+(int64_t n) const { return {p + n}; }
  HYBRIDOPS_DEVICE explicit operator bool() const { return p != nullptr; }
  template <class V = std::remove_const_t<T>>
  HYBRIDOPS_DEVICE V load(int64_t i) const {
    static_assert(kFits<V, T>);
    return *reinterpret_cast<const V*>(p + i);
  }
  template <class V>
  HYBRIDOPS_DEVICE void store(int64_t i, V value) const {
    static_assert(kFits<V, T>);
    *reinterpret_cast<V*>(p + i) = value;
  }
};

template <class T>
struct Shared {
  T* p;
  HYBRIDOPS_DEVICE Shared operator+(int n) const { return {p + n}; }
  template <class V = std::remove_const_t<T>>
  HYBRIDOPS_DEVICE V load(int i) const {
    static_assert(kFits<V, T>);
    return *reinterpret_cast<const V*>(p + i);
  }
  template <class V>
  HYBRIDOPS_DEVICE void store(int i, V value) const {
    static_assert(kFits<V, T>);
    *reinterpret_cast<V*>(p + i) = value;
  }
};

// Cuts the block's shared memory into arrays; the launch asks for the sum of shared_bytes().
class SharedMemory {
 public:
  template <class T>
  HYBRIDOPS_DEVICE Shared<T> take(int count) {
    extern __shared__ uint4 memory[];
    T* start = reinterpret_cast<T*>(reinterpret_cast<char*>(memory) + used_);
    used_ += (count * (int)sizeof(T) + 15) / 16 * 16;
    return {start};
  }

 private:
  int used_ = 0;
};

// Threads together. All lanes of a warp, or all threads of a block, must arrive.
HYBRIDOPS_DEVICE void block_barrier() { __syncthreads(); }
HYBRIDOPS_DEVICE void warp_barrier() { __syncwarp(); }
HYBRIDOPS_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
HYBRIDOPS_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }

// Copies 16 bytes without registers, or zeros them; they are there after copy_wait and a barrier.
template <class T>
HYBRIDOPS_DEVICE void copy_async(Shared<T> to, Global<const T> from, bool take) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to.p));
  const int bytes = take ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from.p),
               "r"(bytes)
               : "memory");
}
HYBRIDOPS_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
HYBRIDOPS_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane 8m + r names row r of matrix m. Lane l gets, of each
// matrix, row l/4, columns 2(l%4) and the next; transposed, column l/4, rows 2(l%4) and the next.
template <bool kTransposed, class T>
HYBRIDOPS_DEVICE void load_matrices(uint32_t (&r)[4], Shared<T> row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row.p));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// c (16x8, fp32) += a (16x16) b (16x8). With g = lane/4 and t = lane%4: a holds rows g and g+8 at
// columns 2t, 2t+1, then both at 2t+8, 2t+9; b rows 2t, 2t+1, then 2t+8, 2t+9 of column g; c rows
// g, then g+8, at columns 2t, 2t+1.
HYBRIDOPS_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   BF16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
HYBRIDOPS_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   F16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c (16x8) += a (16x8) b (8x8) of tf32: a holds rows g, g+8 of column t, then of column t+4; b rows
// t, t+4 of column g. Operands come from round_tf32.
HYBRIDOPS_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Numbers.
HYBRIDOPS_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
HYBRIDOPS_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
HYBRIDOPS_DEVICE uint32_t round_tf32(float x) {  // 10 bits of mantissa, ties away from zero
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
HYBRIDOPS_DEVICE float fast_exp(float x) { return __expf(x); }  // 2 ulp + |x| 2^-24
HYBRIDOPS_DEVICE float to_float(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
HYBRIDOPS_DEVICE void from_float(float x, F16& y) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}
HYBRIDOPS_DEVICE void from_float(float x, BF16& y) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
}

}  // namespace hybridops::cuda
#endif

namespace hybridops::cuda {

HYBRIDOPS_DEVICE float to_float(BF16 x) { return float_of((uint32_t)x.bits << 16); }
HYBRIDOPS_DEVICE float to_float(float x) { return x; }
HYBRIDOPS_DEVICE void from_float(float x, float& y) { y = x; }
template <class T>
HYBRIDOPS_DEVICE T cast(float x) {
  T y;
  from_float(x, y);
  return y;
}

template <class T>
HYBRIDOPS_DEVICE T least(T a, T b) {
  return a < b ? a : b;
}

// Bytes that SharedMemory::take<T>(count) uses.
template <class T>
constexpr int64_t shared_bytes(int64_t count) {
  return (count * (int64_t)sizeof(T) + 15) / 16 * 16;
}

// Sums (or maxima) over groups of lanes, in a fixed order.
template <int kLanes>
HYBRIDOPS_DEVICE float sum_over(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
template <int kLanes>
HYBRIDOPS_DEVICE float max_over(float x) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// Activations by the code that hybridops/ops/_contract.py gives them.
enum Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kHardswish };

HYBRIDOPS_DEVICE float activate(float x, int kind) {
  switch (kind) {
    case kRelu:
      return x < 0.0f ? 0.0f : x;  // NaN stays NaN
    case kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case kGeluTanh:
    case kSilu: {  // one division for both, in code: 0.5 x (1 + tanh(t)) = x sigmoid(2t)
      const float twice = x * 1.5957691216057308f * fmaf(x * x, 0.044715f, 1.0f);
      return x / (expf(kind == kSilu ? -x : -twice) + 1.0f);
    }
    case kHardswish:
      return x * fminf(fmaxf(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    default:
      return x;
  }
}

}  // namespace hybridops::cuda
