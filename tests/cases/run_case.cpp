#include "run_case.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "api/machine.h"
#include "cuda/allocate.h"
#include "documented.h"

namespace wh {
namespace {

// Tensors of a case on its device: the host's own for the CPU, copies for CUDA.
class PlacedTensors {
 public:
  PlacedTensors(HostTensors& data, size_t workspace_bytes, bool paints_workspace)
      : device_(data.problem.device),
        index_(data.problem.device_index),
        data_(data),
        tensors_(data.tensors()) {
    tensors_.workspace_bytes = workspace_bytes;
    if (device_ == Device::kCpu) {
      workspace_ = GuardedTensor(static_cast<int64_t>(workspace_bytes) + 64);
      tensors_.workspace =
          reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace_.data()) + 63) / 64 * 64);
      return;
    }
    place(data.q, tensors_.q);
    place(data.k, tensors_.k);
    if (data.v_is_k) {
      tensors_.v = tensors_.k;
    } else {
      place(data.v, tensors_.v);
    }
    place(data.mask, tensors_.mask);
    place(data.sinks, tensors_.sinks);
    place(data.key_lengths, tensors_.key_lengths);
    place(data.key_starts, tensors_.key_starts);
    first_output_ = copies_.size();
    place(data.out, tensors_.out);
    place(data.log_sum_exp, tensors_.log_sum_exp);
    place_workspace(paints_workspace);
  }
  ~PlacedTensors() {
    for (const Copy& copy : copies_) cuda::release(stream(), copy.device);
    if (device_workspace_ != nullptr) cuda::release(stream(), device_workspace_);
  }
  PlacedTensors(const PlacedTensors&) = delete;
  PlacedTensors& operator=(const PlacedTensors&) = delete;

  const Status& status() const { return status_; }
  const Tensors& tensors() const { return tensors_; }

  // The host's, which are poisoned.
  Status send_outputs() {
    for (size_t i = first_output_; i < copies_.size(); ++i) {
      const Copy& copy = copies_[i];
      if (Status status = move(copy.device, copy.host->all(), copy.host->all_bytes());
          !status.ok()) {
        return status;
      }
    }
    return {};
  }
  // Waits, and brings everything back with its guards, inputs too: nothing may have been written
  // there. Of the workspace the guards come.
  Status fetch() {
    if (Status status = fetch_from(0); !status.ok() || device_ == Device::kCpu) return status;
    for (const auto& [host, device] : workspace_guards()) {
      if (Status status = move(host, device, GuardedTensor::kGuardBytes); !status.ok()) {
        return status;
      }
    }
    return {};
  }
  Status fetch_outputs() { return fetch_from(first_output_); }

  bool guards_intact() const {
    if (!workspace_.guards_intact()) return false;
    if (device_ == Device::kCuda) return true;
    const auto* end = static_cast<const std::byte*>(tensors_.workspace) + tensors_.workspace_bytes;
    return std::all_of(end, workspace_.data() + workspace_.size(),
                       [](std::byte byte) { return byte == std::byte{0xff}; });
  }

 private:
  struct Copy {
    GuardedTensor* host;
    void* device;
  };

  cuda::DeviceStream stream() const { return {index_, nullptr}; }

  Status move(void* to, const void* from, size_t bytes) const {
    return cuda::copy(stream(), to, from, bytes);
  }
  std::byte* allocate(size_t bytes) {
    if (!status_.ok()) return nullptr;
    Result<void*> memory = cuda::allocate(stream(), bytes);
    if (!memory.ok()) status_ = memory.status();
    return memory.ok() ? static_cast<std::byte*>(*memory) : nullptr;
  }

  template <typename Pointer>
  void place(GuardedTensor& host, Pointer& pointer) {
    if (pointer == nullptr) return;
    std::byte* device = allocate(host.all_bytes());
    if (device == nullptr) return;
    copies_.push_back({&host, device});
    status_ = move(device, host.all(), host.all_bytes());
    pointer = static_cast<Pointer>(static_cast<void*>(device + GuardedTensor::kGuardBytes));
  }

  // Its host side holds the guards alone, as some plans take hundreds of MB.
  void place_workspace(bool paints) {
    workspace_ = GuardedTensor(0);
    device_workspace_ = allocate(tensors_.workspace_bytes + 2 * GuardedTensor::kGuardBytes);
    if (device_workspace_ == nullptr) return;
    tensors_.workspace = device_workspace_ + GuardedTensor::kGuardBytes;
    for (const auto& [host, device] : workspace_guards()) {
      if (status_.ok()) {
        status_ = move(device, host, GuardedTensor::kGuardBytes);
      }
    }
    if (!paints) return;
    const std::vector<std::byte> paint(std::min(tensors_.workspace_bytes, size_t{16} << 20),
                                       std::byte{0xff});
    for (size_t done = 0; status_.ok() && done < tensors_.workspace_bytes; done += paint.size()) {
      const size_t bytes = std::min(paint.size(), tensors_.workspace_bytes - done);
      status_ = move(static_cast<std::byte*>(tensors_.workspace) + done, paint.data(), bytes);
    }
  }
  std::array<std::pair<std::byte*, std::byte*>, 2> workspace_guards() {
    constexpr int64_t kGuard = GuardedTensor::kGuardBytes;
    return {{{workspace_.all(), device_workspace_},
             {workspace_.all() + kGuard, device_workspace_ + kGuard + tensors_.workspace_bytes}}};
  }

  Status fetch_from(size_t first) {
    if (device_ == Device::kCpu) return {};
    if (Status status = cuda::synchronize(stream()); !status.ok()) return status;
    for (size_t i = first; i < copies_.size(); ++i) {
      const Copy& copy = copies_[i];
      if (Status status = move(copy.host->all(), copy.device, copy.host->all_bytes());
          !status.ok()) {
        return status;
      }
    }
    return {};
  }

  Device device_;
  int32_t index_;
  HostTensors& data_;
  Tensors tensors_;
  GuardedTensor workspace_;
  std::byte* device_workspace_ = nullptr;
  std::vector<Copy> copies_;  // inputs, then outputs
  size_t first_output_ = 0;
  Status status_;
};

bool has_bytes(const GuardedTensor& tensor, const std::vector<std::byte>& bytes) {
  return std::memcmp(bytes.data(), tensor.data(), bytes.size()) == 0;
}

std::vector<std::byte> bytes_of(const GuardedTensor& tensor) {
  return {tensor.data(), tensor.data() + tensor.size()};
}

}  // namespace

CheckedCase::CheckedCase(const Case& c, const CheckOptions& options)
    : case_(c), options_(options), data_(c), expected_(expected_answer(data_, c.sampled_rows)) {}

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
  CudaFacts facts = here.cuda;
  if (options_.shared_bytes > 0) facts.shared_bytes = options_.shared_bytes;
  const Machine machine{here.cpu, facts, here.kernels, here.profile, here.estimates};
  Limits limits = case_.limits;
  limits.kernel = kernel;
  const Result<Plan> plan = make_plan(p, limits, machine);
  if (!plan.ok()) return end(Outcome::kWrong, plan.status().message());
  const Documented documented{p, limits.precision, machine.cpu, machine.cuda};
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
  const Problem& p = plan.problem;
  data_.poison_outputs();
  PlacedTensors placed(data_, plan.workspace_bytes, options_.paints_workspace);
  if (!placed.status().ok()) return placed.status().message();
  if (Status status = validate(p, placed.tensors()); !status.ok()) return status.message();
  const Kernel* kernel = find_kernel(machine.kernels, plan.kernel);
  const auto launch = [&]() -> Status {
    if (p.batch == 0 || p.len_q == 0) return {};
    Progress unwatched;
    return kernel->run({p, plan.config, placed.tensors(), default_executor(), unwatched});
  };
  if (Status status = launch(); !status.ok()) return status.message();
  if (Status status = placed.fetch(); !status.ok()) return status.message();
  if (!placed.guards_intact()) return "memory around the workspace was written";
  if (std::string damage = data_.damage(); !damage.empty()) return damage;
  difference_ = compare(data_, expected_);
  if (!difference_.message.empty()) return difference_.message;
  if (std::string message = compare_all_rows(); !message.empty()) return message;
  if (options_.runs <= 1) return "";
  const std::vector<std::byte> out = bytes_of(data_.out), lse = bytes_of(data_.log_sum_exp);
  for (int64_t run = 2; run <= options_.runs; ++run) {
    data_.poison_outputs();
    if (Status status = placed.send_outputs(); !status.ok()) return status.message();
    if (Status status = launch(); !status.ok()) return status.message();
    if (Status status = placed.fetch_outputs(); !status.ok()) return status.message();
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
    if (set == CaseSet::kLarge && std::string(kernel->name) == "cpu_reference") continue;
    names.push_back(kernel->name);
  }
  return names;
}

}  // namespace wh
