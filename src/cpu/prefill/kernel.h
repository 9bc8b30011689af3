// cpu_prefill, the running side.
#pragma once

#include <atomic>

#include "cpu/prefill/layout.h"

namespace wh::cpu {

// Works off items until the counter has none left.
using RunPrefillWorker = void (*)(const Problem&, const Tensors&, const PrefillWorkspace&,
                                  int32_t worker_idx, std::atomic<int64_t>& next,
                                  Progress& progress);

// All items on the launch's executor, then the merge where keys are split.
Status run_prefill_items(const Launch& launch, RunPrefillWorker run_worker);

Status run_prefill(const Launch& launch);

}  // namespace wh::cpu
