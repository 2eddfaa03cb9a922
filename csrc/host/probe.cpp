// hybridops._host: how fast this CPU is, the roof of every benchmark row, beside what it is
// (features.cpp) and what a model's calls ask (watch.cpp). Nothing here is on the path of an op.
// The threads are its own, so that no pool's habits are measured.
#include <immintrin.h>
#include <pybind11/pybind11.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "features.h"
#include "watch.h"

namespace py = pybind11;

namespace {

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

// Chains of x + 1 * 0.5 - 1 * 0.5, two products an instruction: bf16 1, 0.5 and -0.5 by their bits.
constexpr int kChainsBf16 = 16;  // latency 5-8 times 1-2 issues a cycle
constexpr int32_t kOneOne = 0x3f803f80, kHalfMinusHalf = static_cast<int32_t>(0xbf003f00u);

__attribute__((target("avx512f,avx512bw,avx512bf16"))) void dot_avx512() {
  const __m512bh a = (__m512bh)_mm512_set1_epi32(kOneOne);
  const __m512bh b = (__m512bh)_mm512_set1_epi32(kHalfMinusHalf);
  const __m512 h = _mm512_set1_ps(0.5f);
  __m512 x0 = h, x1 = h, x2 = h, x3 = h, x4 = h, x5 = h, x6 = h, x7 = h, x8 = h, x9 = h, x10 = h,
         x11 = h, x12 = h, x13 = h, x14 = h, x15 = h;
  for (int64_t round = 0; round < kRounds; ++round) {
    x0 = _mm512_dpbf16_ps(x0, a, b);
    x1 = _mm512_dpbf16_ps(x1, a, b);
    x2 = _mm512_dpbf16_ps(x2, a, b);
    x3 = _mm512_dpbf16_ps(x3, a, b);
    x4 = _mm512_dpbf16_ps(x4, a, b);
    x5 = _mm512_dpbf16_ps(x5, a, b);
    x6 = _mm512_dpbf16_ps(x6, a, b);
    x7 = _mm512_dpbf16_ps(x7, a, b);
    x8 = _mm512_dpbf16_ps(x8, a, b);
    x9 = _mm512_dpbf16_ps(x9, a, b);
    x10 = _mm512_dpbf16_ps(x10, a, b);
    x11 = _mm512_dpbf16_ps(x11, a, b);
    x12 = _mm512_dpbf16_ps(x12, a, b);
    x13 = _mm512_dpbf16_ps(x13, a, b);
    x14 = _mm512_dpbf16_ps(x14, a, b);
    x15 = _mm512_dpbf16_ps(x15, a, b);
    // Two, because an asm takes 30 operands and a "+v" is two.
    __asm__ volatile(""
                     : "+v"(x0), "+v"(x1), "+v"(x2), "+v"(x3), "+v"(x4), "+v"(x5), "+v"(x6),
                       "+v"(x7));
    __asm__ volatile(""
                     : "+v"(x8), "+v"(x9), "+v"(x10), "+v"(x11), "+v"(x12), "+v"(x13), "+v"(x14),
                       "+v"(x15));
  }
}

constexpr int kChainsAmx = 6;  // latency 52 over one issue in 16 cycles asks for four
constexpr int64_t kRoundsAmx = 2000;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64, "what ldtilecfg reads");

__attribute__((target("amx-tile,amx-bf16"))) void dot_amx() {
  static const TileConfig config;
  alignas(64) int32_t a[16][16], b[16][16];
  std::fill_n(&a[0][0], 256, kOneOne);
  std::fill_n(&b[0][0], 256, kHalfMinusHalf);
  // gcc's intrinsics do not say that they read memory, so the stores above could go.
  __asm__ volatile("" : : "r"(&config), "r"(a), "r"(b) : "memory");
  _tile_loadconfig(&config);
  _tile_loadd(6, a, 64);
  _tile_loadd(7, b, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t round = 0; round < kRoundsAmx; ++round) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
    _tile_dpbf16ps(4, 6, 7);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_release();
}

// Linux lends the tile registers on request: to the process, and so to the threads it starts.
void ask_for_tiles() {
  constexpr long kReqXcompPerm = 0x1023, kXtiledata = 18;  // from asm/prctl.h of Linux 5.16
  if (syscall(SYS_arch_prctl, kReqXcompPerm, kXtiledata) != 0)
    throw std::runtime_error(std::string("the system lends no AMX tiles: ") + std::strerror(errno));
}

// The memory loops run over `bytes` (a multiple of kStep) of each of the streams p, p + apart, ...
// Reading is four streams, because one or two leave 15 % of DRAM's rate to the prefetchers' whims.
constexpr int kStep = 128;

__attribute__((target("avx512f"))) void read_avx512(char* p, int64_t apart, int64_t bytes) {
  __m512i s[8] = {};
  for (int64_t i = 0; i < bytes; i += kStep) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      s[j] = _mm512_xor_si512(s[j], _mm512_load_si512(p + j / 2 * apart + i + j % 2 * 64));
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) __asm__ volatile("" : : "v"(s[j]));
}

__attribute__((target("avx2"))) void read_avx2(char* p, int64_t apart, int64_t bytes) {
  __m256i s[8] = {};
  for (int64_t i = 0; i < bytes; i += kStep) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      const auto* q = reinterpret_cast<const __m256i*>(p + j / 4 * apart + i + j % 4 * 32);
      s[j % 8] = _mm256_xor_si256(s[j % 8], _mm256_load_si256(q));
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) __asm__ volatile("" : : "x"(s[j]));
}

void read_plain(char* p, int64_t apart, int64_t bytes) {
  __m128i s[8] = {};  // SSE2 is part of x86-64
  for (int64_t i = 0; i < bytes; i += kStep) {
#pragma GCC unroll 32
    for (int j = 0; j < 32; ++j) {
      const auto* q = reinterpret_cast<const __m128i*>(p + j / 8 * apart + i + j % 8 * 16);
      s[j % 8] = _mm_xor_si128(s[j % 8], _mm_load_si128(q));
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) __asm__ volatile("" : : "x"(s[j]));
}

// First stream = second ^ third; two loads and a store are what most cores issue in a cycle.
template <bool kPastCaches>
__attribute__((target("avx512f"))) void triad_avx512(char* p, int64_t apart, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kStep) {
#pragma GCC unroll 2
    for (int64_t j = i; j < i + kStep; j += 64) {
      const __m512i v =
          _mm512_xor_si512(_mm512_load_si512(p + apart + j), _mm512_load_si512(p + 2 * apart + j));
      if constexpr (kPastCaches)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p + j), v);
      else
        _mm512_store_si512(p + j, v);
    }
  }
  if constexpr (kPastCaches) _mm_sfence();
}

template <bool kPastCaches>
__attribute__((target("avx2"))) void triad_avx2(char* p, int64_t apart, int64_t bytes) {
  const auto at = [](char* q) { return reinterpret_cast<__m256i*>(q); };
  for (int64_t i = 0; i < bytes; i += kStep) {
#pragma GCC unroll 4
    for (int64_t j = i; j < i + kStep; j += 32) {
      const __m256i v = _mm256_xor_si256(_mm256_load_si256(at(p + apart + j)),
                                         _mm256_load_si256(at(p + 2 * apart + j)));
      if constexpr (kPastCaches)
        _mm256_stream_si256(at(p + j), v);
      else
        _mm256_store_si256(at(p + j), v);
    }
  }
  if constexpr (kPastCaches) _mm_sfence();
}

// The rate of all threads together, in units a second; a call of body(thread) does `units`. The
// best of windows of about 1 ms, because what else the machine does only ever slows one, and a
// scheduler's turn is longer: between turns all threads run even beside other work. A window is the
// same stretch of time for all threads: two that take turns on one core must not each look whole.
// Calls are to be short beside a window; one that spans two is shared out by time.
template <typename Prepare, typename Body>
double best_rate(int threads, double seconds, double units, const Prepare& prepare,
                 const Body& body) {
  using clock = std::chrono::steady_clock;
  const int windows = std::clamp(static_cast<int>(seconds / 0.001), 1, 1000);
  const double width = seconds / windows;
  std::vector<std::vector<double>> calls(threads, std::vector<double>(windows));
  clock::time_point start;
  std::atomic<bool> abandoned{false};
  std::barrier ready(threads, [&]() noexcept { start = clock::now(); });
  const auto work = [&](int thread) noexcept {
    const auto now = [&] {  // in windows since the start
      return std::chrono::duration<double>(clock::now() - start).count() / width;
    };
    prepare(thread);
    body(thread);  // warms caches and clocks
    ready.arrive_and_wait();
    for (double from = now(); from < windows && !abandoned;) {
      body(thread);
      const double to = std::max(now(), from + 1e-9 / width);
      for (int w = static_cast<int>(from); w < std::min<double>(to, windows); ++w)
        calls[thread][w] += (std::min(to, w + 1.0) - std::max<double>(from, w)) / (to - from);
      from = to;
    }
  };
  std::vector<std::thread> team;
  const auto join = [&] {
    for (auto& member : team) member.join();
  };
  try {
    team.reserve(threads);
    for (int thread = 0; thread < threads; ++thread) team.emplace_back(work, thread);
  } catch (...) {  // the system has no more threads: let go those that wait for them
    abandoned = true;
    for (auto missing = team.size(); missing < static_cast<size_t>(threads); ++missing)
      ready.arrive_and_drop();
    join();
    throw;
  }
  join();
  double best = 0;
  for (int w = 0; w < windows; ++w) {
    double sum = 0;
    for (const auto& own : calls) sum += own[w];
    best = std::max(best, sum);
  }
  return best * units / width;
}

void check(double seconds, int threads) {
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be in (0, 60]");
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads must be in [1, 1024]");
}

double peak_flops(const std::string& isa, double seconds, int threads, const std::string& dtype) {
  check(seconds, threads);
  if (isa != "avx2" && isa != "avx512" && isa != "amx")
    throw std::invalid_argument("isa must be 'avx2', 'avx512' or 'amx', got '" + isa + "'");
  if (dtype != "fp32" && dtype != "bf16")
    throw std::invalid_argument("dtype must be 'fp32' or 'bf16', got '" + dtype + "'");
  const Features f = detect();
  const struct {
    const char *isa, *dtype;
    bool here;
    void (*run)();
    double flop;
  } loops[] = {
      {"avx2", "fp32", f.avx2 && f.fma, fma_avx2, 2.0 * 8 * kChains * kRounds},
      {"avx512", "fp32", f.avx512f, fma_avx512, 2.0 * 16 * kChains * kRounds},
      {"avx512", "bf16", f.avx512bf16, dot_avx512, 2.0 * 32 * kChainsBf16 * kRounds},
      {"amx", "bf16", f.amx_tile && f.amx_bf16, dot_amx,
       2.0 * 16 * 16 * 32 * kChainsAmx * kRoundsAmx},
  };
  for (const auto& loop : loops) {
    if (isa != loop.isa || dtype != loop.dtype) continue;
    if (!loop.here)
      throw std::runtime_error("this CPU has no " + isa + " for " + dtype + ": " + f.brand);
    if (isa == "amx") ask_for_tiles();
    const auto nothing = [](int) {};
    return best_rate(threads, seconds, loop.flop, nothing, [&](int) { loop.run(); }) / 1e9;
  }
  throw std::invalid_argument("no products of " + dtype + " in " + isa);
}

double bandwidth(int64_t bytes, double seconds, int threads, const std::string& kind) {
  check(seconds, threads);
  if (kind != "read" && kind != "triad" && kind != "stream")
    throw std::invalid_argument("kind must be 'read', 'triad' or 'stream', got '" + kind + "'");
  constexpr int64_t kMost = int64_t{1} << 36;
  if (bytes < 4 * kStep || bytes > kMost / threads)
    throw std::invalid_argument("bytes must be at least 512, and 2**36 over all threads at most");
  const Features f = detect();
  const bool read = kind == "read";
  if (!read && !f.avx2) throw std::runtime_error("this CPU has no avx2: " + f.brand);
  void (*run)(char*, int64_t, int64_t);
  if (read)
    run = f.avx512f ? read_avx512 : f.avx2 ? read_avx2 : read_plain;
  else if (kind == "triad")
    run = f.avx512f ? triad_avx512<false> : triad_avx2<false>;
  else
    run = f.avx512f ? triad_avx512<true> : triad_avx2<true>;

  constexpr int64_t kHugePage = int64_t{1} << 21;
  const bool huge = bytes >= 2 * kHugePage;
  const size_t align = huge ? kHugePage : 4096, room = (bytes + align - 1) / align * align;
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::vector<std::unique_ptr<char, Free>> data(threads);
  for (auto& own : data) {
    own.reset(static_cast<char*>(std::aligned_alloc(align, room)));
    if (!own) throw std::bad_alloc();
    if (huge) madvise(own.get(), room, MADV_HUGEPAGE);  // fewer TLB misses: a roof has none
  }
  const int streams = read ? 4 : 3;
  const int64_t apart = bytes / streams / kStep * kStep;
  const int64_t piece = std::min<int64_t>(apart, 1 << 18);  // a call takes at most 0.1 ms or so
  const int64_t repeats = std::max<int64_t>(1, (1 << 20) / piece / (piece == apart ? 1 : 4));
  std::vector<int64_t> at(threads * 8);  // 8: a cache line for each
  const auto touch = [&](int thread) { std::memset(data[thread].get(), 1, room); };
  const auto body = [&](int thread) {
    char* const p = data[thread].get();
    const int64_t i = at[thread * 8];
    for (int64_t r = 0; r < repeats; ++r) {
      run(p + i, apart, piece);
      __asm__ volatile("" ::: "memory");
    }
    at[thread * 8] = i + 2 * piece <= apart ? i + piece : 0;
  };
  const auto units = static_cast<double>(repeats * piece * streams);
  return best_rate(threads, seconds, units, touch, body) / 1e9;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() =
      "What this CPU has (cpuid), and how fast it is with some number of threads.\n\n"
      "Rates are sums over threads of this module's own, pinned to nothing, in the best of common\n"
      "windows of about 1 ms. Bad arguments raise ValueError, what the CPU lacks RuntimeError.";
  m.def("cpu_features", &cpu_features, "The brand string, and instruction sets usable here.");
  m.def(
      "cache_bytes", &cache_bytes,
      "Data cache sizes by cpuid: {'L1', 'L2', 'L3'}, fewer where there are fewer. L1 and L2 are\n"
      "one core's, L3 is the whole of the one that this core uses.");
  m.def(
      "peak_flops", &peak_flops, py::arg("isa"), py::arg("seconds") = 0.2, py::arg("threads") = 1,
      py::arg("dtype") = "fp32", py::call_guard<py::gil_scoped_release>(),
      "Measured rate of multiply-adds in GFLOP/s: isa 'avx2' or 'avx512' with dtype 'fp32' (fma),\n"
      "'avx512' or 'amx' with 'bf16' (products of bf16 summed up in fp32).");
  m.def("bandwidth", &bandwidth, py::arg("bytes"), py::arg("seconds") = 0.2, py::arg("threads") = 1,
        py::arg("kind") = "read", py::call_guard<py::gil_scoped_release>(),
        "GB/s between the cores and a buffer of `bytes` for each thread.\n\n"
        "kind 'read': loads alone. 'triad': a third is written from two that are read. 'stream': "
        "the\n"
        "same with stores past the caches, for DRAM. Bytes are those that the loop loads and "
        "stores;\n"
        "a line fetched because it is written, or written back later, does not count.");
  register_watch(m);
}
