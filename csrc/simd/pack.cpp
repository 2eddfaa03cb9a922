// Right-hand sides in panels.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "product.h"
#include "tile.h"

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {
namespace {

// Fetches eight rows ahead: a head's keys and values come from L3, in short rows far apart.
template <class T>
void pack_panel(const T* source, int64_t stride_k, int64_t stride_n, int64_t K, int64_t columns,
                int64_t width, float* panel) {
  if (stride_n == 1) {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t n = 0; n < width; n += kLanes) {
        const int64_t left = columns - n;
        _mm_prefetch((const char*)(source + (k + 8) * stride_k + n), _MM_HINT_T0);
        store(panel + k * width + n, left > 0 ? load_some(source + k * stride_k + n, left) : Vec{});
      }
    return;
  }
  int64_t n = 0;
  if constexpr (std::is_same_v<T, float>)
    if (stride_k == 1)
      for (; n + 8 <= columns; n += 8) {
        int64_t k = 0;
        for (; k + 8 <= K; k += 8) {
          HYBRIDOPS_UNROLL for (int i = 8; i < 16; ++i)
              _mm_prefetch((const char*)(source + (n + i) * stride_n + k), _MM_HINT_T0);
          transpose8(source + n * stride_n + k, stride_n, panel + k * width + n, width);
        }
        for (; k < K; ++k)
          for (int64_t i = n; i < n + 8; ++i) panel[k * width + i] = source[i * stride_n + k];
      }
  for (; n < width; ++n) {
    const T* column = source + n * stride_n;
    for (int64_t k = 0; k < K; ++k)
      panel[k * width + n] = n < columns ? to_float(column[k * stride_k]) : 0.0f;
  }
}

// Two vectors of bf16 numbers, interleaved: one vector of slots.
HYBRIDOPS_INLINE Vec pairs(const BFloat16* even, const BFloat16* odd, int64_t n) {
  const VecInt low = ((VecInt)load_some(even, n) >> 16) & 0xffff;
  return (Vec)(odd ? low | (VecInt)load_some(odd, n) : low);
}

// 8 slots, of which `n` hold numbers.
HYBRIDOPS_INLINE void store8(float* y, const BFloat16* even, const BFloat16* odd, int64_t n) {
  BFloat16 a[8] = {}, b[8] = {};
  std::memcpy(a, even, n * sizeof *a);
  if (odd) std::memcpy(b, odd, n * sizeof *b);
  const __m128i low = _mm_loadu_si128((const __m128i*)a), high = _mm_loadu_si128((const __m128i*)b);
  _mm_storeu_si128((__m128i*)y, _mm_unpacklo_epi16(low, high));
  _mm_storeu_si128((__m128i*)(y + 4), _mm_unpackhi_epi16(low, high));
}

// A panel of bf16 slots.
void pack_pairs(const BFloat16* source, int64_t stride_k, int64_t stride_n, const Depth& K,
                int64_t columns, int64_t width, float* panel) {
  if (stride_k == 1 && stride_n % 2 == 0 && K.length % 2 == 0)  // slots lie in the source already
    return pack_panel((const float*)source, 1, stride_n / 2, K.runs * K.length / 2, columns, width,
                      panel);
  for (int64_t run = 0; run < K.runs; ++run, source += K.length * stride_k)
    for (int64_t k = 0; k < K.length; k += 2, panel += width) {
      const BFloat16* even = source + k * stride_k;
      const BFloat16* odd = k + 1 < K.length ? even + stride_k : nullptr;
      for (int64_t n = 0; n < width; n += kLanes) {
        const int64_t left = columns - n;
        if (stride_n == 1 || left <= 0) {
          store(panel + n, left > 0 ? pairs(even + n, odd ? odd + n : nullptr, left) : Vec{});
          continue;
        }
        BFloat16 a[kLanes] = {}, b[kLanes] = {};
        for (int64_t i = 0; i < kLanes && i < left; ++i) {
          a[i] = even[(n + i) * stride_n];
          if (odd) b[i] = odd[(n + i) * stride_n];
        }
        store(panel + n, pairs(a, b, kLanes));
      }
    }
}

}  // namespace
}  // namespace HYBRIDOPS_SIMD

Type product_type(Type x) {
  return x == Type::kBFloat16 && kBf16Products ? Type::kBFloat16 : Type::kFloat;
}
int64_t panel_count(int64_t N) { return Panels(N).count; }
int64_t panel_offset(int64_t N, const Depth& K, int64_t panel) {
  return Panels(N).offset(panel) * kLanes * slots(K);
}
int64_t padded_columns(int64_t N) { return Panels(N).vectors * kLanes; }
int64_t packed_floats(int64_t N, const Depth& K) { return padded_columns(N) * slots(K); }
int64_t row_tile() { return kRows<kPanel>; }

void pack(const void* source, Type type, int64_t stride_k, int64_t stride_n, const Depth& K,
          int64_t N, int64_t panel_begin, int64_t panel_end, float* packed) {
  const Panels panels(N);
  for (int64_t p = panel_begin; p < panel_end; ++p) {
    const int64_t first = panels.offset(p) * kLanes, width = panels.width(p) * kLanes;
    const int64_t columns = N - first < width ? N - first : width;
    float* panel = packed + first * slots(K);
    if (K.type == Type::kBFloat16)
      pack_pairs((const BFloat16*)source + first * stride_n, stride_k, stride_n, K, columns, width,
                 panel);
    else if (type == Type::kFloat)
      pack_panel((const float*)source + first * stride_n, stride_k, stride_n, K.length * K.runs,
                 columns, width, panel);
    else
      pack_panel((const BFloat16*)source + first * stride_n, stride_k, stride_n, K.length * K.runs,
                 columns, width, panel);
  }
}

void transpose_bf16(const void* x, int64_t stride_x, int64_t rows, int64_t n, void* y,
                    int64_t stride_y) {
  const auto* from = (const BFloat16*)x;
  float block[8][8];
  for (int64_t r = 0; r < rows; r += 16)  // 16 rows are 8 slots, two numbers of a column each
    for (int64_t c = 0; c < n; c += 8) {
      const int64_t columns = std::min<int64_t>(n - c, 8),
                    slots = (std::min<int64_t>(rows - r, 16) + 1) / 2;
      for (int64_t s = 0; s < slots; ++s) {
        const BFloat16* even = from + (r + 2 * s) * stride_x + c;
        const BFloat16* odd = r + 2 * s + 1 < rows ? even + stride_x : nullptr;
        store8(block[s], even, odd, columns);
      }
      transpose8(block[0], 8, block[0], 8);
      for (int64_t i = 0; i < columns; ++i)
        std::memcpy((BFloat16*)y + (c + i) * stride_y + r, block[i], slots * sizeof(float));
    }
}

}  // namespace hybridops::simd
