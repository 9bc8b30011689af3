// Calls captured in a graph and replayed: their time is the device's alone, where a launch from the
// host takes longer than many a kernel.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "core/status.h"

namespace wh::cuda {

class Replay {
 public:
  // Captures whatever call(stream) puts on the stream, and replays it once.
  static Result<Replay> capture(int32_t device_index,
                                const std::function<Status(void* stream)>& call);

  // Of one replay, by events around it, in microseconds; waits for it.
  Result<double> us();

 private:
  struct Graph;
  struct Destroy {
    void operator()(Graph* graph) const;
  };
  explicit Replay(Graph* graph) : graph_(graph) {}

  std::unique_ptr<Graph, Destroy> graph_;
};

}  // namespace wh::cuda
