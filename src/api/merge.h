// Merging partial results that the caller holds, between the C structs and the core.
#pragma once

#include <span>

#include "api/c_structs.h"
#include "core/status.h"
#include "widehead/widehead.h"

namespace wh {

// Checks everything, then merges where the tensors are.
Status merge(const wh_merged& merged, std::span<const wh_partial> parts, const RunOptions& options);

}  // namespace wh
