// Attention over all keys from that over parts of them, of any types and strides.
#pragma once

#include "core/output_merge.h"
#include "core/status.h"
#include "plan/backend.h"

namespace wh::cuda {

// Checks that everything is memory of the device, then merges on the stream.
Status merge(const OutputMerge& merge, DeviceStream on);

}  // namespace wh::cuda
