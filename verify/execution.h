// A plan with its tensors where the device wants them, ready to run again and again. Runs go the
// way that a program's calls go, checks included.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "api/run.h"

namespace wh {

struct ExecutionOptions {
  // Around each host tensor lie so many bytes that nobody may write: they travel with it, and the
  // workspace gets as many.
  int64_t guard_bytes = 0;
  bool paints_workspace = false;  // with NaN bits: whoever reads them shows
  std::span<const Kernel* const> kernels =
      {};  // that the plan chose among; empty: the device's own
};

class Execution {
 public:
  // Checks the tensors and copies them to the device. What `host` points to must outlive this.
  static Result<Execution> prepare(Plan plan, const Tensors& host,
                                   const ExecutionOptions& options = {});
  // The same with a plan for these limits alone, whatever the environment says.
  static Result<Execution> prepare(const Problem& problem, const Limits& limits,
                                   const Tensors& host);

  const Plan& plan() const { return plan_; }
  // Runs and waits.
  Status run(const RunOptions& options = {});
  // Takes the time of a run on a device with a clock of its own, in microseconds: in a graph of
  // many, as a model's step would be replayed, each with K and V that the runs before it did not
  // leave in the L2 cache. Empty on the host, whose clock is the wall's. Valid while this is.
  std::function<Result<double>()> device_clock();

  // The host's outputs to the device, with whatever the caller painted them.
  Status send_outputs();
  // The outputs back to the host's tensors.
  Status fetch_outputs();
  // Everything back, inputs and guards too: nothing may have been written there.
  Status fetch();
  // Of the workspace.
  Result<bool> guards_intact() const;

  // Paints the host's workspace, so that peak_workspace_bytes() can see what a run touched. Of
  // another device's all is said to be touched.
  void watch_workspace();
  uint64_t peak_workspace_bytes() const;

 private:
  struct Copy {
    std::byte* host;  // from the guard in front
    std::byte* device;
    size_t bytes;
    bool is_output;
  };

  Execution(Plan plan, const Tensors& host, const ExecutionOptions& options, Workspace workspace);
  const Backend& device() const { return backend(plan_.problem.device); }
  DeviceStream stream() const { return {plan_.problem.device_index, nullptr}; }
  Result<std::byte*> allocate(int64_t bytes);
  template <typename Pointer>
  Status place(Pointer*& pointer, int64_t bytes, bool is_output);
  Status place_tensors();
  Status paint(std::byte* begin, size_t bytes, std::byte with) const;
  Status paint_guards();
  Status fetch(bool only_outputs);
  Status launch(const Tensors& tensors, RunOptions options) const;
  Result<double> device_us();
  Status copy_keys(std::vector<Tensors>& sets);
  Status capture_runs();
  std::byte* workspace() const { return static_cast<std::byte*>(workspace_.data()); }

  Plan plan_;
  ExecutionOptions options_;
  Workspace workspace_;  // with its guards
  Tensors tensors_;
  std::vector<Workspace> memory_;  // of the device, what tensors_ point into
  std::vector<Copy> copies_;
  std::unique_ptr<Replay> replay_;
  int64_t replayed_runs_ = 0;
};

}  // namespace wh
