#include "api/run.h"

#include <fmt/format.h>

#include "api/machine.h"
#include "api/plan_cache.h"
#include "api/plan_log.h"
#include "core/carver.h"
#include "plan/planner.h"

namespace wh {
namespace {

// The tensors' optional pointers follow the problem: what it does not use is not read.
Tensors used_tensors(const Problem& p, Tensors t) {
  if (p.mask == MaskKind::kNone) t.mask = nullptr;
  if (!p.has_sinks) t.sinks = nullptr;
  if (!p.has_key_lengths) t.key_lengths = nullptr;
  if (!p.has_key_starts) t.key_starts = nullptr;
  if (p.query_layout != QueryLayout::kPacked) t.query_offsets = nullptr;
  if (p.key_layout != KeyLayout::kPacked) t.key_offsets = nullptr;
  if (p.key_layout != KeyLayout::kPaged) t.page_table = nullptr;
  if (!p.has_page_offsets) t.page_offsets = nullptr;
  if (p.scales_k == Scales::kNone) t.scales_k = nullptr;
  if (p.scales_v == Scales::kNone || p.values_in_keys) t.scales_v = nullptr;
  if (p.pass == Pass::kBackward) {
    if (!p.has_sinks) t.d_sinks = nullptr;
    if (p.values_in_keys) t.dv = nullptr;
    return t;
  }
  if (!p.wants_log_sum_exp) t.log_sum_exp = nullptr;
  t.d_out = t.dq = t.dk = t.dv = nullptr;
  t.d_sinks = nullptr;
  return t;
}

static_assert(WH_WORKSPACE_ALIGNMENT == kWorkspaceAlignment);

Status check_workspace(const Plan& plan, const Tensors& t) {
  if (plan.workspace_bytes == 0) return {};
  if (t.workspace == nullptr) {
    return invalid(fmt::format("workspace is null; the plan takes {} bytes", plan.workspace_bytes));
  }
  if (t.workspace_bytes < plan.workspace_bytes) {
    return invalid(fmt::format("workspace_bytes is {}; the plan takes {}", t.workspace_bytes,
                               plan.workspace_bytes));
  }
  if (reinterpret_cast<uintptr_t>(t.workspace) % WH_WORKSPACE_ALIGNMENT != 0) {
    return invalid(fmt::format("workspace is {}; it must be aligned to {} bytes", t.workspace,
                               WH_WORKSPACE_ALIGNMENT));
  }
  return {};
}

PlanCache& plan_cache() {
  static PlanCache cache;
  return cache;
}

}  // namespace

Result<Plan> plan_here(const Problem& problem, const Limits& limits) {
  Result<Plan> plan =
      make_plan(problem, limits, this_machine(problem.device, problem.device_index));
  if (plan.ok()) log_plan(*plan);
  return plan;
}

Result<std::shared_ptr<const Plan>> cached_plan(const Problem& problem, const Limits& limits) {
  if (auto cached = plan_cache().find(problem, limits)) return cached;
  Result<Plan> made = plan_here(problem, limits);
  if (!made.ok()) return made.status();
  WH_RETURN_IF_ERROR(runnable_status(*made));
  auto plan = std::make_shared<const Plan>(std::move(*made));
  plan_cache().insert(plan);
  return plan;
}

Status run_plan(const Plan& plan, const Tensors& tensors, const RunOptions& options,
                const Workspace* own) {
  WH_RETURN_IF_ERROR(runnable_status(plan));
  Tensors used = used_tensors(plan.problem, tensors);
  if (own != nullptr) {
    used.workspace = own->data();
    used.workspace_bytes = plan.workspace_bytes;
  }
  WH_RETURN_IF_ERROR(check_workspace(plan, used));
  used.workspace_bytes = plan.workspace_bytes;  // more may be there, and hold something else
  if (plan.workspace_bytes == 0) used.workspace = nullptr;  // wherever it points
  const Result<Problem> asked = problem_of_run(plan.problem, used);
  if (!asked.ok()) return asked.status();
  const Problem& p = *asked;
  const Backend& device = backend(p.device);
  WH_RETURN_IF_ERROR(validate(p, used));
  if (device.is_host()) WH_RETURN_IF_ERROR(validate_sequences(p, used));
  if (!writes_anything(p)) return {};
  Tensors callers = used;
  // While a stream is captured, what is allocated on it is no memory yet, and looks like the
  // host's.
  if (own != nullptr) callers.workspace = nullptr;
  WH_RETURN_IF_ERROR(device.check(p, callers, options.stream));
  if (p.values_in_keys) {  // they need not be set
    used.v = used.k;
    used.scales_v = used.scales_k;
  }
  Progress progress(options.progress, options.progress_context);
  const auto kernels = options.kernels.empty() ? device.kernels() : options.kernels;
  const Kernel& kernel = *find_kernel(kernels, plan.kernel);
  // Fewer sequences never take more.
  if (kernel.workspace_bytes(p, plan.config) > plan.workspace_bytes) {
    return {Code::kInternal, fmt::format("{} takes more workspace for {} sequences than for {}",
                                         kernel.name, p.batch, plan.problem.batch)};
  }
  return device.run(kernel, {p, plan.config, used, options.executor, progress, options.stream});
}

}  // namespace wh
