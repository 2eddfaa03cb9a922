// One float vector per ISA: 8 lanes on AVX2, 16 on AVX-512. Everything above this file is written
// once.
//
// Arithmetic uses the compiler's own vector types, so the same source also builds for 16 lanes on
// an AVX2 machine (HYBRIDOPS_EMULATE): the tests prove the wide code path there. All functions are
// inline and in a namespace of the ISA, so that no wide instruction can leak into another library
// through a shared symbol.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#if defined(HYBRIDOPS_ISA_AVX512)
#define HYBRIDOPS_LANES 16
#if defined(HYBRIDOPS_EMULATE)
#define HYBRIDOPS_SIMD emulated512
#else
#define HYBRIDOPS_SIMD avx512
#endif
#elif defined(HYBRIDOPS_ISA_AVX2)
#define HYBRIDOPS_LANES 8
#define HYBRIDOPS_SIMD avx2
#else
#error "compile with -DHYBRIDOPS_ISA_AVX2 or -DHYBRIDOPS_ISA_AVX512"
#endif

#pragma GCC diagnostic ignored \
    "-Wpsabi"  // 64-byte vectors never cross a function boundary: all is inlined

namespace hybridops::simd {
inline namespace HYBRIDOPS_SIMD {

constexpr int kLanes = HYBRIDOPS_LANES;
using Vec = float __attribute__((vector_size(kLanes * 4)));
using VecInt = int32_t __attribute__((vector_size(kLanes * 4)));
using BFloat16 = uint16_t;
#if HYBRIDOPS_LANES == 16
union Halves {
  Vec whole;
  __m256 half[2];
};
#endif

#define HYBRIDOPS_INLINE inline __attribute__((always_inline))
#define HYBRIDOPS_UNROLL _Pragma("GCC unroll 32")

// Not Vec{} + x: the compiler must keep that addition, which turns -0 into 0.
#if defined(HYBRIDOPS_ISA_AVX512) && !defined(HYBRIDOPS_EMULATE)
HYBRIDOPS_INLINE Vec splat(float x) { return (Vec)_mm512_set1_ps(x); }
#elif defined(HYBRIDOPS_ISA_AVX2)
HYBRIDOPS_INLINE Vec splat(float x) { return (Vec)_mm256_set1_ps(x); }
#else
HYBRIDOPS_INLINE Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
#endif

#if defined(HYBRIDOPS_ISA_AVX512) && !defined(HYBRIDOPS_EMULATE)

HYBRIDOPS_INLINE Vec load(const float* p) { return (Vec)_mm512_loadu_ps(p); }
HYBRIDOPS_INLINE void store(float* p, Vec x) { _mm512_storeu_ps(p, (__m512)x); }
HYBRIDOPS_INLINE __mmask16 lanes(int n) { return (__mmask16)((1u << n) - 1); }
HYBRIDOPS_INLINE Vec load(const float* p, int n) { return (Vec)_mm512_maskz_loadu_ps(lanes(n), p); }
HYBRIDOPS_INLINE void store(float* p, Vec x, int n) {
  _mm512_mask_storeu_ps(p, lanes(n), (__m512)x);
}
HYBRIDOPS_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
HYBRIDOPS_INLINE Vec load(const BFloat16* p) {
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
HYBRIDOPS_INLINE void store(BFloat16* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

#elif defined(HYBRIDOPS_ISA_AVX2)

HYBRIDOPS_INLINE Vec load(const float* p) { return (Vec)_mm256_loadu_ps(p); }
HYBRIDOPS_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, (__m256)x); }
HYBRIDOPS_INLINE __m256i lanes(int n) { return (__m256i)(VecInt{0, 1, 2, 3, 4, 5, 6, 7} < n); }
HYBRIDOPS_INLINE Vec load(const float* p, int n) { return (Vec)_mm256_maskload_ps(p, lanes(n)); }
HYBRIDOPS_INLINE void store(float* p, Vec x, int n) { _mm256_maskstore_ps(p, lanes(n), (__m256)x); }
HYBRIDOPS_INLINE Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
HYBRIDOPS_INLINE Vec load(const BFloat16* p) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
HYBRIDOPS_INLINE void store(BFloat16* p, Vec x) {
  // Round to nearest even; a NaN keeps its top bits and gets a quiet bit, so it cannot round to
  // infinity.
  const VecInt bits = (VecInt)x;
  const VecInt rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecInt chosen = (x != x) ? (bits | 0x400000) : rounded;
  const __m256i halves = _mm256_srli_epi32((__m256i)chosen, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}

#else  // 16 lanes as two AVX2 halves

HYBRIDOPS_INLINE Vec join(__m256 low, __m256 high) { return Halves{.half = {low, high}}.whole; }

HYBRIDOPS_INLINE Vec load(const float* p) {
  return join(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}
HYBRIDOPS_INLINE void store(float* p, Vec x) {
  const Halves h{x};
  _mm256_storeu_ps(p, h.half[0]);
  _mm256_storeu_ps(p + 8, h.half[1]);
}
HYBRIDOPS_INLINE Vec load(const float* p, int n) {
  float buffer[kLanes] = {};
  std::memcpy(buffer, p, sizeof(float) * n);
  return load(buffer);
}
HYBRIDOPS_INLINE void store(float* p, Vec x, int n) { std::memcpy(p, &x, sizeof(float) * n); }
HYBRIDOPS_INLINE Vec fma(Vec a, Vec b, Vec c) {
  const Halves x{a}, y{b}, z{c};
  return join(_mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]),
              _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]));
}
HYBRIDOPS_INLINE Vec load(const BFloat16* p) {
  VecInt bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = (int32_t)((uint32_t)p[i] << 16);
  return (Vec)bits;
}
HYBRIDOPS_INLINE void store(BFloat16* p, Vec x) {
  const VecInt bits = (VecInt)x;
  const VecInt rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecInt chosen = (x != x) ? (bits | 0x400000) : rounded;
  for (int i = 0; i < kLanes; ++i) p[i] = (BFloat16)((uint32_t)chosen[i] >> 16);
}

#endif

// bf16 products, where the ISA has them: a slot is two neighbouring numbers of K in 32 bits, and
// dot() adds both products of every slot to the fp32 sum in its lane.
constexpr bool kBf16Products = kLanes == 16;
#if defined(HYBRIDOPS_ISA_AVX512) && !defined(HYBRIDOPS_EMULATE)
HYBRIDOPS_INLINE Vec dot(VecInt a, VecInt b, Vec sum) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#elif defined(HYBRIDOPS_ISA_AVX512)
HYBRIDOPS_INLINE Vec dot(VecInt a, VecInt b, Vec sum) {
  const VecInt high = VecInt{} + (int32_t)0xffff0000;
  return fma((Vec)(a << 16), (Vec)(b << 16), fma((Vec)(a & high), (Vec)(b & high), sum));
}
#endif

// bf16 tails go through a small buffer: there are no 16-bit masked moves on AVX2.
HYBRIDOPS_INLINE Vec load(const BFloat16* p, int n) {
  BFloat16 buffer[kLanes] = {};
  std::memcpy(buffer, p, sizeof(BFloat16) * n);
  return load(buffer);
}
HYBRIDOPS_INLINE void store(BFloat16* p, Vec x, int n) {
  BFloat16 buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, sizeof(BFloat16) * n);
}

// A whole vector where `n` allows it, a masked one at the tail.
template <class T>
HYBRIDOPS_INLINE Vec load_some(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load(p, (int)n);
}
template <class T>
HYBRIDOPS_INLINE void store_some(T* p, Vec x, int64_t n) {
  if (n >= kLanes)
    store(p, x);
  else
    store(p, x, (int)n);
}

HYBRIDOPS_INLINE float to_float(float x) { return x; }
HYBRIDOPS_INLINE float to_float(uint8_t x) { return x; }
HYBRIDOPS_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

HYBRIDOPS_INLINE BFloat16 to_bfloat16(float x) {  // to nearest even; NaN stays a quiet NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (BFloat16)((x != x ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// a > b ? a : b and a < b ? a : b, so b where one is NaN. Written like that they are a comparison
// and a choice to gcc 12, not the one instruction.
#if defined(HYBRIDOPS_ISA_AVX512) && !defined(HYBRIDOPS_EMULATE)
HYBRIDOPS_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
HYBRIDOPS_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(HYBRIDOPS_ISA_AVX2)
HYBRIDOPS_INLINE Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
HYBRIDOPS_INLINE Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
HYBRIDOPS_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
HYBRIDOPS_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
#endif

// The first n lanes of x, `other` in the rest.
HYBRIDOPS_INLINE Vec keep(Vec x, int64_t n, float other) {
#if HYBRIDOPS_LANES == 16
  const VecInt lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
  const VecInt lane{0, 1, 2, 3, 4, 5, 6, 7};
#endif
  return lane < (int32_t)n ? x : splat(other);
}

// Sum and maximum over the lanes: halves folded onto each other.
HYBRIDOPS_INLINE float sum8(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
HYBRIDOPS_INLINE float largest8(__m256 x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
#if HYBRIDOPS_LANES == 16
HYBRIDOPS_INLINE float sum(Vec x) {
  const Halves h{x};
  return sum8(_mm256_add_ps(h.half[0], h.half[1]));
}
HYBRIDOPS_INLINE float largest(Vec x) {
  const Halves h{x};
  return largest8(_mm256_max_ps(h.half[0], h.half[1]));
}
#else
HYBRIDOPS_INLINE float sum(Vec x) { return sum8((__m256)x); }
HYBRIDOPS_INLINE float largest(Vec x) { return largest8((__m256)x); }
#endif

// 8 x 8 numbers: row i of `from` becomes column i of `to`.
HYBRIDOPS_INLINE void transpose8(const float* from, int64_t stride_from, float* to,
                                 int64_t stride_to) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * stride_from);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * stride_to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * stride_to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

// exp(x), about 1 ulp: x = n ln2 + r, degree-6 polynomial in r, n added to the exponent bits. 0
// below -87.3, infinity above 88.7, NaN stays NaN.
HYBRIDOPS_INLINE Vec exp(Vec x) {
  const float kMagic =
      12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then sits in the low bits
  const Vec shifted = fma(x, splat(1.44269504088896341f), splat(kMagic));
  const Vec n = shifted - kMagic;
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  Vec y = (Vec)((VecInt)p + ((VecInt)shifted << 23));
  y = x < -87.33654f ? Vec{} : y;
  return x > 88.37626f ? splat(__builtin_inff()) : y;
}

// 2^x for x <= 127: minimax fits of our own on [-0.5, 0.5], of degree 5, relative error 1.6e-7, and
// for results that become bf16 of degree 3, 1e-4. 0 below -127, NaN stays NaN. A third cheaper than
// exp, which has to split ln 2 and to saturate.
template <class E>
HYBRIDOPS_INLINE Vec exp2(Vec x) {
#if defined(HYBRIDOPS_ISA_AVX512) && !defined(HYBRIDOPS_EMULATE)
  x = max(splat(-150.0f), x);  // so that -inf has a fraction
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = max(splat(-127.0f), x);           // where an exponent of 0 and a fraction of 0 are 0 itself
  const Vec shifted = x + 12582912.0f;  // as in exp
  const Vec n = shifted - 12582912.0f;
#endif
  const Vec r = x - n;
  Vec p;
  if constexpr (sizeof(E) == sizeof(float)) {
    p = splat(1.32647265e-3f);
    p = fma(p, r, splat(9.67151283e-3f));
    p = fma(p, r, splat(5.550733747e-2f));
    p = fma(p, r, splat(2.402224208e-1f));
    p = fma(p, r, splat(6.931469776e-1f));
  } else {
    p = splat(5.517155004e-2f);
    p = fma(p, r, splat(2.426111445e-1f));
    p = fma(p, r, splat(6.932610102e-1f));
  }
  p = fma(p, r, splat(1.0f));
#if defined(HYBRIDOPS_ISA_AVX512) && !defined(HYBRIDOPS_EMULATE)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (Vec)((VecInt)p + ((VecInt)shifted << 23));
#endif
}

// 1 / x for normal x, relative error 1e-7: a table look-up and one step of Newton's method.
HYBRIDOPS_INLINE Vec reciprocal(Vec x) {
#if defined(HYBRIDOPS_ISA_AVX512) && !defined(HYBRIDOPS_EMULATE)
  const Vec y = (Vec)_mm512_rcp14_ps((__m512)x);
#elif defined(HYBRIDOPS_ISA_AVX2)
  const Vec y = (Vec)_mm256_rcp_ps((__m256)x);
#else
  const Halves h{x};
  const Vec y = join(_mm256_rcp_ps(h.half[0]), _mm256_rcp_ps(h.half[1]));
#endif
  return fma(y, fma(-x, y, splat(1.0f)), y);
}

}  // namespace HYBRIDOPS_SIMD
}  // namespace hybridops::simd
