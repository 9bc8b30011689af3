// Ranks of an NCCL communicator, whose tensors are memory of a CUDA device each.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/nccl/library.h"

namespace wh::sharded {

class NcclCommunicator final : public Communicator {
 public:
  // Both stay the caller's and must outlive this. Messages have a stream of their own beside
  // `stream`, on which the rank computes: they wait for each other by events, and the host waits
  // for nothing but in settle() and for what is host memory.
  static Result<std::unique_ptr<NcclCommunicator>> make(ncclComm_t comm, cudaStream_t stream);
  ~NcclCommunicator() override;

  int32_t rank() const override { return rank_; }
  int32_t ranks() const override { return ranks_; }
  Status start(int32_t exchange, std::span<const Transfer> transfers) override;
  Status finish(int32_t exchange, Clock::time_point deadline) override;
  // A time-out names no rank: NCCL knows none. The caller should abort the communicator then.
  Status settle(Clock::time_point deadline) override;

 private:
  NcclCommunicator(const Nccl& nccl, ncclComm_t comm, cudaStream_t stream)
      : nccl_(nccl), comm_(comm), stream_(stream) {}
  Status send_and_receive(std::span<const Transfer> transfers);
  Status start_of_host(std::span<const Transfer> transfers);
  Status wait(cudaEvent_t event, Clock::time_point deadline);
  Status check(ncclResult_t result, const char* call) const;
  Status check(cudaError_t error, const char* call) const;

  const Nccl& nccl_;
  ncclComm_t comm_;
  cudaStream_t stream_;
  cudaStream_t messages_ = nullptr;
  cudaEvent_t front_ = nullptr;             // what the stream holds before a message
  std::map<int32_t, cudaEvent_t> arrived_;  // of each exchange
  std::vector<Transfer> of_host_;           // of the exchange under way, in the last of staging_
  std::vector<void*> staging_;
  int64_t staging_bytes_ = 0;
  int rank_ = 0, ranks_ = 1, device_ = 0;
};

}  // namespace wh::sharded
