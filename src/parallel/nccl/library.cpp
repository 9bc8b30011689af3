#include "parallel/nccl/library.h"

#include <dlfcn.h>
#include <fmt/format.h>

namespace wh::sharded {
namespace {

constexpr const char* kSoname = "libnccl.so.2";

struct Loaded {
  Nccl functions{};
  Status status;
};

Loaded load() {
  Loaded loaded;
  void* library = dlopen(kSoname, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    loaded.status = {Code::kRefused,
                     fmt::format("NCCL cannot be loaded: {}; install it, or name its folder in "
                                 "LD_LIBRARY_PATH",
                                 dlerror())};
    return loaded;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr && loaded.status.ok()) {
      loaded.status = {Code::kRefused,
                       fmt::format("{} has no {}; 2.7 or later is needed", kSoname, name)};
    }
  };
  Nccl& f = loaded.functions;
  find(f.get_version, "ncclGetVersion");
  find(f.error_string, "ncclGetErrorString");
  find(f.last_error, "ncclGetLastError");
  find(f.init_all, "ncclCommInitAll");
  find(f.destroy, "ncclCommDestroy");
  find(f.abort, "ncclCommAbort");
  find(f.count, "ncclCommCount");
  find(f.user_rank, "ncclCommUserRank");
  find(f.device, "ncclCommCuDevice");
  find(f.async_error, "ncclCommGetAsyncError");
  find(f.group_start, "ncclGroupStart");
  find(f.group_end, "ncclGroupEnd");
  find(f.send, "ncclSend");
  find(f.receive, "ncclRecv");
  return loaded;
}

}  // namespace

Result<const Nccl*> nccl() {
  static const Loaded loaded = load();
  if (!loaded.status.ok()) return loaded.status;
  return &loaded.functions;
}

}  // namespace wh::sharded
