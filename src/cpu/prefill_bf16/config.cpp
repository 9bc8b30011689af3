#include "cpu/prefill_bf16/config.h"

#include <fmt/format.h>

#include "core/names.h"
#include "cpu/prefill/config.h"
#include "cpu/prefill_bf16/kernel.h"

namespace wh::cpu {
namespace {

constexpr const char* kNativeVariant = "AVX512-BF16 native";
constexpr const char* kHighVariant = "AVX512-BF16 high";

std::optional<std::string> refusal(const Query& query) {
  const Problem& p = query.problem;
  if (p.dtype_q != Dtype::kBf16 || p.dtype_kv != Dtype::kBf16) {
    return fmt::format("takes bf16 queries, keys and values; these are {} over {}",
                       kDtypes.name(p.dtype_q), kDtypes.name(p.dtype_kv));
  }
  if (!query.cpu.has_avx512_bf16) return query.cpu.name + " has no AVX512-BF16";
  return std::nullopt;
}

Config configure(const Query& query) {
  const bool is_high = query.limits.precision == Precision::kHigh;
  return configure_prefill(query, is_high ? PrefillArithmetic::kBf16High : PrefillArithmetic::kBf16,
                           is_high ? kHighVariant : kNativeVariant);
}

size_t workspace_bytes(const Problem& p, const Config& config) {
  return PrefillWorkspace(p, config, bf16_arithmetic(config), nullptr).bytes(config.threads);
}

double estimate_us(const Query& query, const Config& config) {
  return prefill_estimate_us(query, config, bf16_arithmetic(config));
}

double step_us(const Query& query, const Config& config) {
  return prefill_step_us(query, config, bf16_arithmetic(config));
}

}  // namespace

PrefillArithmetic bf16_arithmetic(const Config& config) {
  return config.variant == kHighVariant ? PrefillArithmetic::kBf16High : PrefillArithmetic::kBf16;
}

const Kernel kPrefillBf16{"cpu_prefill_bf16",
                          Device::kCpu,
                          true,
                          "cpu_prefill with both products on AVX512-BF16",
                          refusal,
                          configure,
                          workspace_bytes,
                          estimate_us,
                          run_prefill_bf16,
                          step_us};

}  // namespace wh::cpu
