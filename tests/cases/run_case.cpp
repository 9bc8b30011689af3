#include "run_case.h"

#include <algorithm>

#include "api/machine.h"
#include "cuda/allocate.h"

namespace wh {
namespace {

// Tensors of a case on its device: the host's own for the CPU, copies for CUDA.
class PlacedTensors {
 public:
  PlacedTensors(const Problem& p, CaseData& data, size_t workspace_bytes)
      : device_(p.device), index_(p.device_index), data_(data), tensors_(data.tensors()) {
    tensors_.workspace_bytes = workspace_bytes;
    if (device_ == Device::kCpu) {
      // The guards of the workspace are poison too: a kernel that reads what it has not written
      // shows.
      workspace_ = GuardedTensor(static_cast<int64_t>(workspace_bytes) + 64);
      tensors_.workspace =
          reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace_.data()) + 63) / 64 * 64);
      return;
    }
    place(data.q, tensors_.q);
    place(data.k, tensors_.k);
    place(data.v, tensors_.v);
    place(data.mask, tensors_.mask);
    place(data.sinks, tensors_.sinks);
    place(data.key_lengths, tensors_.key_lengths);
    place(data.key_starts, tensors_.key_starts);
    place(data.out, tensors_.out);
    place(data.log_sum_exp, tensors_.log_sum_exp);
    workspace_ = GuardedTensor(static_cast<int64_t>(workspace_bytes));
    place(workspace_, tensors_.workspace);
  }
  ~PlacedTensors() {
    for (const Copy& copy : copies_) cuda::release(stream(), copy.device);
  }
  PlacedTensors(const PlacedTensors&) = delete;
  PlacedTensors& operator=(const PlacedTensors&) = delete;

  const Status& status() const { return status_; }
  const Tensors& tensors() const { return tensors_; }

  // Waits, and brings everything back with its guards, inputs too: nothing may have been written
  // there.
  Status fetch() {
    if (device_ == Device::kCpu) return {};
    if (Status status = cuda::synchronize(stream()); !status.ok()) return status;
    for (const Copy& copy : copies_) {
      if (Status status =
              cuda::copy(stream(), copy.host->all(), copy.device, copy.host->all_bytes());
          !status.ok()) {
        return status;
      }
    }
    return {};
  }
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

  template <typename Pointer>
  void place(GuardedTensor& host, Pointer& pointer) {
    if (pointer == nullptr && &host != &workspace_) return;
    if (!status_.ok()) return;
    Result<void*> device = cuda::allocate(stream(), host.all_bytes());
    if (!device.ok()) {
      status_ = device.status();
      return;
    }
    copies_.push_back({&host, *device});
    status_ = cuda::copy(stream(), *device, host.all(), host.all_bytes());
    pointer = static_cast<Pointer>(
        static_cast<void*>(static_cast<std::byte*>(*device) + GuardedTensor::kGuardBytes));
  }

  Device device_;
  int32_t index_;
  CaseData& data_;
  Tensors tensors_;
  GuardedTensor workspace_;
  std::vector<Copy> copies_;
  Status status_;
};

}  // namespace

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
  data.poison_outputs();
  PlacedTensors placed(c.problem, data, plan->workspace_bytes);
  if (!placed.status().ok()) return wrong(placed.status().message());
  if (Status status = validate(c.problem, placed.tensors()); !status.ok()) {
    return wrong(status.message());
  }
  if (c.problem.batch > 0 && c.problem.len_q > 0) {
    Progress unwatched;
    const Status status = run_kernel(plan->kernel, {plan->problem, plan->config, placed.tensors(),
                                                    default_executor(), unwatched});
    if (!status.ok()) return wrong(status.message());
  }
  if (Status status = placed.fetch(); !status.ok()) return wrong(status.message());
  if (!placed.guards_intact()) return wrong("memory around the workspace was written");
  if (std::string damage = data.damage(); !damage.empty()) return wrong(damage);
  const Difference difference = compare(data, expected);
  result.relative_rms = difference.relative_rms;
  result.tolerance = difference.tolerance;
  result.message = difference.message;
  return result;
}

}  // namespace wh
