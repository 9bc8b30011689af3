// Workspace of one call, where the caller brought none.
#pragma once

#include <utility>

#include "plan/backend.h"

namespace wh {

class Workspace {
 public:
  // Where memory is, and in the order of which stream it comes and goes.
  struct Place {
    Device device;
    DeviceStream stream;
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
