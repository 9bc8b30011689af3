// Writing new keys and values into caches, between the C structs and the core.
#pragma once

#include "api/c_structs.h"
#include "core/status.h"
#include "widehead/widehead.h"

namespace wh {

// Checks everything, then writes where the caches are.
Status append(const Problem& cache, const wh_appended& appended, const RunOptions& options);

}  // namespace wh
