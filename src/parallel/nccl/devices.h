// The CUDA devices of this host as ranks of one process, which has a thread for each.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/nccl/library.h"
#include "parallel/threads/group.h"

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
  // Of a rank's thread, for what it computes on `stream`. Device memory goes by NCCL; the host's is
  // copied, as the ranks share it: a thread may then free device memory while others wait for it,
  // which waits for the kernels of every device that sees the memory, those of NCCL too.
  Result<std::unique_ptr<Communicator>> communicator(int32_t rank, cudaStream_t stream);
  // Once its rank failed, before its memory goes: what waits for others keeps a device busy for
  // good.
  void abort(int32_t rank);

 private:
  NcclDevices(const Nccl& nccl, int32_t ranks) : nccl_(nccl), words_(ranks) {}

  const Nccl& nccl_;
  std::vector<ncclComm_t> comms_;  // null: aborted
  ThreadGroup words_;              // of the host
};

}  // namespace wh::sharded
