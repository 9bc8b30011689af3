#include "parallel/nccl/communicator.h"

#include <fmt/format.h>

#include <cstring>
#include <thread>
#include <utility>

#include "cuda/device.h"

namespace wh::sharded {
namespace {

// What agree() tells and hears of a thousand ranks.
constexpr int64_t kStagingBytes = 1 << 20;
// Of a launch alone, in which nobody waits for other ranks.
constexpr std::chrono::seconds kLaunchTimeout{30};

}  // namespace

Status NcclCommunicator::check(cudaError_t error, const char* call) const {
  if (error == cudaSuccess) return {};
  return {Code::kDeviceError, fmt::format("{} on rank {}: {} ({})", call, rank(),
                                          cudaGetErrorString(error), cudaGetErrorName(error))};
}

Status NcclCommunicator::late() const {
  return {Code::kDeviceError,
          fmt::format("rank {} waited in vain: another rank did not send or take in time", rank())};
}

Result<std::unique_ptr<NcclCommunicator>> NcclCommunicator::make(
    std::shared_ptr<NcclConnection> connection, cudaStream_t stream) {
  std::unique_ptr<NcclCommunicator> made(new NcclCommunicator(std::move(connection), stream));
  const cuda::DeviceScope scope(made->connection_->device());
  WH_RETURN_IF_ERROR(scope.status());
  // Above the work's: a message that waits for multiprocessors holds up every rank behind it.
  int least = 0, greatest = 0;
  WH_RETURN_IF_ERROR(made->check(cudaDeviceGetStreamPriorityRange(&least, &greatest),
                                 "cudaDeviceGetStreamPriorityRange"));
  WH_RETURN_IF_ERROR(
      made->check(cudaStreamCreateWithPriority(&made->messages_, cudaStreamNonBlocking, greatest),
                  "cudaStreamCreateWithPriority"));
  WH_RETURN_IF_ERROR(made->check(cudaEventCreateWithFlags(&made->front_, cudaEventDisableTiming),
                                 "cudaEventCreateWithFlags"));
  WH_RETURN_IF_ERROR(made->check(cudaMalloc(&made->device_staging_, kStagingBytes), "cudaMalloc"));
  WH_RETURN_IF_ERROR(
      made->check(cudaMallocHost(&made->host_staging_, kStagingBytes), "cudaMallocHost"));
  return made;
}

NcclCommunicator::~NcclCommunicator() {
  const cuda::DeviceScope scope(connection_->device());
  for (const auto& [exchange, event] : arrived_) cudaEventDestroy(event);
  if (front_ != nullptr) cudaEventDestroy(front_);
  cudaFree(device_staging_);
  cudaFreeHost(host_staging_);
  if (messages_ != nullptr) cudaStreamDestroy(messages_);
}

Status NcclCommunicator::connect(std::span<NcclCommunicator* const> ranks,
                                 Clock::time_point deadline) {
  if (ranks.empty()) return {};
  const Nccl& nccl = ranks.front()->connection_->nccl();
  const auto said = [&](ncclResult_t result, const char* call) -> Status {
    if (result == ncclSuccess || result == ncclInProgress) return {};
    return {Code::kDeviceError,
            fmt::format("{}: {} ({})", call, nccl.error_string(result), nccl.last_error(nullptr))};
  };
  WH_RETURN_IF_ERROR(said(nccl.group_start(), "ncclGroupStart"));
  Status told;
  for (NcclCommunicator* one : ranks) {
    // The first message of either way connects all channels that larger ones will take.
    std::vector<Transfer> transfers;
    for (int32_t peer = 0; peer < one->ranks(); ++peer) {
      if (peer == one->rank()) continue;
      transfers.push_back({peer, true, one->device_staging_, 1});
      transfers.push_back({peer, false, one->device_staging_ + 1, 1});
    }
    if (told.ok()) told = one->send_and_receive(transfers);
  }
  const Status end = said(nccl.group_end(), "ncclGroupEnd");
  WH_RETURN_IF_ERROR(told);
  WH_RETURN_IF_ERROR(end);
  for (NcclCommunicator* one : ranks) {
    const cuda::DeviceScope scope(one->connection_->device());
    WH_RETURN_IF_ERROR(scope.status());
    WH_RETURN_IF_ERROR(one->launched(deadline));
    WH_RETURN_IF_ERROR(one->check(cudaEventRecord(one->front_, one->messages_), "cudaEventRecord"));
    WH_RETURN_IF_ERROR(one->wait(one->front_, deadline));
  }
  return {};
}

Status NcclCommunicator::send_and_receive(std::span<const Transfer> transfers) {
  const Nccl& nccl = connection_->nccl();
  ncclResult_t result = ncclSuccess;
  const auto group = [&](ncclComm_t comm) {
    if (const ncclResult_t begun = nccl.group_start(); begun != ncclSuccess) return begun;
    for (const Transfer& t : transfers) {
      if (t.bytes == 0 || (result != ncclSuccess && result != ncclInProgress)) continue;
      const auto bytes = static_cast<size_t>(t.bytes);
      result = t.is_send ? nccl.send(t.data, bytes, ncclUint8, t.peer, comm, messages_)
                         : nccl.receive(t.data, bytes, ncclUint8, t.peer, comm, messages_);
    }
    const ncclResult_t end = nccl.group_end();
    return result == ncclSuccess || result == ncclInProgress ? end : result;
  };
  return connection_->use("ncclSend, ncclRecv or ncclGroupEnd", group);
}

Result<bool> NcclCommunicator::is_launching() {
  ncclResult_t state = ncclSuccess;
  const auto ask = [&](ncclComm_t comm) {
    const ncclResult_t asked = connection_->nccl().async_error(comm, &state);
    return asked == ncclSuccess ? state : asked;
  };
  WH_RETURN_IF_ERROR(connection_->use("a message", ask));
  return state == ncclInProgress;
}

Status NcclCommunicator::launched(Clock::time_point deadline) {
  for (;;) {
    const Result<bool> is_at_it = is_launching();
    if (!is_at_it.ok()) return is_at_it.status();
    if (!*is_at_it) return {};
    if (Clock::now() >= deadline) return late();
    std::this_thread::yield();
  }
}

Status NcclCommunicator::start(int32_t exchange, std::span<const Transfer> transfers) {
  const cuda::DeviceScope scope(connection_->device());
  WH_RETURN_IF_ERROR(scope.status());
  cudaEvent_t& arrived = arrived_[exchange];
  if (arrived == nullptr) {
    WH_RETURN_IF_ERROR(check(cudaEventCreateWithFlags(&arrived, cudaEventDisableTiming),
                             "cudaEventCreateWithFlags"));
  }
  WH_RETURN_IF_ERROR(check(cudaEventRecord(front_, stream_), "cudaEventRecord"));
  WH_RETURN_IF_ERROR(check(cudaStreamWaitEvent(messages_, front_), "cudaStreamWaitEvent"));
  if (exchange < 0) {
    WH_RETURN_IF_ERROR(start_of_host(transfers));
  } else {
    WH_RETURN_IF_ERROR(send_and_receive(transfers));
    WH_RETURN_IF_ERROR(launched(Clock::now() + kLaunchTimeout));
  }
  return check(cudaEventRecord(arrived, messages_), "cudaEventRecord");
}

Status NcclCommunicator::start_of_host(std::span<const Transfer> transfers) {
  of_host_.assign(transfers.begin(), transfers.end());
  std::vector<Transfer> staged = of_host_;
  int64_t bytes = 0;
  for (Transfer& t : staged) {
    const int64_t offset = bytes;
    bytes += t.bytes;
    if (bytes > kStagingBytes) {
      return invalid(fmt::format("messages of the host have more than {} bytes", kStagingBytes));
    }
    if (t.is_send) std::memcpy(host_staging_ + offset, t.data, static_cast<size_t>(t.bytes));
    t.data = device_staging_ + offset;
  }
  const auto size = static_cast<size_t>(bytes);
  WH_RETURN_IF_ERROR(check(
      cudaMemcpyAsync(device_staging_, host_staging_, size, cudaMemcpyHostToDevice, messages_),
      "cudaMemcpyAsync"));
  WH_RETURN_IF_ERROR(send_and_receive(staged));
  WH_RETURN_IF_ERROR(launched(Clock::now() + kLaunchTimeout));
  return check(
      cudaMemcpyAsync(host_staging_, device_staging_, size, cudaMemcpyDeviceToHost, messages_),
      "cudaMemcpyAsync");
}

Status NcclCommunicator::finish(int32_t exchange, Clock::time_point deadline) {
  const cuda::DeviceScope scope(connection_->device());
  WH_RETURN_IF_ERROR(scope.status());
  const cudaEvent_t arrived = arrived_.at(exchange);
  if (exchange >= 0) return check(cudaStreamWaitEvent(stream_, arrived), "cudaStreamWaitEvent");
  WH_RETURN_IF_ERROR(wait(arrived, deadline));
  const std::byte* at = host_staging_;
  for (const Transfer& t : of_host_) {
    if (!t.is_send) std::memcpy(t.data, at, static_cast<size_t>(t.bytes));
    at += t.bytes;
  }
  return {};
}

Status NcclCommunicator::settle(Clock::time_point deadline) {
  const cuda::DeviceScope scope(connection_->device());
  WH_RETURN_IF_ERROR(scope.status());
  WH_RETURN_IF_ERROR(check(cudaEventRecord(front_, stream_), "cudaEventRecord"));
  return wait(front_, deadline);
}

Status NcclCommunicator::wait(cudaEvent_t event, Clock::time_point deadline) {
  for (;;) {
    const cudaError_t answer = cudaEventQuery(event);
    // Asked for second: messages of an aborted communicator end too.
    if (connection_->is_over()) return connection_->over();
    if (answer == cudaSuccess) return {};
    if (answer != cudaErrorNotReady) return check(answer, "cudaEventQuery");
    if (const Result<bool> fine = is_launching(); !fine.ok()) return fine.status();
    if (Clock::now() >= deadline) return late();
    std::this_thread::yield();
  }
}

}  // namespace wh::sharded
