#include "execution.h"

#include <cstring>

#include "api/machine.h"
#include "cuda/allocate.h"

namespace wh::cli {
namespace {

constexpr int kPaint = 0xa5;

}  // namespace

Execution::Execution(Plan plan, HostTensors& host, Workspace workspace)
    : plan_(std::move(plan)),
      host_(&host),
      workspace_(std::move(workspace)),
      tensors_(host.tensors) {
  tensors_.workspace = workspace_.data();
  tensors_.workspace_bytes = plan_.workspace_bytes;
}

Result<Execution> Execution::prepare(const Problem& p, const Limits& limits, HostTensors& host) {
  Result<Plan> plan = make_plan(p, limits, this_machine(p.device, p.device_index));
  if (!plan.ok()) return plan.status();
  return prepare(std::move(*plan), host);
}

Result<Execution> Execution::prepare(Plan plan, HostTensors& host) {
  if (Status status = runnable_status(plan); !status.ok()) return status;
  // As a problem of the host, where the tensors still are: key lengths are looked at there alone.
  Problem on_host = plan.problem;
  on_host.device = Device::kCpu;
  if (Status status = validate(on_host, host.tensors); !status.ok()) return status;
  const Problem& p = plan.problem;
  Result<Workspace> workspace =
      Workspace::allocate({p.device, p.device_index, nullptr}, plan.workspace_bytes);
  if (!workspace.ok()) return workspace.status();
  Execution execution(std::move(plan), host, std::move(*workspace));
  if (execution.plan_.problem.device == Device::kCuda) {
    if (Status status = execution.copy_to_device(); !status.ok()) return status;
  }
  return execution;
}

Status Execution::copy_to_device() {
  const Problem& p = plan_.problem;
  const auto move = [&](const auto*& pointer, int64_t bytes) -> Status {
    if (pointer == nullptr || bytes == 0) return {};
    const auto size = static_cast<size_t>(bytes);
    Result<Workspace> copy = Workspace::allocate({p.device, p.device_index, nullptr}, size);
    if (!copy.ok()) return copy.status();
    if (Status status = cuda::copy(stream(), copy->data(), pointer, size); !status.ok()) {
      return status;
    }
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(copy->data());
    device_copies_.push_back(std::move(*copy));
    return {};
  };
  const TensorBytes bytes = tensor_bytes(p);
  const void* out = tensors_.out;
  const float* lse = tensors_.log_sum_exp;
  for (Status status :
       {move(tensors_.q, bytes.q), move(tensors_.k, bytes.k), move(tensors_.v, bytes.v),
        move(tensors_.mask, bytes.mask), move(tensors_.sinks, bytes.sinks),
        move(tensors_.key_lengths, bytes.key_lengths), move(tensors_.key_starts, bytes.key_starts),
        move(out, bytes.out), move(lse, bytes.log_sum_exp)}) {
    if (!status.ok()) return status;
  }
  tensors_.out = const_cast<void*>(out);
  tensors_.log_sum_exp = const_cast<float*>(lse);
  return {};
}

Status Execution::run(Progress::Callback callback, void* context, const Executor& executor) {
  const Problem& p = plan_.problem;
  if (p.batch == 0 || p.len_q == 0) return {};
  Progress progress(callback, context);
  Status status = run_kernel(plan_.kernel, {p, plan_.config, tensors_, executor, progress});
  if (status.ok() && p.device == Device::kCuda) status = cuda::synchronize(stream());
  return status;
}

Status Execution::fetch() {
  if (plan_.problem.device == Device::kCpu) return {};
  if (Status status = cuda::copy(stream(), host_->out.data(), tensors_.out, host_->out.size());
      !status.ok()) {
    return status;
  }
  return cuda::copy(stream(), host_->log_sum_exp.data(), tensors_.log_sum_exp,
                    host_->log_sum_exp.size());
}

void Execution::paint_workspace() {
  if (plan_.problem.device != Device::kCpu || plan_.workspace_bytes == 0) return;
  std::memset(workspace_.data(), kPaint, plan_.workspace_bytes);
}

uint64_t Execution::peak_workspace_bytes() const {
  if (plan_.problem.device != Device::kCpu) return plan_.workspace_bytes;
  const auto* bytes = static_cast<const unsigned char*>(workspace_.data());
  uint64_t touched = plan_.workspace_bytes;
  while (touched > 0 && bytes[touched - 1] == kPaint) --touched;
  return touched;
}

}  // namespace wh::cli
