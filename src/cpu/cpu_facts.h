// What the planner knows of the CPU.
#pragma once

#include "plan/kernel.h"

namespace wh {

struct CpuFacts : DeviceFacts {
  std::string isa;          // the Highway target the kernels dispatch to: "AVX2", "AVX3", ...
  std::string family;       // x86: its number; a Zen 4 and a Zen 5 may have one name and isa
  int32_t simd_floats = 4;  // f32 lanes of that target
  bool has_avx512_bf16 = false;
  double gflops_per_core = 30;      // f32 multiply-adds counted twice
  double bf16_gflops_per_core = 0;  // of VDPBF16PS; 0 without AVX512-BF16
  bool has_cblas = false;

  CpuFacts() {
    cores = 1;
    l2_bytes = 1 << 20;
    read_gbytes_per_s = 15;
  }
  int32_t threads(int32_t wanted) const { return wanted > 0 ? wanted : cores; }
};

// This machine's; detected once, in src/cpu, which knows what its kernels are compiled for.
const CpuFacts& cpu_facts();

// What a CPU kernel is asked with.
inline const CpuFacts& cpu_facts(const Query& query) {
  return static_cast<const CpuFacts&>(query.facts);
}

}  // namespace wh
