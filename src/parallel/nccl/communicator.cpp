#include "parallel/nccl/communicator.h"

#include <fmt/format.h>

#include <thread>
#include <vector>

#include "cuda/device.h"

namespace wh::sharded {

Status NcclCommunicator::check(ncclResult_t result, const char* call) const {
  if (result == ncclSuccess) return {};
  return {Code::kDeviceError, fmt::format("{} on rank {}: {} ({})", call, rank_,
                                          nccl_.error_string(result), nccl_.last_error(comm_))};
}

Status NcclCommunicator::check(cudaError_t error, const char* call) const {
  if (error == cudaSuccess) return {};
  return {Code::kDeviceError, fmt::format("{} on rank {}: {} ({})", call, rank_,
                                          cudaGetErrorString(error), cudaGetErrorName(error))};
}

Result<std::unique_ptr<NcclCommunicator>> NcclCommunicator::make(ncclComm_t comm,
                                                                 cudaStream_t stream) {
  const Result<const Nccl*> library = nccl();
  if (!library.ok()) return library.status();
  const Nccl& f = **library;
  std::unique_ptr<NcclCommunicator> made(new NcclCommunicator(f, comm, stream));
  WH_RETURN_IF_ERROR(made->check(f.device(comm, &made->device_), "ncclCommCuDevice"));
  const cuda::DeviceScope scope(made->device_);
  WH_RETURN_IF_ERROR(made->check(f.user_rank(comm, &made->rank_), "ncclCommUserRank"));
  WH_RETURN_IF_ERROR(made->check(f.count(comm, &made->ranks_), "ncclCommCount"));
  // Above the work's: a message that waits for multiprocessors holds up every rank behind it.
  int least = 0, greatest = 0;
  WH_RETURN_IF_ERROR(made->check(cudaDeviceGetStreamPriorityRange(&least, &greatest),
                                 "cudaDeviceGetStreamPriorityRange"));
  WH_RETURN_IF_ERROR(
      made->check(cudaStreamCreateWithPriority(&made->messages_, cudaStreamNonBlocking, greatest),
                  "cudaStreamCreateWithPriority"));
  WH_RETURN_IF_ERROR(made->check(cudaEventCreateWithFlags(&made->front_, cudaEventDisableTiming),
                                 "cudaEventCreateWithFlags"));
  return made;
}

NcclCommunicator::~NcclCommunicator() {
  const cuda::DeviceScope scope(device_);
  for (const auto& [exchange, event] : arrived_) cudaEventDestroy(event);
  if (front_ != nullptr) cudaEventDestroy(front_);
  for (void* memory : staging_) cudaFree(memory);
  if (messages_ != nullptr) cudaStreamDestroy(messages_);
}

Status NcclCommunicator::send_and_receive(std::span<const Transfer> transfers) {
  WH_RETURN_IF_ERROR(check(nccl_.group_start(), "ncclGroupStart"));
  ncclResult_t result = ncclSuccess;
  for (const Transfer& t : transfers) {
    if (t.bytes == 0 || result != ncclSuccess) continue;
    const auto bytes = static_cast<size_t>(t.bytes);
    result = t.is_send ? nccl_.send(t.data, bytes, ncclUint8, t.peer, comm_, messages_)
                       : nccl_.receive(t.data, bytes, ncclUint8, t.peer, comm_, messages_);
  }
  const ncclResult_t end = nccl_.group_end();
  WH_RETURN_IF_ERROR(check(result, "ncclSend or ncclRecv"));
  return check(end, "ncclGroupEnd");
}

Status NcclCommunicator::start(int32_t exchange, std::span<const Transfer> transfers) {
  const cuda::DeviceScope scope(device_);
  WH_RETURN_IF_ERROR(scope.status());
  cudaEvent_t& arrived = arrived_[exchange];
  if (arrived == nullptr) {
    WH_RETURN_IF_ERROR(check(cudaEventCreateWithFlags(&arrived, cudaEventDisableTiming),
                             "cudaEventCreateWithFlags"));
  }
  WH_RETURN_IF_ERROR(check(cudaEventRecord(front_, stream_), "cudaEventRecord"));
  WH_RETURN_IF_ERROR(check(cudaStreamWaitEvent(messages_, front_), "cudaStreamWaitEvent"));
  WH_RETURN_IF_ERROR(exchange < 0 ? start_of_host(transfers) : send_and_receive(transfers));
  return check(cudaEventRecord(arrived, messages_), "cudaEventRecord");
}

Status NcclCommunicator::start_of_host(std::span<const Transfer> transfers) {
  of_host_.assign(transfers.begin(), transfers.end());
  int64_t bytes = 0;
  for (const Transfer& t : of_host_) bytes += t.bytes;
  // The smaller ones are kept too: to free memory waits for what devices still do, a kernel that
  // waits for this rank's message among it.
  if (bytes > staging_bytes_) {
    void* more = nullptr;
    WH_RETURN_IF_ERROR(check(cudaMalloc(&more, static_cast<size_t>(bytes)), "cudaMalloc"));
    staging_.push_back(more);
    staging_bytes_ = bytes;
  }
  std::vector<Transfer> staged = of_host_;
  auto* at = static_cast<std::byte*>(staging_.empty() ? nullptr : staging_.back());
  for (Transfer& t : staged) {
    if (t.is_send) {
      WH_RETURN_IF_ERROR(check(cudaMemcpyAsync(at, t.data, static_cast<size_t>(t.bytes),
                                               cudaMemcpyHostToDevice, messages_),
                               "cudaMemcpyAsync"));
    }
    t.data = at;
    at += t.bytes;
  }
  return send_and_receive(staged);
}

Status NcclCommunicator::finish(int32_t exchange, Clock::time_point deadline) {
  const cuda::DeviceScope scope(device_);
  WH_RETURN_IF_ERROR(scope.status());
  const cudaEvent_t arrived = arrived_.at(exchange);
  if (exchange >= 0) return check(cudaStreamWaitEvent(stream_, arrived), "cudaStreamWaitEvent");
  WH_RETURN_IF_ERROR(wait(arrived, deadline));
  const auto* at = static_cast<const std::byte*>(staging_.empty() ? nullptr : staging_.back());
  for (const Transfer& t : of_host_) {
    if (!t.is_send) {
      WH_RETURN_IF_ERROR(
          check(cudaMemcpy(t.data, at, static_cast<size_t>(t.bytes), cudaMemcpyDeviceToHost),
                "cudaMemcpy"));
    }
    at += t.bytes;
  }
  return {};
}

Status NcclCommunicator::settle(Clock::time_point deadline) {
  const cuda::DeviceScope scope(device_);
  WH_RETURN_IF_ERROR(scope.status());
  WH_RETURN_IF_ERROR(check(cudaEventRecord(front_, stream_), "cudaEventRecord"));
  return wait(front_, deadline);
}

Status NcclCommunicator::wait(cudaEvent_t event, Clock::time_point deadline) {
  for (;;) {
    const cudaError_t answer = cudaEventQuery(event);
    if (answer == cudaSuccess) return {};
    if (answer != cudaErrorNotReady) return check(answer, "cudaEventQuery");
    ncclResult_t failure = ncclSuccess;
    WH_RETURN_IF_ERROR(check(nccl_.async_error(comm_, &failure), "ncclCommGetAsyncError"));
    if (failure != ncclInProgress) WH_RETURN_IF_ERROR(check(failure, "a message"));
    if (Clock::now() >= deadline) {
      return {
          Code::kDeviceError,
          fmt::format("rank {} waited in vain: another rank did not send or take in time", rank_)};
    }
    std::this_thread::yield();
  }
}

}  // namespace wh::sharded
