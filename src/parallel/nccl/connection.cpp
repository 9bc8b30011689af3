#include "parallel/nccl/connection.h"

#include <fmt/format.h>

namespace wh::sharded {

Result<std::shared_ptr<NcclConnection>> NcclConnection::make(const Nccl& nccl, ncclComm_t comm) {
  std::shared_ptr<NcclConnection> made(new NcclConnection(nccl, comm));
  WH_RETURN_IF_ERROR(made->status_of(nccl.user_rank(comm, &made->rank_), "ncclCommUserRank"));
  WH_RETURN_IF_ERROR(made->status_of(nccl.count(comm, &made->ranks_), "ncclCommCount"));
  WH_RETURN_IF_ERROR(made->status_of(nccl.device(comm, &made->device_), "ncclCommCuDevice"));
  return made;
}

Result<std::vector<std::shared_ptr<NcclConnection>>> NcclConnection::make_all(
    const Nccl& nccl, std::span<const ncclComm_t> comms) {
  std::vector<std::shared_ptr<NcclConnection>> all;
  for (ncclComm_t comm : comms) {
    auto one = make(nccl, comm);
    if (!one.ok()) {
      for (ncclComm_t each : comms) nccl.abort(each);
      return one.status();
    }
    all.push_back(std::move(*one));
  }
  return all;
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
