#include "run_case.h"

#include "api/machine.h"

namespace wh {

CaseResult run_case(const Case& c, CaseData& data, const Expected& expected,
                    const std::string& kernel) {
  CaseResult result;
  result.kernel = kernel;
  const auto wrong = [&](const std::string& message) {
    result.message = message;
    return result;
  };
  Limits limits = c.limits;
  limits.kernel = kernel;
  const Machine machine = this_machine(c.problem.device, c.problem.device_index);
  const Result<Plan> plan = make_plan(c.problem, limits, machine);
  if (!plan.ok()) return wrong(plan.status().message());
  if (!plan->runnable()) {
    result.was_refused = true;
    return wrong(runnable_status(*plan).message());
  }
  result.kernel = plan->kernel;
  // The guards of the workspace are poison too: a kernel that reads what it has not written shows.
  GuardedTensor workspace(static_cast<int64_t>(plan->workspace_bytes) + 64);
  auto* aligned =
      reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  const std::vector<std::byte> before(aligned + plan->workspace_bytes,
                                      workspace.data() + workspace.size());
  data.poison_outputs();
  Tensors tensors = data.tensors();
  tensors.workspace = aligned;
  tensors.workspace_bytes = plan->workspace_bytes;
  if (Status status = validate(c.problem, tensors); !status.ok()) return wrong(status.message());
  if (c.problem.batch > 0 && c.problem.len_q > 0) {
    Progress unwatched;
    const Status status =
        find_kernel(machine.kernels, plan->kernel)
            ->run({plan->problem, plan->config, tensors, default_executor(), unwatched});
    if (!status.ok()) return wrong(status.message());
  }
  if (!workspace.guards_intact() ||
      !std::equal(before.begin(), before.end(), aligned + plan->workspace_bytes)) {
    return wrong("memory around the workspace was written");
  }
  if (std::string damage = data.damage(); !damage.empty()) return wrong(damage);
  const Difference difference = compare(data, expected);
  result.relative_rms = difference.relative_rms;
  result.tolerance = difference.tolerance;
  result.message = difference.message;
  return result;
}

}  // namespace wh
