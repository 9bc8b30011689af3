// Device memory for callers that bring none, and copies to it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/status.h"

namespace wh::cuda {

// A device's stream; null is its default stream, whichever device is current.
struct DeviceStream {
  int32_t device_index;
  void* stream;
};

// In the order of the stream, from a memory pool of this library's own; kOutOfMemory with the bytes
// wanted, or kDeviceError with the driver's words.
Result<void*> allocate(DeviceStream on, size_t bytes);
void release(DeviceStream on, void* data) noexcept;

// Either way between host and device; done when it returns.
Status copy(DeviceStream on, void* to, const void* from, size_t bytes);

// Waits for the stream and answers with what went wrong on it.
Status synchronize(DeviceStream on);

}  // namespace wh::cuda
