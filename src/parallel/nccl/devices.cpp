#include "parallel/nccl/devices.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <utility>

#include "parallel/nccl/communicator.h"
#include "plan/backend.h"

namespace wh::sharded {
namespace {

class DeviceRank final : public Communicator {
 public:
  DeviceRank(std::unique_ptr<NcclCommunicator> messages, ThreadGroup& words)
      : messages_(std::move(messages)), words_(words, messages_->rank()) {}

  int32_t rank() const override { return messages_->rank(); }
  int32_t ranks() const override { return messages_->ranks(); }
  Status start(int32_t exchange, std::span<const Transfer> transfers) override {
    return by(exchange).start(exchange, transfers);
  }
  Status finish(int32_t exchange, Clock::time_point deadline) override {
    return by(exchange).finish(exchange, deadline);
  }
  Status settle(Clock::time_point deadline) override { return messages_->settle(deadline); }

 private:
  Communicator& by(int32_t exchange) {
    return exchange < 0 ? static_cast<Communicator&>(words_) : *messages_;
  }

  std::unique_ptr<NcclCommunicator> messages_;
  ThreadGroup::Member words_;
};

}  // namespace

Result<std::unique_ptr<NcclDevices>> NcclDevices::make(int32_t wanted) {
  const std::string& unavailable = backend(Device::kCuda).facts(0).unavailable;
  if (!unavailable.empty()) return Status(Code::kRefused, unavailable);
  const Result<const Nccl*> library = nccl();
  if (!library.ok()) return library.status();
  int devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
    return Status(Code::kDeviceError,
                  fmt::format("cudaGetDeviceCount: {}", cudaGetErrorString(error)));
  }
  const int32_t ranks = wanted == 0 ? devices : wanted;
  if (ranks > devices) {
    return invalid(fmt::format("ranks is {}; this host has {} CUDA devices", ranks, devices));
  }
  std::unique_ptr<NcclDevices> made(new NcclDevices(**library, ranks));
  std::vector<ncclComm_t> comms(static_cast<size_t>(ranks));
  const ncclResult_t result = made->nccl_.init_all(comms.data(), ranks, nullptr);
  if (result != ncclSuccess) {
    return Status(Code::kDeviceError,
                  fmt::format("ncclCommInitAll of {} ranks: {} ({})", ranks,
                              made->nccl_.error_string(result), made->nccl_.last_error(nullptr)));
  }
  made->comms_ = std::move(comms);
  return made;
}

Result<std::unique_ptr<Communicator>> NcclDevices::communicator(int32_t rank, cudaStream_t stream) {
  auto messages = NcclCommunicator::make(comm(rank), stream);
  if (!messages.ok()) return messages.status();
  return std::unique_ptr<Communicator>(new DeviceRank(std::move(*messages), words_));
}

NcclDevices::~NcclDevices() {
  for (ncclComm_t comm : comms_) {
    if (comm != nullptr) nccl_.destroy(comm);
  }
}

void NcclDevices::abort(int32_t rank) {
  ncclComm_t& comm = comms_[static_cast<size_t>(rank)];
  nccl_.abort(comm);
  comm = nullptr;
}

}  // namespace wh::sharded
