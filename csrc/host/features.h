// What this CPU has, by cpuid.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

struct Features {
  bool sse42, avx, avx2, fma, f16c;
  bool avx512f, avx512bw, avx512dq, avx512vl, avx512vnni, avx512bf16, avx512fp16, avx_vnni;
  bool amx_tile, amx_int8, amx_bf16, amx_fp16;
  std::string brand;
};

Features detect();
pybind11::dict cpu_features();
pybind11::dict cache_bytes();
