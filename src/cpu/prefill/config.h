// cpu_prefill, the planner's side, and the rules that both prefill kernels share.
// docs/cpu-prefill.md describes the kernels.
#pragma once

#include "cpu/prefill/layout.h"

namespace wh::cpu {

extern const Kernel kPrefill;

Config configure_prefill(const Query& query, Arithmetic arithmetic);
size_t prefill_workspace_bytes(const Problem& problem, const Config& config);
double prefill_estimate_us(const Query& query, const Config& config);
double prefill_step_us(const Query& query, const Config& config);

}  // namespace wh::cpu
