// hybridops._host: what this CPU can do, and how fast it does it; the roof of every benchmark row.
// Never on the path of an op. One thread, because the caller decides how many to start.
#include <cpuid.h>
#include <immintrin.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

struct Features {
  bool sse42, avx, avx2, fma, f16c;
  bool avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512bf16, avx512fp16, avx_vnni;
  bool amx_tile, amx_int8, amx_bf16;
  std::string brand;
};

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
  return out;
}

constexpr int kChains = 12;  // latency 4-5 times 2 issues a cycle, and 16 registers hold them
constexpr int64_t kRounds = 20000;

// Independent chains x = x / 2 + 1 / 2, which end at 1: no denormals, no overflow. Named variables
// stay in registers where an array would not; the empty asm keeps the loop from being computed
// once.
__attribute__((target("avx2,fma"))) void fma_avx2() {
  const __m256 h = _mm256_set1_ps(0.5f);
  __m256 x0 = h, x1 = h, x2 = h, x3 = h, x4 = h, x5 = h, x6 = h, x7 = h, x8 = h, x9 = h, x10 = h,
         x11 = h;
  for (int64_t round = 0; round < kRounds; ++round) {
    x0 = _mm256_fmadd_ps(x0, h, h);
    x1 = _mm256_fmadd_ps(x1, h, h);
    x2 = _mm256_fmadd_ps(x2, h, h);
    x3 = _mm256_fmadd_ps(x3, h, h);
    x4 = _mm256_fmadd_ps(x4, h, h);
    x5 = _mm256_fmadd_ps(x5, h, h);
    x6 = _mm256_fmadd_ps(x6, h, h);
    x7 = _mm256_fmadd_ps(x7, h, h);
    x8 = _mm256_fmadd_ps(x8, h, h);
    x9 = _mm256_fmadd_ps(x9, h, h);
    x10 = _mm256_fmadd_ps(x10, h, h);
    x11 = _mm256_fmadd_ps(x11, h, h);
    __asm__ volatile(""
                     : "+x"(x0), "+x"(x1), "+x"(x2), "+x"(x3), "+x"(x4), "+x"(x5), "+x"(x6),
                       "+x"(x7), "+x"(x8), "+x"(x9), "+x"(x10), "+x"(x11));
  }
}

__attribute__((target("avx512f"))) void fma_avx512() {
  const __m512 h = _mm512_set1_ps(0.5f);
  __m512 x0 = h, x1 = h, x2 = h, x3 = h, x4 = h, x5 = h, x6 = h, x7 = h, x8 = h, x9 = h, x10 = h,
         x11 = h;
  for (int64_t round = 0; round < kRounds; ++round) {
    x0 = _mm512_fmadd_ps(x0, h, h);
    x1 = _mm512_fmadd_ps(x1, h, h);
    x2 = _mm512_fmadd_ps(x2, h, h);
    x3 = _mm512_fmadd_ps(x3, h, h);
    x4 = _mm512_fmadd_ps(x4, h, h);
    x5 = _mm512_fmadd_ps(x5, h, h);
    x6 = _mm512_fmadd_ps(x6, h, h);
    x7 = _mm512_fmadd_ps(x7, h, h);
    x8 = _mm512_fmadd_ps(x8, h, h);
    x9 = _mm512_fmadd_ps(x9, h, h);
    x10 = _mm512_fmadd_ps(x10, h, h);
    x11 = _mm512_fmadd_ps(x11, h, h);
    __asm__ volatile(""
                     : "+v"(x0), "+v"(x1), "+v"(x2), "+v"(x3), "+v"(x4), "+v"(x5), "+v"(x6),
                       "+v"(x7), "+v"(x8), "+v"(x9), "+v"(x10), "+v"(x11));
  }
}

__attribute__((target("avx2"))) uint64_t read_avx2(const char* data, int64_t bytes) {
  __m256i s[4] = {};
  for (int64_t i = 0; i < bytes; i += 128) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto* p = reinterpret_cast<const __m256i*>(data + i + 32 * j);
      s[j] = _mm256_xor_si256(s[j], _mm256_load_si256(p));
    }
  }
  s[0] = _mm256_xor_si256(_mm256_xor_si256(s[0], s[1]), _mm256_xor_si256(s[2], s[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(s[0], 0));
}

uint64_t read_plain(const char* data, int64_t bytes) {
  __m128i s[4] = {};  // SSE2 is part of x86-64
  for (int64_t i = 0; i < bytes; i += 64) {
    for (int j = 0; j < 4; ++j) {
      const auto* p = reinterpret_cast<const __m128i*>(data + i + 16 * j);
      s[j] = _mm_xor_si128(s[j], _mm_load_si128(p));
    }
  }
  s[0] = _mm_xor_si128(_mm_xor_si128(s[0], s[1]), _mm_xor_si128(s[2], s[3]));
  return static_cast<uint64_t>(_mm_cvtsi128_si64(s[0]));
}

volatile uint64_t sink;  // what is measured must not be optimised away

// Best rate of `body`, in units a second, over about `seconds`: the roof is what the machine can
// do.
template <typename Body>
double best_rate(double units, double seconds, Body body) {
  using clock = std::chrono::steady_clock;
  const auto since = [](clock::time_point t) {
    return std::chrono::duration<double>(clock::now() - t).count();
  };
  body();  // warm caches and clocks
  double best = 0;
  const auto start = clock::now();
  do {
    const auto begin = clock::now();
    body();
    best = std::max(best, units / std::max(since(begin), 1e-9));
  } while (since(start) < seconds);
  return best;
}

void check_seconds(double seconds) {
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be in (0, 60]");
}

double peak_flops(const std::string& isa, double seconds) {
  check_seconds(seconds);
  const Features f = detect();
  const bool wide = isa == "avx512";
  if (!wide && isa != "avx2") throw std::invalid_argument("isa must be 'avx2' or 'avx512'");
  if (wide ? !f.avx512f : !(f.avx2 && f.fma))
    throw std::runtime_error("this CPU has no " + isa + ": " + f.brand);
  const double flops = 2.0 * kChains * (wide ? 16 : 8) * static_cast<double>(kRounds);
  return best_rate(flops, seconds, wide ? fma_avx512 : fma_avx2) / 1e9;
}

double bandwidth(int64_t bytes, double seconds) {
  check_seconds(seconds);
  if (bytes < 128 || bytes > (int64_t{1} << 36))
    throw std::invalid_argument("bytes must be between 128 and 2**36");
  bytes = bytes / 128 * 128;
  std::unique_ptr<char, decltype(&std::free)> data(
      static_cast<char*>(std::aligned_alloc(128, static_cast<size_t>(bytes))), &std::free);
  if (!data) throw std::bad_alloc();
  std::memset(data.get(), 1, static_cast<size_t>(bytes));  // else all pages are one zero page
  const bool wide = detect().avx2;
  const int64_t repeats = std::max<int64_t>(1, (int64_t{1} << 22) / bytes);
  const char* p = data.get();
  return best_rate(static_cast<double>(bytes) * static_cast<double>(repeats), seconds,
                   [=] {
                     for (int64_t i = 0; i < repeats; ++i) {
                       sink = wide ? read_avx2(p, bytes) : read_plain(p, bytes);
                       __asm__ volatile("" ::: "memory");
                     }
                   }) /
         1e9;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "What this CPU has (cpuid) and measures (one thread).";
  m.def("cpu_features", &cpu_features, "The brand string, and instruction sets usable here.");
  m.def("peak_flops", &peak_flops, py::arg("isa"), py::arg("seconds") = 0.2,
        py::call_guard<py::gil_scoped_release>(),
        "Measured fp32 FMA rate of one thread in GFLOP/s, for 'avx2' or 'avx512'.");
  m.def("bandwidth", &bandwidth, py::arg("bytes"), py::arg("seconds") = 0.2,
        py::call_guard<py::gil_scoped_release>(),
        "Read bandwidth of one thread in GB/s over a buffer of that size.");
}
