// A GPU for tests: csrc/cuda/device.cuh on the host, one fiber per thread, every rule checked.
//
// A kernel fails here, with a sentence that names the fault, when
//   - a global or shared access leaves its array, or a vector access is not aligned to its size;
//   - shared memory is read before it was written, or two threads touch the same bytes, one of them
//     writing, without a barrier between (only block_barrier orders different warps, and only
//     warp_barrier the lanes of one);
//   - a copy_async is read before the copier's copy_wait and a barrier;
//   - not all threads of a block reach the same block_barrier, or not all lanes of a warp the same
//     warp instruction;
//   - a tf32 operand has more than 10 bits of mantissa, or a launch exceeds what the smallest
//     supported GPU (sm_86) has.
// Matrix instructions follow the fragment layouts of the PTX ISA, sum exactly and truncate to fp32,
// which is what tensor cores were observed to do (the ISA leaves it open).
#pragma once
#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __launch_bounds__(...)

namespace hybridops::cuda {

namespace simt {

constexpr int64_t kSharedLimit = 99 * 1024;  // sm_86 and sm_89; sm_80 and sm_90 have more

// Runs `kernel` once per thread. Throws std::runtime_error with the fault, if any.
void launch(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// The running thread.
struct Place {
  int64_t block;
  int thread, threads;
};
const Place& here();

// Shared memory, by byte offset from the start of the block's.
char* shared_base();
int64_t shared_size();
void shared_read(int64_t offset, int64_t bytes);
void shared_write(int64_t offset, int64_t bytes);
void async_copy(int64_t to, const void* from_or_null);
void async_commit();
void async_wait(int pending);

void block_barrier(int line);
// Meets the other 31 lanes: the last to come calls act(their 32 arguments), then all go on.
void warp_meet(const char* what, int line, void* mine, void (*act)(void** lanes));
void warp_barrier(int line);

}  // namespace simt

inline int thread_index() { return simt::here().thread; }
inline int thread_count() { return simt::here().threads; }
inline int64_t block_index() { return simt::here().block; }

template <class T>
struct Global {
  T* p = nullptr;
  const void *begin = nullptr, *end = nullptr;  // of the memory that the tensor spans
  Global operator+(int64_t n) const {
    return {(T*)((intptr_t)p + n * (intptr_t)sizeof(T)), begin, end};
  }
  explicit operator bool() const { return p != nullptr; }
  template <class V = std::remove_const_t<T>>
  V load(int64_t i) const {
    static_assert(kFits<V, T>);
    V value;
    std::memcpy(&value, at(i, sizeof(V), "read"), sizeof(V));
    return value;
  }
  template <class V>
  void store(int64_t i, V value) const {
    static_assert(kFits<V, T>);
    std::memcpy((void*)at(i, sizeof(V), "write"), &value, sizeof(V));
  }
  const char* at(int64_t i, int64_t bytes, const char* what) const {
    const char* address = (const char*)((intptr_t)p + i * (intptr_t)sizeof(T));
    if (address < begin || address + bytes > end)
      simt::fail("global %s of %ld bytes at byte %ld of an array of %ld", what, (long)bytes,
                 (long)(address - (const char*)begin), (long)((char*)end - (char*)begin));
    if ((intptr_t)address % bytes)
      simt::fail("global %s of %ld bytes is not aligned", what, (long)bytes);
    return address;
  }
};

template <class T>
struct Shared {
  int64_t start = 0, begin = 0, end = 0;  // bytes from the start of the block's shared memory
  Shared operator+(int n) const { return {start + n * (int64_t)sizeof(T), begin, end}; }
  template <class V = std::remove_const_t<T>>
  V load(int i) const {
    static_assert(kFits<V, T>);
    const int64_t offset = at(i, sizeof(V), "read");
    simt::shared_read(offset, sizeof(V));
    V value;
    std::memcpy(&value, simt::shared_base() + offset, sizeof(V));
    return value;
  }
  template <class V>
  void store(int i, V value) const {
    static_assert(kFits<V, T>);
    const int64_t offset = at(i, sizeof(V), "write");
    simt::shared_write(offset, sizeof(V));
    std::memcpy(simt::shared_base() + offset, &value, sizeof(V));
  }
  int64_t at(int i, int64_t bytes, const char* what) const {
    const int64_t offset = start + i * (int64_t)sizeof(T);
    if (offset < begin || offset + bytes > end)
      simt::fail("shared %s of %ld bytes at byte %ld of an array of %ld", what, (long)bytes,
                 (long)(offset - begin), (long)(end - begin));
    if (offset % bytes) simt::fail("shared %s of %ld bytes is not aligned", what, (long)bytes);
    return offset;
  }
};

class SharedMemory {
 public:
  template <class T>
  Shared<T> take(int count) {
    const int64_t start = used_;
    used_ += (count * (int64_t)sizeof(T) + 15) / 16 * 16;
    if (used_ > simt::shared_size())
      simt::fail("%ld bytes of shared memory taken, the launch asked for %ld", (long)used_,
                 (long)simt::shared_size());
    return {start, start, start + count * (int64_t)sizeof(T)};
  }

 private:
  int64_t used_ = 0;
};

inline void block_barrier(int line = __builtin_LINE()) { simt::block_barrier(line); }
inline void warp_barrier(int line = __builtin_LINE()) { simt::warp_barrier(line); }

inline float shuffle_xor(float x, int mask, int line = __builtin_LINE()) {
  struct Lane {
    float x;
    int mask;
    float y;
  } mine{x, mask, 0.0f};
  simt::warp_meet("shuffle_xor", line, &mine, [](void** lanes) {
    for (int l = 0; l < 32; ++l) {
      auto* lane = (Lane*)lanes[l];
      lane->y = ((Lane*)lanes[l ^ lane->mask])->x;
    }
  });
  return mine.y;
}

inline bool any_in_warp(bool x, int line = __builtin_LINE()) {
  struct Lane {
    bool x, y;
  } mine{x, false};
  simt::warp_meet("any_in_warp", line, &mine, [](void** lanes) {
    bool any = false;
    for (int l = 0; l < 32; ++l) any |= ((Lane*)lanes[l])->x;
    for (int l = 0; l < 32; ++l) ((Lane*)lanes[l])->y = any;
  });
  return mine.y;
}

template <class T>
void copy_async(Shared<T> to, Global<const T> from, bool take) {
  const int64_t offset = to.at(0, 16, "write");
  simt::async_copy(offset, take ? from.at(0, 16, "read") : nullptr);
}
inline void copy_commit() { simt::async_commit(); }
template <int kPending>
void copy_wait() {
  simt::async_wait(kPending);
}

template <bool kTransposed, class T>
void load_matrices(uint32_t (&r)[4], Shared<T> row, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2);
  struct Lane {
    int64_t row;
    uint32_t* r;
  } mine{row.at(0, 16, "read"), r};
  simt::shared_read(mine.row, 16);
  simt::warp_meet("load_matrices", line, &mine, [](void** lanes) {
    for (int l = 0; l < 32; ++l)
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int r = kTransposed ? 2 * (l % 4) + i : l / 4;
          const int c = kTransposed ? l / 4 : 2 * (l % 4) + i;
          const char* from = simt::shared_base() + ((Lane*)lanes[8 * m + r])->row;
          std::memcpy(&pair[i], from + 2 * c, 2);
        }
        std::memcpy(&((Lane*)lanes[l])->r[m], pair, 4);
      }
  });
}

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t round_tf32(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits & 0xffffe000u;  // Inf and NaN
  return (bits + 0x1000u) & 0xffffe000u;
}
inline float fast_exp(float x) { return std::exp(x); }
inline float to_float(F16 x) { return _cvtsh_ss(x.bits); }
inline void from_float(float x, F16& y) { y.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline void from_float(float x, BF16& y) {
  const uint32_t bits = bits_of(x);
  y.bits = std::isnan(x) ? 0x7fff : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

namespace simt {

struct Operands {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// c += a b, dense and by rows, exact until the end and then truncated.
template <int K>
void product(const float (&a)[16][K], const float (&b)[K][8], float (&c)[16][8]) {
  for (int i = 0; i < 16; ++i) {
    double sum[8];
    for (int j = 0; j < 8; ++j) sum[j] = c[i][j];
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += (double)a[i][k] * (double)b[k][j];
    for (int j = 0; j < 8; ++j) {
      const float rounded = (float)sum[j];
      const bool grew = std::fabs((double)rounded) > std::fabs(sum[j]) && std::isfinite(rounded);
      c[i][j] = grew ? float_of(bits_of(rounded) - 1) : rounded;
    }
  }
}

template <int K, class F>
void multiply_lanes(void** lanes, F unpack) {
  float a[16][K], b[K][8], c[16][8];
  for (int l = 0; l < 32; ++l) unpack(*(Operands*)lanes[l], l / 4, l % 4, a, b);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i)
      c[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2] = ((Operands*)lanes[l])->c[i];
  product<K>(a, b, c);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i)
      ((Operands*)lanes[l])->c[i] = c[l / 4 + i / 2 * 8][2 * (l % 4) + i % 2];
}

}  // namespace simt

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T,
                  int line = __builtin_LINE()) {
  simt::Operands mine{c, a, {b0, b1}};
  if constexpr (sizeof(T) == 2) {
    simt::warp_meet("multiply_add", line, &mine, [](void** lanes) {
      simt::multiply_lanes<16>(lanes, [](simt::Operands& lane, int g, int t, auto& a, auto& b) {
        auto half = [](uint32_t pair, int i) {
          return to_float(T{(uint16_t)(i ? pair >> 16 : pair & 0xffff)});
        };
        for (int i = 0; i < 2; ++i) {
          a[g][2 * t + i] = half(lane.a[0], i);
          a[g + 8][2 * t + i] = half(lane.a[1], i);
          a[g][2 * t + 8 + i] = half(lane.a[2], i);
          a[g + 8][2 * t + 8 + i] = half(lane.a[3], i);
          b[2 * t + i][g] = half(lane.b[0], i);
          b[2 * t + 8 + i][g] = half(lane.b[1], i);
        }
      });
    });
  } else {
    for (uint32_t x : {a[0], a[1], a[2], a[3], b0, b1})
      if (x & 0x1fffu) simt::fail("a tf32 operand that round_tf32 did not make");
    simt::warp_meet("multiply_add", line, &mine, [](void** lanes) {
      simt::multiply_lanes<8>(lanes, [](simt::Operands& lane, int g, int t, auto& a, auto& b) {
        a[g][t] = float_of(lane.a[0]);
        a[g + 8][t] = float_of(lane.a[1]);
        a[g][t + 4] = float_of(lane.a[2]);
        a[g + 8][t + 4] = float_of(lane.a[3]);
        b[t][g] = float_of(lane.b[0]);
        b[t + 4][g] = float_of(lane.b[1]);
      });
    });
  }
}

}  // namespace hybridops::cuda
