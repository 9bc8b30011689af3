#include "plan/planner.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/names.h"
#include "core/nearest_name.h"
#include "plan/backend.h"
#include "plan/units.h"

namespace wh {
namespace {

std::string kernel_names(std::span<const Kernel* const> kernels) {
  std::string names;
  for (const Kernel* kernel : kernels) {
    if (!names.empty()) names += ", ";
    names += kernel->name;
  }
  return names;
}

using Kernels = std::vector<const Kernel*>;

// Those of the problem's pass. Where a device has none, every kernel says so.
Kernels candidates_of(const Problem& problem, const Machine& machine) {
  Kernels kernels;
  for (const Kernel* kernel : machine.kernels) {
    if (kernel->pass == problem.pass) kernels.push_back(kernel);
  }
  if (kernels.empty()) kernels.assign(machine.kernels.begin(), machine.kernels.end());
  return kernels;
}

Status unknown_kernel(const Problem& problem, const Limits& limits, const Machine& machine,
                      const Kernels& candidates) {
  if (find_kernel(machine.kernels, limits.kernel) != nullptr) {
    return invalid(fmt::format("limits.kernel is \"{}\", which has no {} pass; valid: {}",
                               limits.kernel, kPasses.name(problem.pass),
                               kernel_names(candidates)));
  }
  std::vector<std::string> names;
  for (const Kernel* kernel : candidates) names.push_back(kernel->name);
  if (names.empty()) {
    return {Code::kRefused, fmt::format("limits.kernel is \"{}\", but {}", limits.kernel,
                                        machine.facts.unavailable)};
  }
  return invalid(
      fmt::format("limits.kernel is \"{}\", which is no kernel of {}; did you mean \"{}\"? "
                  "Valid: {}",
                  limits.kernel, backend(problem.device).label(),
                  nearest_name(limits.kernel, names), kernel_names(candidates)));
}

// Why the caller's policy, not the kernel itself, rules it out; empty: it does not.
std::string policy_refusal(const Kernel& kernel, const Query& query) {
  const Limits& limits = query.limits;
  if (!limits.kernel.empty()) {
    return limits.kernel == kernel.name ? "" : fmt::format("the caller forces {}", limits.kernel);
  }
  if (limits.policy == Policy::kFused && !kernel.is_fused()) {
    return "not fused, and the policy is fused";
  }
  if (limits.policy == Policy::kFusedAbove) {
    const bool wants_fused = query.problem.len_k >= limits.fused_above;
    if (wants_fused != kernel.is_fused()) {
      return fmt::format("the policy takes {} kernel {} {} keys",
                         wants_fused ? "a fused" : "an unfused", wants_fused ? "from" : "below",
                         limits.fused_above);
    }
  }
  return "";
}

// Why the kernel cannot stop often enough; empty: it can. The formula's step is corrected as its
// time is.
std::string step_refusal(const Kernel& kernel, const Query& query, const Config& config,
                         double estimated_us) {
  const double limit_us = query.limits.longest_step_us;
  if (limit_us == 0) return "";
  const double step_us =
      kernel.step_us == nullptr ? estimated_us : kernel.step_us(query, config) * query.correction;
  if (step_us <= limit_us) return "";
  return fmt::format("its longest step takes about {}, the limit is {}", format_us(step_us),
                     format_us(limit_us));
}

struct Assessment {
  Candidate candidate;
  Config config;
  double compared_us = 0;  // what candidates are compared by
};

// A profile holds for every core of its machine: with fewer threads the formula knows better.
bool profile_holds(const Machine& machine, const Limits& limits) {
  const int32_t cores = machine.facts.cores;
  return machine.profile != nullptr &&
         (cores == 0 || limits.threads == 0 || limits.threads == cores);
}

// Measured time over the formula's, for this kernel and problem.
double correction_of(const Kernel& kernel, const Problem& problem, const Profile* profile) {
  return profile == nullptr ? 1 : profile->correction(kernel.name, CostFeatures::of(problem));
}

// Bits depend on the kernel too: where they must not depend on the batch, what one batch entry
// would take alone decides.
double compared_us(const Kernel& kernel, const Query& query, double us, const Profile* profile) {
  if (!query.limits.batch_invariant || query.problem.batch <= 1) return us;
  Problem alone = query.problem;
  alone.batch = 1;
  const Query one{alone, query.limits, query.facts, correction_of(kernel, alone, profile)};
  return kernel.estimate_us(one, kernel.configure(one)) * one.correction;
}

Assessment assess(const Kernel& kernel, Query query, const Profile* profile) {
  Assessment result;
  Candidate& candidate = result.candidate;
  candidate.kernel = kernel.name;
  if (kernel.pass != query.problem.pass) {
    candidate.reason = fmt::format("has no {} pass, as no kernel of this device yet",
                                   kPasses.name(query.problem.pass));
    return result;
  }
  if (!kernel.takes_all_layouts && !query.problem.is_dense()) {
    candidate.reason = fmt::format(
        "takes dense queries and keys, these are {} and {}; a dense copy of them would do",
        kQueryLayouts.name(query.problem.query_layout), kKeyLayouts.name(query.problem.key_layout));
    return result;
  }
  if (is_quantised(query.problem) && !kernel.reads_quantised) {
    const Problem& p = query.problem;
    candidate.reason = fmt::format(
        "reads keys and values of f32, f16 and bf16, these are {}",
        kQuantiseds.name(p.quantised_k != Quantised::kNone ? p.quantised_k : p.quantised_v));
    return result;
  }
  if (const auto reason = kernel.refusal(query)) {
    candidate.reason = *reason;
    return result;
  }
  query.correction = correction_of(kernel, query.problem, profile);
  result.config = kernel.configure(query);
  candidate.workspace_bytes = kernel.workspace_bytes(query.problem, result.config);
  candidate.estimated_us = kernel.estimate_us(query, result.config) * query.correction;
  result.compared_us = compared_us(kernel, query, candidate.estimated_us, profile);
  candidate.reason = policy_refusal(kernel, query);
  if (candidate.reason.empty()) {
    candidate.reason = step_refusal(kernel, query, result.config, candidate.estimated_us);
  }
  if (!candidate.reason.empty()) return result;
  if (candidate.workspace_bytes > query.limits.workspace_bytes) {
    candidate.verdict = Verdict::kOverBudget;
    candidate.reason = fmt::format("wants {} of workspace, the limit is {}",
                                   format_bytes(candidate.workspace_bytes),
                                   format_bytes(query.limits.workspace_bytes));
    return result;
  }
  candidate.verdict = Verdict::kSlower;
  return result;
}

}  // namespace

Result<Plan> make_plan(const Problem& asked, const Limits& limits, const Machine& machine) {
  if (Status status = validate(asked); !status.ok()) return status;
  if (Status status = validate(limits); !status.ok()) return status;
  const Problem problem = canonical(asked);
  const Kernels kernels = candidates_of(problem, machine);
  if (!limits.kernel.empty() && find_kernel(kernels, limits.kernel) == nullptr) {
    return unknown_kernel(problem, limits, machine, kernels);
  }
  Plan plan;
  plan.problem = problem;
  plan.limits = limits;
  plan.device = machine.facts.name;
  if (!machine.facts.unavailable.empty()) {
    return Status(Code::kRefused,
                  fmt::format("device {}:{} cannot run: {}", kDevices.name(problem.device),
                              problem.device_index, machine.facts.unavailable));
  }
  const Query query{problem, limits, machine.facts};
  const Profile* profile = profile_holds(machine, limits) ? machine.profile : nullptr;
  plan.estimates = profile != nullptr || machine.profile == nullptr
                       ? std::string(machine.estimates)
                       : "formula, as the profile is for every core";
  std::vector<Config> configs;
  std::vector<double> compared_us;
  for (const Kernel* kernel : kernels) {
    Assessment assessment = assess(*kernel, query, profile);
    plan.candidates.push_back(std::move(assessment.candidate));
    configs.push_back(assessment.config);
    compared_us.push_back(assessment.compared_us);
  }
  size_t best = plan.candidates.size();
  for (size_t i = 0; i < plan.candidates.size(); ++i) {
    if (plan.candidates[i].verdict != Verdict::kSlower) continue;
    if (best == plan.candidates.size() || compared_us[i] < compared_us[best]) best = i;
  }
  if (best == plan.candidates.size()) return plan;
  Candidate& chosen = plan.candidates[best];
  chosen.verdict = Verdict::kChosen;
  for (Candidate& other : plan.candidates) {
    if (other.verdict != Verdict::kSlower || other.estimated_us >= chosen.estimated_us) continue;
    other.reason =
        "slower for one batch entry alone, which decides where bits must not depend on "
        "the batch";
  }
  plan.kernel = chosen.kernel;
  plan.config = configs[best];
  plan.variant = kernels[best]->variant(query, plan.config);
  plan.workspace_bytes = chosen.workspace_bytes;
  plan.estimated_us = chosen.estimated_us;
  return plan;
}

}  // namespace wh
