#include "parallel/nccl/connection.h"

#include <fmt/format.h>

namespace wh::sharded {

Result<std::shared_ptr<NcclConnection>> NcclConnection::make(ncclComm_t comm) {
  const Result<const Nccl*> library = sharded::nccl();
  if (!library.ok()) return library.status();
  const Nccl& f = **library;
  std::shared_ptr<NcclConnection> made(new NcclConnection(f, comm));
  WH_RETURN_IF_ERROR(made->status_of(f.user_rank(comm, &made->rank_), "ncclCommUserRank"));
  WH_RETURN_IF_ERROR(made->status_of(f.count(comm, &made->ranks_), "ncclCommCount"));
  WH_RETURN_IF_ERROR(made->status_of(f.device(comm, &made->device_), "ncclCommCuDevice"));
  return made;
}

Status NcclConnection::status_of(ncclResult_t result, const char* name) const {
  // A communicator that does not block answers so while its own thread is at it.
  if (result == ncclSuccess || result == ncclInProgress) return {};
  return {Code::kDeviceError, fmt::format("{} on rank {}: {} ({})", name, rank_,
                                          nccl_.error_string(result), nccl_.last_error(comm_))};
}

Status NcclConnection::over() const {
  return {Code::kDeviceError,
          fmt::format("rank {} has no connection any more: it or another rank failed", rank_)};
}

void NcclConnection::abort() {
  is_over_ = true;  // before a message ends that somebody waits for
  const std::lock_guard lock(mutex_);
  if (comm_ != nullptr) nccl_.abort(comm_);
  comm_ = nullptr;
}

void NcclConnection::destroy() {
  const std::lock_guard lock(mutex_);
  if (comm_ != nullptr) nccl_.destroy(comm_);
  comm_ = nullptr;
  is_over_ = true;
}

}  // namespace wh::sharded
