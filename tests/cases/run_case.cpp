#include "run_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "api/machine.h"
#include "cuda/cuda_facts.h"
#include "documented.h"
#include "verify/execution.h"

namespace wh {
namespace {

bool has_bytes(const GuardedTensor& tensor, const std::vector<std::byte>& bytes) {
  return std::memcmp(bytes.data(), tensor.data(), bytes.size()) == 0;
}

std::vector<std::byte> bytes_of(const GuardedTensor& tensor) {
  return {tensor.data(), tensor.data() + tensor.size()};
}

}  // namespace

CheckedCase::CheckedCase(const Case& c, const CheckOptions& options)
    : case_(c),
      options_(options),
      data_(c),
      expected_(expected_answer(data_.problem, data_.tensors(), c.sampled_rows)) {}

CaseResult CheckedCase::run(const std::string& kernel) {
  return run(kernel, this_machine(case_.problem.device, case_.problem.device_index));
}

CaseResult CheckedCase::run(const std::string& kernel, const Machine& here) {
  const Problem& p = case_.problem;
  CaseResult result;
  result.kernel = kernel;
  const auto end = [&](Outcome outcome, std::string message) {
    result.outcome = outcome;
    result.message = std::move(message);
    return result;
  };
  const bool is_other_card = options_.shared_bytes > 0 && p.device == Device::kCuda;
  CudaFacts card;
  if (is_other_card) {
    card = static_cast<const CudaFacts&>(here.facts);
    card.shared_bytes = options_.shared_bytes;
  }
  const DeviceFacts& facts = is_other_card ? card : here.facts;
  const Machine machine{facts, here.kernels, here.profile, here.estimates};
  Limits limits = case_.limits;
  limits.kernel = kernel;
  const Result<Plan> plan = make_plan(p, limits, machine);
  if (!plan.ok()) return end(Outcome::kWrong, plan.status().message());
  const Documented documented{p, limits.precision, facts};
  const bool must_take =
      std::any_of(machine.kernels.begin(), machine.kernels.end(), [&](const Kernel* one) {
        return (kernel.empty() || kernel == one->name) && documented.takes(one->name);
      });
  if (!plan->runnable()) {
    const std::string reasons = runnable_status(*plan).message();
    if (!must_take) return end(Outcome::kRefused, reasons);
    return end(Outcome::kWrong, "refused, but documented to be taken: " + reasons);
  }
  result.kernel = plan->kernel;
  if (!must_take) return end(Outcome::kWrong, "taken, but documented to be refused");
  difference_ = {};
  const std::string message = run_plan(*plan, machine);
  result.relative_rms = difference_.relative_rms;
  result.tolerance = difference_.tolerance;
  return end(message.empty() ? Outcome::kRight : Outcome::kWrong, message);
}

std::string CheckedCase::run_plan(const Plan& plan, const Machine& machine) {
  data_.poison_outputs();
  Result<Execution> execution = Execution::prepare(plan, data_.tensors(),
                                                   {.guard_bytes = GuardedTensor::kGuardBytes,
                                                    .paints_workspace = options_.paints_workspace,
                                                    .kernels = machine.kernels});
  if (!execution.ok()) return execution.status().message();
  if (Status status = execution->run(); !status.ok()) return status.message();
  if (Status status = execution->fetch(); !status.ok()) return status.message();
  const Result<bool> intact = execution->guards_intact();
  if (!intact.ok()) return intact.status().message();
  if (!*intact) return "memory around the workspace was written";
  if (std::string damage = data_.damage(); !damage.empty()) return damage;
  difference_ = compare(data_, expected_);
  if (!difference_.message.empty()) return difference_.message;
  if (std::string message = compare_all_rows(); !message.empty()) return message;
  if (options_.runs <= 1) return "";
  const std::vector<std::byte> out = bytes_of(data_.out), lse = bytes_of(data_.log_sum_exp);
  for (int64_t run = 2; run <= options_.runs; ++run) {
    data_.poison_outputs();
    if (Status status = execution->send_outputs(); !status.ok()) return status.message();
    if (Status status = execution->run(); !status.ok()) return status.message();
    if (Status status = execution->fetch_outputs(); !status.ok()) return status.message();
    if (!has_bytes(data_.out, out) || !has_bytes(data_.log_sum_exp, lse)) {
      return fmt::format("run {} gave other bits than the first", run);
    }
  }
  return "";
}

std::string CheckedCase::compare_all_rows() {
  if (static_cast<int64_t>(expected_.rows.size()) ==
      case_.problem.batch * case_.problem.heads_q * case_.problem.len_q) {
    return "";
  }
  if (!other_out_.empty()) return disagreement(data_, other_out_);
  other_out_ = bytes_of(data_.out);
  return "";
}

void Tally::add(const CaseResult& result) {
  ++(result.outcome == Outcome::kRefused ? refused : checked);
  if (result.outcome == Outcome::kWrong) ++wrong;
  if (result.tolerance > 0) {
    worst_share = std::max(worst_share, result.relative_rms / result.tolerance);
  }
}

std::vector<std::string> kernels_for(Device device, CaseSet set) {
  std::vector<std::string> names;
  for (const Kernel* kernel : kernels_of(device)) {
    if (kernel->pass != Pass::kForward) continue;  // tests/test_gradients.cpp
    if (set == CaseSet::kLarge && std::string(kernel->name) == "cpu_reference") continue;
    names.push_back(kernel->name);
  }
  return names;
}

}  // namespace wh
