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
  DeviceRank(NcclDevices& devices, std::unique_ptr<NcclCommunicator> messages, ThreadGroup& words)
      : devices_(devices), messages_(std::move(messages)), words_(words, messages_->rank()) {}

  int32_t rank() const override { return messages_->rank(); }
  int32_t ranks() const override { return messages_->ranks(); }
  Status start(int32_t exchange, std::span<const Transfer> transfers) override {
    return passed_on(by(exchange).start(exchange, transfers));
  }
  Status finish(int32_t exchange, Clock::time_point deadline) override {
    return passed_on(by(exchange).finish(exchange, deadline));
  }
  Status settle(Clock::time_point deadline) override {
    return passed_on(messages_->settle(deadline));
  }
  void give_up() override {
    words_.give_up();
    devices_.abort();
  }

 private:
  Communicator& by(int32_t exchange) {
    return exchange < 0 ? static_cast<Communicator&>(words_) : *messages_;
  }
  Status passed_on(Status status) {
    if (!status.ok()) give_up();
    return status;
  }

  NcclDevices& devices_;
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
  const Nccl& f = **library;
  std::vector<ncclComm_t> comms(static_cast<size_t>(ranks));
  if (const ncclResult_t result = f.init_all(comms.data(), ranks, nullptr); result != ncclSuccess) {
    return Status(Code::kDeviceError, fmt::format("ncclCommInitAll of {} ranks: {} ({})", ranks,
                                                  f.error_string(result), f.last_error(nullptr)));
  }
  auto connections = NcclConnection::make_all(f, comms);
  if (!connections.ok()) return connections.status();
  std::unique_ptr<NcclDevices> made(new NcclDevices(ranks));
  made->connections_ = std::move(*connections);
  WH_RETURN_IF_ERROR(made->connect());
  return made;
}

Status NcclDevices::connect() {
  std::vector<std::unique_ptr<NcclCommunicator>> owned;
  std::vector<NcclCommunicator*> all;
  for (const auto& connection : connections_) {
    auto one = NcclCommunicator::make(connection, nullptr);
    if (!one.ok()) return one.status();
    all.push_back(one->get());
    owned.push_back(std::move(*one));
  }
  const auto deadline = Communicator::Clock::now() + std::chrono::seconds(30);
  const Status status = NcclCommunicator::connect(all, deadline);
  if (!status.ok()) abort();
  return status;
}

Result<std::unique_ptr<Communicator>> NcclDevices::communicator(int32_t rank, cudaStream_t stream) {
  auto messages = NcclCommunicator::make(connection(rank), stream);
  if (!messages.ok()) return messages.status();
  return std::unique_ptr<Communicator>(new DeviceRank(*this, std::move(*messages), words_));
}

NcclDevices::~NcclDevices() {
  for (const auto& connection : connections_) connection->destroy();
}

void NcclDevices::abort() {
  for (const auto& connection : connections_) connection->abort();
}

}  // namespace wh::sharded
