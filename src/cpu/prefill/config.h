// cpu_prefill, the planner's side, and the rules that both prefill kernels share.
// docs/cpu-prefill.md describes the kernels.
#pragma once

#include <string>

#include "cpu/prefill/layout.h"

namespace wh::cpu {

extern const Kernel kPrefill;

Config configure_prefill(const Query& query, PrefillArithmetic arithmetic, std::string variant);
double prefill_estimate_us(const Query& query, const Config& config, PrefillArithmetic arithmetic);
double prefill_step_us(const Query& query, const Config& config, PrefillArithmetic arithmetic);

}  // namespace wh::cpu
