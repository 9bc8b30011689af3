// cpu_prefill, the running side.
#pragma once

#include "plan/kernel.h"

namespace wh::cpu {

size_t prefill_workspace_bytes(const Problem& problem, const Config& config);
Status run_prefill(const Launch& launch);

}  // namespace wh::cpu
