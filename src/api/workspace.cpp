#include "api/workspace.h"

#include <fmt/format.h>

#include <new>

#include "cuda/allocate.h"
#include "widehead/widehead.h"

namespace wh {

namespace {
constexpr std::align_val_t kAlignment{WH_WORKSPACE_ALIGNMENT};
}  // namespace

Result<Workspace> Workspace::allocate(const Place& place, size_t bytes) {
  if (bytes == 0) return Workspace(place, nullptr);
  if (place.device == Device::kCuda) {
    Result<void*> data = cuda::allocate({place.device_index, place.stream}, bytes);
    if (!data.ok()) return data.status();
    return Workspace(place, *data);
  }
  void* data = ::operator new(bytes, kAlignment, std::nothrow);
  if (data == nullptr) {
    return Status(Code::kOutOfMemory, fmt::format("no memory for {} bytes of workspace", bytes));
  }
  return Workspace(place, data);
}

Workspace::~Workspace() {
  if (data_ == nullptr) return;
  if (place_.device == Device::kCuda) {
    cuda::release({place_.device_index, place_.stream}, data_);
  } else {
    ::operator delete(data_, kAlignment);
  }
}

}  // namespace wh
