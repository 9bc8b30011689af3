// Workspace of one call, where the caller brought none.
#pragma once

#include <cstddef>
#include <utility>

#include "core/problem.h"
#include "core/status.h"

namespace wh {

class Workspace {
 public:
  // Where memory is: on the host, or on a device, in the order of `stream` there.
  struct Place {
    Device device;
    int32_t device_index;
    void* stream;
  };

  // Without bytes, null.
  static Result<Workspace> allocate(const Place& place, size_t bytes);
  Workspace(Workspace&& other) noexcept
      : place_(other.place_), data_(std::exchange(other.data_, nullptr)) {}
  Workspace& operator=(Workspace&&) = delete;
  ~Workspace();

  void* data() const { return data_; }

 private:
  Workspace(const Place& place, void* data) : place_(place), data_(data) {}

  Place place_;
  void* data_;
};

}  // namespace wh
