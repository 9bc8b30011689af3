// A planned request with its tensors where the device wants them, ready to run again and again.
#pragma once

#include <optional>

#include "api/workspace.h"
#include "cuda/allocate.h"
#include "cuda/replay.h"
#include "input/tensors.h"
#include "plan/plan.h"

namespace wh::cli {

class Execution {
 public:
  // Checks the tensors and copies them to the device. `host` must outlive this.
  static Result<Execution> prepare(Plan plan, HostTensors& host);
  // The same with a plan for these limits alone, whatever the environment says.
  static Result<Execution> prepare(const Problem& problem, const Limits& limits, HostTensors& host);

  const Plan& plan() const { return plan_; }
  // Runs and waits.
  Status run(Progress::Callback callback = nullptr, void* context = nullptr,
             const Executor& executor = default_executor());
  // Time of a run on a GPU in microseconds: in a graph of many, as a model's step would be
  // replayed, each with K and V that the runs before it did not leave in the L2 cache.
  Result<double> device_us();
  // Brings out and log-sum-exp back to the host's tensors.
  Status fetch();

  // Paints the workspace, so that peak_workspace_bytes() can see what a run touched.
  void paint_workspace();
  uint64_t peak_workspace_bytes() const;

 private:
  Execution(Plan plan, HostTensors& host, Workspace workspace);
  Status copy_of(const void*& data, int64_t bytes);
  Status copy_to_device();
  Status copy_keys(std::vector<Tensors>& sets);
  Status capture_runs();
  Status launch(const Tensors& tensors, Progress& progress, const Executor& executor,
                void* stream) const;
  cuda::DeviceStream stream() const { return {plan_.problem.device_index, nullptr}; }

  Plan plan_;
  HostTensors* host_;
  Workspace workspace_;
  Tensors tensors_;
  std::vector<Workspace> device_copies_;
  std::optional<cuda::Replay> replay_;
  int64_t replayed_runs_ = 0;
};

}  // namespace wh::cli
