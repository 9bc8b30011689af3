#include "cpu/cpu_facts.h"

#include <hwy/targets.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "cpu/common/simd.h"
#include "cpu/unfused/unfused.h"

namespace wh {
namespace {

// A field of the first core in /proc/cpuinfo; empty when there is none.
std::string cpuinfo_field(const char* name) {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with(name) && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "";
}

CpuFacts detect() {
  CpuFacts facts;
  facts.name = cpuinfo_field("model name");
  if (facts.name.empty()) facts.name = "unknown CPU";
  facts.family = cpuinfo_field("cpu family");
  facts.isa = cpu::simd_target_name();
  facts.simd_floats = cpu::simd_floats();
#if defined(__x86_64__)
  facts.has_avx512_bf16 = facts.simd_floats == 16 && __builtin_cpu_supports("avx512bf16");
#endif
  facts.cores = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
#if defined(_SC_LEVEL2_CACHE_SIZE)
  if (const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE); bytes > 0) facts.l2_bytes = bytes;
#endif
  // Two FMA pipes at about 3 GHz: within 25 % on the machines seen; a tuned profile replaces it.
  facts.gflops_per_core = facts.simd_floats * 2 * 2 * 3.0;
#if defined(__x86_64__)
  // Zen 4 and 5 issue VDPBF16PS like any FMA, with twice its flops; Sapphire Rapids issues one
  // every two cycles, a quarter of its FMAs (measured 219 GFLOP/s beside 440).
  if (facts.has_avx512_bf16) {
    facts.bf16_gflops_per_core = facts.gflops_per_core * (__builtin_cpu_is("amd") ? 2.0 : 0.5);
  }
#endif
  facts.read_gbytes_per_s = 15.0 * facts.cores;
  facts.has_cblas = cpu::unfused_has_cblas();
  facts.kernels_use = facts.isa + (facts.has_avx512_bf16 ? ", AVX512-BF16" : "");
  return facts;
}

}  // namespace

const CpuFacts& cpu_facts() {
  static const CpuFacts facts = detect();
  return facts;
}

}  // namespace wh
