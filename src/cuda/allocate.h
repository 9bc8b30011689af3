// Device memory for callers that bring none, and copies to it.
#pragma once

#include "plan/backend.h"

namespace wh::cuda {

// The memory and streams of Backend. Allocates from a memory pool of this library's own.
Result<void*> allocate(DeviceStream on, size_t bytes);
void release(DeviceStream on, void* data) noexcept;

Status copy(DeviceStream on, void* to, const void* from, size_t bytes);
Status copy(DeviceStream on, const TensorCopy& copy);
Status write(DeviceStream on, void* to, std::span<const int32_t> numbers);
Status synchronize(DeviceStream on);

}  // namespace wh::cuda
