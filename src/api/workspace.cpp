#include "api/workspace.h"

#include <fmt/format.h>

#include <new>

#include "cuda/allocate.h"
#include "widehead/widehead.h"

namespace wh {

namespace {
constexpr std::align_val_t kAlignment{WH_WORKSPACE_ALIGNMENT};
}  // namespace

Result<Workspace> Workspace::allocate(Device device, int32_t device_index, size_t bytes,
                                      void* stream) {
  if (bytes == 0) return Workspace(device, stream, nullptr);
  if (device == Device::kCuda) {
    Result<void*> data = cuda::allocate(device_index, bytes, stream);
    if (!data.ok()) return data.status();
    return Workspace(device, stream, *data);
  }
  void* data = ::operator new(bytes, kAlignment, std::nothrow);
  if (data == nullptr) {
    return Status(Code::kOutOfMemory, fmt::format("no memory for {} bytes of workspace", bytes));
  }
  return Workspace(device, stream, data);
}

Workspace::~Workspace() {
  if (data_ == nullptr) return;
  if (device_ == Device::kCuda) {
    cuda::release(data_, stream_);
  } else {
    ::operator delete(data_, kAlignment);
  }
}

}  // namespace wh
