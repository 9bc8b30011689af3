// What each kernel is documented to take: the README's table and the pages in docs/, stated once
// more and without asking the kernel, so that one refusal too many shows, and one too few.
#pragma once

#include <string>

#include "core/problem.h"
#include "cpu/cpu_facts.h"
#include "cuda/cuda_facts.h"
#include "plan/limits.h"

namespace wh {

struct Documented {
  const Problem& problem;
  Precision precision;
  const DeviceFacts& facts;  // of the problem's device

  // Whether `kernel` must take the problem; else it must refuse. An unknown kernel takes nothing.
  bool takes(const std::string& kernel) const;

 private:
  bool is_for_tma() const;
  bool has_gradients_for_tma() const;
  const CpuFacts& cpu() const { return static_cast<const CpuFacts&>(facts); }
  const CudaFacts& cuda() const { return static_cast<const CudaFacts&>(facts); }
  bool is_one_type() const { return problem.dtype_q == problem.dtype_kv; }
  bool portable_reads_codes() const;
  bool sm90_reads_codes() const;
  bool is_sm90(int64_t most_dim_qk, int64_t most_dim_v) const;
};

}  // namespace wh
