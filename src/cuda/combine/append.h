// New keys and values into caches of any layout: wh_append() on a device.
#pragma once

#include "core/kv_append.h"
#include "core/status.h"
#include "plan/backend.h"

namespace wh::cuda {

// Checks that everything is memory of the device, then writes on the stream.
Status append(const KvAppend& append, DeviceStream on);

}  // namespace wh::cuda
