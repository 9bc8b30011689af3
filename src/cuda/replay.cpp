#include "cuda/replay.h"

#include <cuda_runtime_api.h>

#include "cuda/common/launch.h"
#include "cuda/device.h"

namespace wh::cuda {
namespace {

class Graph final : public Replay {
 public:
  explicit Graph(int32_t device_index) : device_index_(device_index) {}
  ~Graph() override {
    if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
    if (before_ != nullptr) cudaEventDestroy(before_);
    if (after_ != nullptr) cudaEventDestroy(after_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  Status capture(const std::function<Status(void* stream)>& call) {
    WH_RETURN_IF_ERROR(cuda_status(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
                                   "cudaStreamCreate"));
    WH_RETURN_IF_ERROR(cuda_status(cudaEventCreate(&before_), "cudaEventCreate"));
    WH_RETURN_IF_ERROR(cuda_status(cudaEventCreate(&after_), "cudaEventCreate"));
    WH_RETURN_IF_ERROR(
        cuda_status(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
                    "cudaStreamBeginCapture"));
    const Status called = call(stream_);
    cudaGraph_t captured = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream_, &captured);
    if (!called.ok() || ended != cudaSuccess) {
      if (captured != nullptr) cudaGraphDestroy(captured);
      return called.ok() ? cuda_status(ended, "cudaStreamEndCapture") : called;
    }
    const cudaError_t made = cudaGraphInstantiate(&exec_, captured, 0);
    cudaGraphDestroy(captured);
    return cuda_status(made, "cudaGraphInstantiate");
  }

  Result<double> us() override {
    const DeviceScope scope(device_index_);
    if (Status status = scope.status(); !status.ok()) return status;
    WH_RETURN_IF_ERROR(cuda_status(cudaEventRecord(before_, stream_), "cudaEventRecord"));
    WH_RETURN_IF_ERROR(cuda_status(cudaGraphLaunch(exec_, stream_), "cudaGraphLaunch"));
    WH_RETURN_IF_ERROR(cuda_status(cudaEventRecord(after_, stream_), "cudaEventRecord"));
    WH_RETURN_IF_ERROR(cuda_status(cudaEventSynchronize(after_), "cudaEventSynchronize"));
    float ms = 0;
    WH_RETURN_IF_ERROR(
        cuda_status(cudaEventElapsedTime(&ms, before_, after_), "cudaEventElapsedTime"));
    return 1e3 * static_cast<double>(ms);
  }

 private:
  int32_t device_index_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
  cudaEvent_t before_ = nullptr, after_ = nullptr;
};

}  // namespace

Result<std::unique_ptr<Replay>> capture(int32_t device_index,
                                        const std::function<Status(void* stream)>& call) {
  const DeviceScope scope(device_index);
  if (Status status = scope.status(); !status.ok()) return status;
  auto graph = std::make_unique<Graph>(device_index);
  WH_RETURN_IF_ERROR(graph->capture(call));
  if (const Result<double> first = graph->us(); !first.ok()) return first.status();
  return std::unique_ptr<Replay>(std::move(graph));
}

}  // namespace wh::cuda
