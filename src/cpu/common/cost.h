// What the estimates of the CPU kernels share.
#pragma once

#include "cpu/cpu_facts.h"

namespace wh::cpu {

// One cycle at the clock at which the core reaches its peak: two FMAs a cycle.
inline double cycle_us(const CpuFacts& cpu) {
  return static_cast<double>(cpu.simd_floats) * 4 / (cpu.gflops_per_core * 1e3);
}

// Reading K and V once. What fits the L2 caches is likely to lie there between two calls.
inline double read_us(const CpuFacts& cpu, double bytes) {
  if (bytes < static_cast<double>(cpu.l2_bytes * cpu.cores)) return 0;
  return bytes / (cpu.read_gbytes_per_s * 1e3);
}

}  // namespace wh::cpu
