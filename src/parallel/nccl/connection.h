// The handle of an NCCL communicator.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "core/status.h"
#include "parallel/nccl/library.h"

namespace wh::sharded {

// What its rank's thread calls NCCL with, and what any thread may end: NCCL takes one call at a
// time for a communicator, and an aborted one none at all.
class NcclConnection {
 public:
  // Stays the caller's, unless abort() or destroy() is called.
  static Result<std::shared_ptr<NcclConnection>> make(const Nccl& nccl, ncclComm_t comm);
  // Of one process's ranks; after a failure none of them is left.
  static Result<std::vector<std::shared_ptr<NcclConnection>>> make_all(
      const Nccl& nccl, std::span<const ncclComm_t> comms);

  const Nccl& nccl() const { return nccl_; }
  int32_t rank() const { return rank_; }
  int32_t ranks() const { return ranks_; }
  int32_t device() const { return device_; }

  // What call(comm) answers with, `name` being NCCL's for it; an error once it was aborted.
  template <typename Call>
  Status use(const char* name, const Call& call) {
    const std::lock_guard lock(mutex_);
    if (comm_ == nullptr) return over();
    return status_of(call(comm_), name);
  }
  // Its messages under way end, on this rank's side, with whatever they have carried by then.
  void abort();
  // Ends it where no message is under way.
  void destroy();
  bool is_over() const { return is_over_.load(); }
  Status over() const;

 private:
  NcclConnection(const Nccl& nccl, ncclComm_t comm) : nccl_(nccl), comm_(comm) {}
  Status status_of(ncclResult_t result, const char* name) const;

  const Nccl& nccl_;
  std::mutex mutex_;
  ncclComm_t comm_;  // null once it is over
  std::atomic<bool> is_over_{false};
  int rank_ = 0, ranks_ = 1, device_ = 0;
};

}  // namespace wh::sharded
