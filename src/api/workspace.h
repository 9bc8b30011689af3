// Workspace of one call, where the caller brought none.
#pragma once

#include <cstddef>
#include <utility>

#include "core/problem.h"
#include "core/status.h"

namespace wh {

class Workspace {
 public:
  // Host memory, or memory of the device in the order of `stream`. Without bytes, null.
  static Result<Workspace> allocate(Device device, int32_t device_index, size_t bytes,
                                    void* stream);
  Workspace(Workspace&& other) noexcept
      : device_(other.device_),
        stream_(other.stream_),
        data_(std::exchange(other.data_, nullptr)) {}
  Workspace& operator=(Workspace&&) = delete;
  ~Workspace();

  void* data() const { return data_; }

 private:
  Workspace(Device device, void* stream, void* data)
      : device_(device), stream_(stream), data_(data) {}

  Device device_;
  void* stream_;
  void* data_;
};

}  // namespace wh
