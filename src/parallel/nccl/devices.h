// The CUDA devices of this host as ranks of one process, which has a thread for each.
#pragma once

#include <memory>
#include <vector>

#include "parallel/nccl/library.h"

namespace wh::sharded {

class NcclDevices {
 public:
  // Devices 0 to ranks - 1, or all of them.
  static Result<std::unique_ptr<NcclDevices>> make(int32_t ranks);
  ~NcclDevices();
  NcclDevices(const NcclDevices&) = delete;
  NcclDevices& operator=(const NcclDevices&) = delete;

  int32_t ranks() const { return static_cast<int32_t>(comms_.size()); }
  ncclComm_t comm(int32_t rank) const { return comms_[static_cast<size_t>(rank)]; }
  // Once its rank failed, before its memory goes: what waits for others keeps a device busy for
  // good.
  void abort(int32_t rank);

 private:
  explicit NcclDevices(const Nccl& nccl) : nccl_(nccl) {}

  const Nccl& nccl_;
  std::vector<ncclComm_t> comms_;  // null: aborted
};

}  // namespace wh::sharded
