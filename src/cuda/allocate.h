// Device memory for callers that bring none, and copies to it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/status.h"

namespace wh::cuda {

// In the order of the stream, from the device's memory pool; kOutOfMemory with the bytes wanted, or
// kDeviceError with the driver's words.
Result<void*> allocate(int32_t device_index, size_t bytes, void* stream);
void release(void* data, void* stream) noexcept;

// Either way between host and device; done when it returns.
Status copy(void* to, const void* from, size_t bytes, void* stream);

// Waits for the stream and answers with what went wrong on it.
Status synchronize(void* stream);

}  // namespace wh::cuda
