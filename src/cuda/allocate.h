// Device memory in the order of a stream, for calls that bring no workspace.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/status.h"

namespace wh::cuda {

// From the device's own memory pool; kOutOfMemory with the bytes wanted, or kDeviceError.
Result<void*> allocate(int32_t device_index, size_t bytes, void* stream);
void release(void* data, void* stream) noexcept;

}  // namespace wh::cuda
