// Merging partial results that the caller holds, between the C structs and the core.
#pragma once

#include <span>

#include "core/executor.h"
#include "core/status.h"
#include "widehead/widehead.h"

namespace wh {

// Checks everything, then merges on the host.
Status merge(const wh_merged& merged, std::span<const wh_partial> parts, const Executor& executor);

}  // namespace wh
