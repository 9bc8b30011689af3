#include "api/workspace.h"

namespace wh {

Result<Workspace> Workspace::allocate(const Place& place, size_t bytes) {
  if (bytes == 0) return Workspace(place, nullptr);
  const Result<void*> data = backend(place.device).allocate(place.stream, bytes);
  if (!data.ok()) return data.status();
  return Workspace(place, *data);
}

Workspace::~Workspace() {
  if (data_ != nullptr) backend(place_.device).release(place_.stream, data_);
}

}  // namespace wh
