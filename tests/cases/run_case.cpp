#include "run_case.h"

#include <fmt/format.h>

#include <algorithm>

#include "api/machine.h"
#include "core/sequence.h"
#include "cuda/cuda_facts.h"
#include "documented.h"
#include "verify/answer.h"
#include "verify/execution.h"
#include "verify/gradients.h"

namespace wh {

class CaseData {
 public:
  virtual ~CaseData() = default;
  virtual const Problem& problem() const = 0;
  virtual Tensors tensors() = 0;
  virtual void poison_outputs() = 0;
  virtual std::string damage() const = 0;                       // empty: nothing
  virtual std::vector<std::byte> answer() const = 0;            // all bytes of the outputs
  virtual std::string compare(double& share_of_tolerance) = 0;  // empty: right
};

namespace {

std::vector<std::byte> bytes_of(const GuardedTensor& tensor) {
  return {tensor.data(), tensor.data() + tensor.size()};
}

class ForwardData : public CaseData {
 public:
  explicit ForwardData(const Case& c)
      : data_(c), expected_(expected_answer(data_.problem, data_.tensors(), c.sampled_rows)) {}

  const Problem& problem() const override { return data_.problem; }
  Tensors tensors() override { return data_.tensors(); }
  void poison_outputs() override { data_.poison_outputs(); }
  std::string damage() const override { return data_.damage(); }
  std::vector<std::byte> answer() const override {
    std::vector<std::byte> bytes = bytes_of(data_.out);
    const std::vector<std::byte> lse = bytes_of(data_.log_sum_exp);
    bytes.insert(bytes.end(), lse.begin(), lse.end());
    return bytes;
  }
  std::string compare(double& share_of_tolerance) override {
    const Difference difference = wh::compare(data_, expected_);
    share_of_tolerance = difference.relative_rms / difference.tolerance;
    return difference.message.empty() ? compare_all_rows() : difference.message;
  }

 private:
  std::string compare_all_rows() {
    const Problem& p = data_.problem;
    if (static_cast<int64_t>(expected_.rows.size()) == query_rows(p, data_.tensors())) return "";
    if (!other_out_.empty()) return disagreement(data_, other_out_);
    other_out_ = bytes_of(data_.out);
    return "";
  }

  HostTensors data_;
  Expected expected_;
  std::vector<std::byte> other_out_;  // of the first kernel that was right, where rows are sampled
};

class BackwardData : public CaseData {
 public:
  explicit BackwardData(const Case& c) : data_(c), expected_(data_) {}
  BackwardData(GradientTensors data, int64_t sampled_rows)
      : data_(std::move(data)), expected_(data_, sampled_rows) {}

  const Problem& problem() const override { return data_.problem(); }
  Tensors tensors() override { return data_.tensors(); }
  void poison_outputs() override { data_.poison_outputs(); }
  std::string damage() const override { return data_.damage(); }
  std::vector<std::byte> answer() const override { return data_.answer(); }
  std::string compare(double& share_of_tolerance) override {
    const GradientDifference difference = expected_.compare(data_);
    share_of_tolerance = difference.worst_share;
    return difference.message;
  }

 private:
  GradientTensors data_;
  ExpectedGradients expected_;
};

Result<std::unique_ptr<CaseData>> data_of(const Case& c, Pass pass) {
  if (pass == Pass::kForward) return std::unique_ptr<CaseData>(new ForwardData(c));
  if (c.sampled_rows == 0) return std::unique_ptr<CaseData>(new BackwardData(c));
  Result<GradientTensors> data = GradientTensors::after_a_run(c);
  if (!data.ok()) return data.status();
  return std::unique_ptr<CaseData>(new BackwardData(std::move(*data), c.sampled_rows));
}

}  // namespace

CheckedCase::CheckedCase(const Case& c, const CheckOptions& options, Pass pass)
    : case_(c), options_(options) {
  Result<std::unique_ptr<CaseData>> data = data_of(c, pass);
  if (data.ok()) {
    data_ = std::move(*data);
  } else {
    failure_ = "the forward pass: " + data.status().message();
  }
}
CheckedCase::~CheckedCase() = default;

const Problem& CheckedCase::problem() const {
  return data_ == nullptr ? case_.problem : data_->problem();
}

CaseResult CheckedCase::run(const std::string& kernel) {
  return run(kernel, this_machine(case_.problem.device, case_.problem.device_index));
}

CaseResult CheckedCase::run(const std::string& kernel, const Machine& here) {
  const Problem& p = problem();
  CaseResult result;
  result.kernel = kernel;
  const auto end = [&](Outcome outcome, std::string message) {
    result.outcome = outcome;
    result.message = std::move(message);
    return result;
  };
  if (data_ == nullptr) return end(Outcome::kWrong, failure_);
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
        return one->pass == p.pass && (kernel.empty() || kernel == one->name) &&
               documented.takes(one->name);
      });
  if (!plan->runnable()) {
    const std::string reasons = runnable_status(*plan).message();
    if (!must_take) return end(Outcome::kRefused, reasons);
    return end(Outcome::kWrong, "refused, but documented to be taken: " + reasons);
  }
  result.kernel = plan->kernel;
  if (!must_take) return end(Outcome::kWrong, "taken, but documented to be refused");
  share_of_tolerance_ = 0;
  const std::string message = run_plan(*plan, machine);
  result.share_of_tolerance = share_of_tolerance_;
  return end(message.empty() ? Outcome::kRight : Outcome::kWrong, message);
}

std::string CheckedCase::run_plan(const Plan& plan, const Machine& machine) {
  data_->poison_outputs();
  Result<Execution> execution = Execution::prepare(plan, data_->tensors(),
                                                   {.guard_bytes = GuardedTensor::kGuardBytes,
                                                    .paints_workspace = options_.paints_workspace,
                                                    .kernels = machine.kernels});
  if (!execution.ok()) return execution.status().message();
  if (Status status = execution->run(); !status.ok()) return status.message();
  if (Status status = execution->fetch(); !status.ok()) return status.message();
  const Result<bool> intact = execution->guards_intact();
  if (!intact.ok()) return intact.status().message();
  if (!*intact) return "memory around the workspace was written";
  if (std::string damage = data_->damage(); !damage.empty()) return damage;
  if (std::string message = data_->compare(share_of_tolerance_); !message.empty()) return message;
  if (options_.runs <= 1) return "";
  const std::vector<std::byte> answer = data_->answer();
  for (int64_t run = 2; run <= options_.runs; ++run) {
    data_->poison_outputs();
    if (Status status = execution->send_outputs(); !status.ok()) return status.message();
    if (Status status = execution->run(); !status.ok()) return status.message();
    if (Status status = execution->fetch_outputs(); !status.ok()) return status.message();
    if (data_->answer() != answer) {
      return fmt::format("run {} gave other bits than the first", run);
    }
  }
  return "";
}

void Tally::add(const CaseResult& result) {
  ++(result.outcome == Outcome::kRefused ? refused : checked);
  if (result.outcome == Outcome::kWrong) ++wrong;
  worst_share = std::max(worst_share, result.share_of_tolerance);
}

std::vector<std::string> kernels_for(Device device, CaseSet set, Pass pass) {
  std::vector<std::string> names;
  for (const Kernel* kernel : kernels_of(device)) {
    if (kernel->pass != pass) continue;
    if (set == CaseSet::kLarge && kernel->role == Role::kReference) continue;
    names.push_back(kernel->name);
  }
  return names;
}

}  // namespace wh
