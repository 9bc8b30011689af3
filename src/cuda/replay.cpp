#include "cuda/replay.h"

#include <cuda_runtime_api.h>

#include "cuda/common/launch.h"
#include "cuda/device.h"

namespace wh::cuda {

struct Replay::Graph {
  int32_t device_index = 0;
  cudaStream_t stream = nullptr;
  cudaGraphExec_t exec = nullptr;
  cudaEvent_t before = nullptr, after = nullptr;
};

void Replay::Destroy::operator()(Graph* graph) const {
  if (graph->exec != nullptr) cudaGraphExecDestroy(graph->exec);
  if (graph->before != nullptr) cudaEventDestroy(graph->before);
  if (graph->after != nullptr) cudaEventDestroy(graph->after);
  if (graph->stream != nullptr) cudaStreamDestroy(graph->stream);
  delete graph;
}

Result<Replay> Replay::capture(int32_t device_index,
                               const std::function<Status(void* stream)>& call) {
  const DeviceScope scope(device_index);
  if (Status status = scope.status(); !status.ok()) return status;
  Replay replay(new Graph);
  Graph& graph = *replay.graph_;
  graph.device_index = device_index;
  WH_RETURN_IF_ERROR(cuda_status(cudaStreamCreateWithFlags(&graph.stream, cudaStreamNonBlocking),
                                 "cudaStreamCreate"));
  WH_RETURN_IF_ERROR(cuda_status(cudaEventCreate(&graph.before), "cudaEventCreate"));
  WH_RETURN_IF_ERROR(cuda_status(cudaEventCreate(&graph.after), "cudaEventCreate"));
  WH_RETURN_IF_ERROR(
      cuda_status(cudaStreamBeginCapture(graph.stream, cudaStreamCaptureModeThreadLocal),
                  "cudaStreamBeginCapture"));
  const Status called = call(graph.stream);
  cudaGraph_t captured = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(graph.stream, &captured);
  if (!called.ok() || ended != cudaSuccess) {
    if (captured != nullptr) cudaGraphDestroy(captured);
    return called.ok() ? cuda_status(ended, "cudaStreamEndCapture") : called;
  }
  const cudaError_t made = cudaGraphInstantiate(&graph.exec, captured, 0);
  cudaGraphDestroy(captured);
  WH_RETURN_IF_ERROR(cuda_status(made, "cudaGraphInstantiate"));
  if (const Result<double> first = replay.us(); !first.ok()) return first.status();
  return replay;
}

Result<double> Replay::us() {
  const DeviceScope scope(graph_->device_index);
  if (Status status = scope.status(); !status.ok()) return status;
  WH_RETURN_IF_ERROR(
      cuda_status(cudaEventRecord(graph_->before, graph_->stream), "cudaEventRecord"));
  WH_RETURN_IF_ERROR(cuda_status(cudaGraphLaunch(graph_->exec, graph_->stream), "cudaGraphLaunch"));
  WH_RETURN_IF_ERROR(
      cuda_status(cudaEventRecord(graph_->after, graph_->stream), "cudaEventRecord"));
  WH_RETURN_IF_ERROR(cuda_status(cudaEventSynchronize(graph_->after), "cudaEventSynchronize"));
  float ms = 0;
  WH_RETURN_IF_ERROR(cuda_status(cudaEventElapsedTime(&ms, graph_->before, graph_->after),
                                 "cudaEventElapsedTime"));
  return 1e3 * static_cast<double>(ms);
}

}  // namespace wh::cuda
