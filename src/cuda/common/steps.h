// A call cut into launches over ranges of its tiles, so that none runs longer than the caller
// allows and the progress callback is asked between them. The bits do not change: a tile is worked
// on by itself, and in which launch does not matter.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/progress.h"
#include "core/rounding.h"
#include "core/status.h"
#include "plan/kernel.h"

namespace wh::cuda {

// A call as the time of its launches has it: so many tiles, `workers` of them at once, each wave of
// those as long as `wave_us`.
struct TileWaves {
  int64_t tiles;
  int64_t workers;
  double wave_us;
};

// Config::step_tiles for the caller's limit: whole waves, one at least. 0: the whole call, which
// takes `call_us`, is short enough, or there is no limit.
int64_t choose_step_tiles(const Query& query, const TileWaves& waves, double call_us);

// A launch of that many tiles; 0: the whole call.
double step_us_of(const TileWaves& waves, int64_t step_tiles, double call_us);

// The ends of launches on a stream. One is in flight while the next is enqueued, so there are two.
class StepEvents {
 public:
  explicit StepEvents(void* stream);
  ~StepEvents();
  StepEvents(const StepEvents&) = delete;
  StepEvents& operator=(const StepEvents&) = delete;

  const Status& status() const { return status_; }
  Status mark(int64_t step);  // behind the launch of this step
  Status wait(int64_t step);  // until it has ended

 private:
  void* stream_;
  void* events_[2] = {nullptr, nullptr};
  Status status_;
};

// With somebody who watches: keeps one launch in flight, reports the one before when it has ended,
// and stops launching when told to. Nothing runs any more when it returns. `marks` is StepEvents.
template <typename Marks, typename LaunchRange>
Status run_watched_steps(Progress& progress, int64_t tiles, int64_t step_tiles, Marks& marks,
                         LaunchRange launch_range, const char* results_are = "out is") {
  const int64_t steps = divide_up(tiles, step_tiles);
  progress.start(steps, results_are);
  progress.writing_out();  // with the first launch
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t first = i * step_tiles;
    Status status = launch_range(first, std::min(tiles, first + step_tiles));
    if (status.ok()) status = marks.mark(i);
    if (status.ok() && i > 0) status = marks.wait(i - 1);
    if (!status.ok()) return status;
    if (i == 0 || progress.step_done()) continue;
    status = marks.wait(i);
    progress.add(1);
    return status.ok() ? progress.finish() : status;
  }
  if (Status status = marks.wait(steps - 1); !status.ok()) return status;
  progress.step_done();
  return progress.finish();
}

// Calls launch_range(first, end) for ranges of Config::step_tiles of [0, tiles), in order; it puts
// their work on the stream. Without a callback nothing waits for them.
template <typename LaunchRange>
Status run_in_steps(const Launch& launch, int64_t tiles, LaunchRange launch_range) {
  if (tiles == 0) return {};
  const int64_t chosen = launch.config.step_tiles;
  const int64_t step_tiles = chosen > 0 ? std::min(chosen, tiles) : tiles;
  if (launch.progress.is_watched()) {
    StepEvents events(launch.stream);
    if (!events.status().ok()) return events.status();
    const bool is_forward = launch.problem.pass == Pass::kForward;
    return run_watched_steps(launch.progress, tiles, step_tiles, events, launch_range,
                             is_forward ? "out is" : "the gradients are");
  }
  for (int64_t first = 0; first < tiles; first += step_tiles) {
    Status status = launch_range(first, std::min(tiles, first + step_tiles));
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace wh::cuda
