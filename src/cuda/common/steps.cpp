#include "cuda/common/steps.h"

#include <cuda_runtime_api.h>

#include <cmath>

#include "core/rounding.h"
#include "cuda/common/launch.h"

namespace wh::cuda {
namespace {

// A launch beside its waves: on its way, a counter cleared, the last tiles on their own.
constexpr double kLaunchUs = 10;

}  // namespace

int64_t choose_step_tiles(const Query& query, const TileWaves& waves, double call_us) {
  if (query.limits.longest_step_us == 0) return 0;
  // Estimates are off by up to 40 %, and nothing can stop a launch that takes longer.
  constexpr double kAim = 0.7;
  const double aim_us = kAim * query.limits.longest_step_us / query.correction;
  if (call_us <= aim_us) return 0;
  const double fitting = std::floor((aim_us - kLaunchUs) / waves.wave_us);
  const double most = static_cast<double>(waves.tiles) / static_cast<double>(waves.workers) + 1;
  const auto count = static_cast<int64_t>(std::clamp(fitting, 1.0, std::max(1.0, most)));
  return count * waves.workers < waves.tiles ? count * waves.workers : 0;
}

double step_us_of(const TileWaves& waves, int64_t step_tiles, double call_us) {
  if (step_tiles == 0) return call_us;
  const int64_t count = divide_up(step_tiles, waves.workers);
  return kLaunchUs + static_cast<double>(count) * waves.wave_us;
}

StepEvents::StepEvents(void* stream) : stream_(stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  status_ = cuda_status(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture),
                        "cudaStreamIsCapturing");
  if (!status_.ok()) return;
  if (capture != cudaStreamCaptureStatusNone) {
    status_ = invalid(
        "run_options.progress is set while the stream is captured in a graph; a report waits for "
        "the work before it, so it must be NULL");
    return;
  }
  for (void*& event : events_) {
    cudaEvent_t made = nullptr;
    status_ =
        cuda_status(cudaEventCreateWithFlags(&made, cudaEventDisableTiming | cudaEventBlockingSync),
                    "cudaEventCreateWithFlags");
    if (!status_.ok()) return;
    event = made;
  }
}

StepEvents::~StepEvents() {
  for (void* event : events_) {
    if (event != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(event));
  }
}

Status StepEvents::mark(int64_t step) {
  return cuda_status(cudaEventRecord(static_cast<cudaEvent_t>(events_[step % 2]),
                                     static_cast<cudaStream_t>(stream_)),
                     "cudaEventRecord");
}

Status StepEvents::wait(int64_t step) {
  return cuda_status(cudaEventSynchronize(static_cast<cudaEvent_t>(events_[step % 2])),
                     "cudaEventSynchronize");
}

}  // namespace wh::cuda
