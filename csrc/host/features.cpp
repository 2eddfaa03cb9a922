#include "features.h"

#include <cpuid.h>

#include <cstdint>
#include <cstring>

namespace py = pybind11;

namespace {

bool bit(uint32_t word, int index) { return (word >> index) & 1; }

std::string brand_string() {
  uint32_t words[12] = {};
  if (__get_cpuid_max(0x80000000, nullptr) < 0x80000004) return "";
  for (uint32_t i = 0; i < 3; ++i) {
    uint32_t* w = words + 4 * i;
    __get_cpuid(0x80000002 + i, w, w + 1, w + 2, w + 3);
  }
  std::string text(reinterpret_cast<const char*>(words), sizeof(words));
  text.resize(std::strlen(text.c_str()));
  const auto first = text.find_first_not_of(' '), last = text.find_last_not_of(' ');
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

}  // namespace

// A bit of cpuid says what the core has; XCR0 says which registers the system saves.
Features detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0, b7 = 0, c7 = 0, d7 = 0, a71 = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  uint32_t leaves = 0, unused = 0;
  if (__get_cpuid_count(7, 0, &leaves, &b7, &c7, &d7) && leaves >= 1) {
    uint32_t x, y, z;
    __get_cpuid_count(7, 1, &a71, &x, &y, &z);
  }
  uint32_t xcr0 = 0;
  if (bit(c, 27)) __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(unused) : "c"(0));
  const bool ymm = (xcr0 & 0x6) == 0x6;
  const bool zmm = ymm && (xcr0 & 0xe0) == 0xe0;
  const bool tiles = (xcr0 & 0x60000) == 0x60000;
  Features f{};
  f.sse42 = bit(c, 20);
  f.avx = ymm && bit(c, 28);
  f.avx2 = ymm && bit(b7, 5);
  f.fma = ymm && bit(c, 12);
  f.f16c = ymm && bit(c, 29);
  f.avx512f = zmm && bit(b7, 16);
  f.avx512dq = zmm && bit(b7, 17);
  f.avx512bw = zmm && bit(b7, 30);
  f.avx512vl = zmm && bit(b7, 31);
  f.avx512vnni = zmm && bit(c7, 11);
  f.avx512fp16 = zmm && bit(d7, 23);
  f.avx512bf16 = zmm && bit(a71, 5);
  f.avx_vnni = ymm && bit(a71, 4);
  f.amx_tile = tiles && bit(d7, 24);
  f.amx_int8 = tiles && bit(d7, 25);
  f.amx_bf16 = tiles && bit(d7, 22);
  f.amx_fp16 = tiles && bit(a71, 21);
  f.brand = brand_string();
  return f;
}

py::dict cpu_features() {
  const Features f = detect();
  py::dict out;
  out["brand"] = f.brand;
  out["sse42"] = f.sse42;
  out["avx"] = f.avx;
  out["avx2"] = f.avx2;
  out["fma"] = f.fma;
  out["f16c"] = f.f16c;
  out["avx512f"] = f.avx512f;
  out["avx512bw"] = f.avx512bw;
  out["avx512dq"] = f.avx512dq;
  out["avx512vl"] = f.avx512vl;
  out["avx512vnni"] = f.avx512vnni;
  out["avx512bf16"] = f.avx512bf16;
  out["avx512fp16"] = f.avx512fp16;
  out["avx_vnni"] = f.avx_vnni;
  out["amx_tile"] = f.amx_tile;
  out["amx_int8"] = f.amx_int8;
  out["amx_bf16"] = f.amx_bf16;
  out["amx_fp16"] = f.amx_fp16;
  return out;
}

// Of the core that happens to run this. Intel describes its caches in leaf 4, AMD in 0x8000001D
// with the same layout; each leaves the other's empty.
py::dict cache_bytes() {
  py::dict out;
  for (const uint32_t leaf : {0x4u, 0x8000001Du}) {
    for (uint32_t i = 0; i < 16; ++i) {
      uint32_t a = 0, b = 0, c = 0, d = 0;
      if (!__get_cpuid_count(leaf, i, &a, &b, &c, &d) || (a & 31) == 0) break;
      const uint32_t type = a & 31, level = (a >> 5) & 7;
      if (type == 2 || level < 1 || level > 3) continue;  // 2: instructions
      const uint64_t ways = (b >> 22) + 1, parts = ((b >> 12) & 1023) + 1, line = (b & 4095) + 1;
      const char name[] = {'L', static_cast<char>('0' + level), 0};
      out[name] = ways * parts * line * (uint64_t{c} + 1);
    }
    if (out.size()) break;
  }
  return out;
}
