// Ranks of an NCCL communicator, whose tensors are memory of a CUDA device each.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/nccl/connection.h"

namespace wh::sharded {

class NcclCommunicator final : public Communicator {
 public:
  // The stream stays the caller's and must outlive this. Messages have one of their own beside it,
  // on which the rank computes: they wait for each other by events, and the host waits for nothing
  // but in settle() and for what is host memory.
  static Result<std::unique_ptr<NcclCommunicator>> make(std::shared_ptr<NcclConnection> connection,
                                                        cudaStream_t stream);
  ~NcclCommunicator() override;

  // Connects these ranks, all of the calling thread's, with every rank of their communicator, which
  // all do once. Where nobody does, NCCL connects two ranks when the first message between them is
  // started, and a start then waits for good for a rank that does not come: a communicator that
  // blocks knows no time-out. What starts thereafter only launches.
  static Status connect(std::span<NcclCommunicator* const> ranks, Clock::time_point deadline);

  int32_t rank() const override { return connection_->rank(); }
  int32_t ranks() const override { return connection_->ranks(); }
  Status start(int32_t exchange, std::span<const Transfer> transfers) override;
  Status finish(int32_t exchange, Clock::time_point deadline) override;
  // A time-out names no rank: NCCL knows none. The communicator should be aborted then.
  Status settle(Clock::time_point deadline) override;

 private:
  NcclCommunicator(std::shared_ptr<NcclConnection> connection, cudaStream_t stream)
      : connection_(std::move(connection)), stream_(stream) {}
  Status start_of_host(std::span<const Transfer> transfers);
  Status send_and_receive(std::span<const Transfer> transfers);
  // Whether NCCL's own thread has yet to launch what a communicator that does not block was told;
  // an error where a message has failed.
  Result<bool> is_launching();
  Status launched(Clock::time_point deadline);
  Status wait(cudaEvent_t event, Clock::time_point deadline);
  Status check(cudaError_t error, const char* call) const;
  Status late() const;

  std::shared_ptr<NcclConnection> connection_;
  cudaStream_t stream_;
  cudaStream_t messages_ = nullptr;
  cudaEvent_t front_ = nullptr;             // what the stream holds before a message
  std::map<int32_t, cudaEvent_t> arrived_;  // of each exchange
  std::vector<Transfer> of_host_;           // of the exchange under way
  // What they are staged in, on the device and in page-locked memory: copies of other memory may
  // make the host wait for the stream, and what allocates or frees waits for kernels that wait for
  // other ranks, so both are there from the beginning.
  std::byte* device_staging_ = nullptr;
  std::byte* host_staging_ = nullptr;
};

}  // namespace wh::sharded
