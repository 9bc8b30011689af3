// Calls captured in a graph and replayed.
#pragma once

#include "plan/backend.h"

namespace wh::cuda {

// Backend::capture().
Result<std::unique_ptr<Replay>> capture(int32_t device_index,
                                        const std::function<Status(void* stream)>& call);

}  // namespace wh::cuda
