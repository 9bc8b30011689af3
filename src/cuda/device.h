// The device a call is for, and whether its pointers belong there.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.h"
#include "core/status.h"

namespace wh::cuda {

// Makes `index` the calling thread's device while it lives, and restores the one before.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t index) noexcept;
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

  Status status() const;

 private:
  int32_t error_ = 0;  // a cudaError_t
  int32_t previous_ = -1;
};

// Whether every tensor that the problem uses lies on its device: host pointers and those of another
// device are errors that name the tensor. Works during capture.
Status check_pointers(const Problem& problem, const Tensors& tensors);

// The same of any pointers. Null ones are left alone.
struct NamedPointer {
  const char* name;
  const void* data;
};
Status check_pointers(std::span<const NamedPointer> pointers, int32_t device_index);

// Whether a run's stream is one of the problem's device. The default streams are those of whichever
// device is current, so they are.
Status check_stream(int32_t device_index, void* stream);

}  // namespace wh::cuda
