#include "cpu/prefill_bf16/config.h"

#include <fmt/format.h>

#include "core/names.h"
#include "cpu/cpu_facts.h"
#include "cpu/prefill/config.h"
#include "cpu/prefill_bf16/kernel.h"

namespace wh::cpu {
namespace {

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (p.dtype_q != Dtype::kBf16 || p.dtype_kv != Dtype::kBf16) {
    return fmt::format("takes bf16 queries, keys and values; these are {} over {}",
                       kDtypes.name(p.dtype_q), kDtypes.name(p.dtype_kv));
  }
  if (!cpu_facts(query).has_avx512_bf16) return cpu_facts(query).name + " has no AVX512-BF16";
  return std::nullopt;
}

Config configure(const Query& query) {
  const bool is_high = query.limits.precision == Precision::kHigh;
  return configure_prefill(query, is_high ? Arithmetic::kBf16High : Arithmetic::kBf16);
}

std::string variant(const Query&, const Config& config) {
  return config.arithmetic == Arithmetic::kBf16High ? "AVX512-BF16 high" : "AVX512-BF16 native";
}

}  // namespace

const Kernel kPrefillBf16{.name = "cpu_prefill_bf16",
                          .role = Role::kFused,
                          .summary = "cpu_prefill with both products on AVX512-BF16",
                          .takes_all_layouts = true,
                          .refusal = refusal,
                          .configure = configure,
                          .variant = variant,
                          .workspace_bytes = prefill_workspace_bytes,
                          .estimate_us = prefill_estimate_us,
                          .run = run_prefill_bf16,
                          .step_us = prefill_step_us};

}  // namespace wh::cpu
