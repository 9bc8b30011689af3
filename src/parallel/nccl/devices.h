// The CUDA devices of this host as ranks of one process, which has a thread for each.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/nccl/connection.h"
#include "parallel/threads/group.h"

namespace wh::sharded {

class NcclDevices {
 public:
  // Devices 0 to ranks - 1, or all of them, connected with each other.
  static Result<std::unique_ptr<NcclDevices>> make(int32_t ranks);
  ~NcclDevices();
  NcclDevices(const NcclDevices&) = delete;
  NcclDevices& operator=(const NcclDevices&) = delete;

  int32_t ranks() const { return static_cast<int32_t>(connections_.size()); }
  const std::shared_ptr<NcclConnection>& connection(int32_t rank) const {
    return connections_[static_cast<size_t>(rank)];
  }
  // Of a rank's thread, for what it computes on `stream`. Device memory goes by NCCL; the host's is
  // copied, as the ranks share it: a thread may then free device memory while others wait for it,
  // which waits for the kernels of every device that sees the memory, those of NCCL too. A call
  // that fails ends the messages of every rank.
  Result<std::unique_ptr<Communicator>> communicator(int32_t rank, cudaStream_t stream);
  // Ends the messages of every rank, from any thread, once one of them failed and before memory of
  // any goes: what waits for a message keeps a device busy for good, and who frees memory waits for
  // it.
  void abort();

 private:
  explicit NcclDevices(int32_t ranks) : words_(ranks) {}
  // All ranks' with each other, in one group: a thread for each would wait for the others for good
  // where one of them fails.
  Status connect();

  std::vector<std::shared_ptr<NcclConnection>> connections_;
  ThreadGroup words_;  // of the host
};

}  // namespace wh::sharded
