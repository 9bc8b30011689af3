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
  if (Status status = runnable_status(*plan); !status.ok()) return status;
  Result<Workspace> workspace =
      Workspace::allocate({p.device, p.device_index, nullptr}, plan->workspace_bytes);
  if (!workspace.ok()) return workspace.status();
  Execution execution(std::move(*plan), host, std::move(*workspace));
  if (p.device == Device::kCuda) {
    if (Status status = execution.copy_to_device(); !status.ok()) return status;
  }
  if (Status status = validate(p, execution.tensors_); !status.ok()) return status;
  return execution;
}

Status Execution::copy_to_device() {
  const Problem& p = plan_.problem;
  const auto move = [&](const auto*& pointer, size_t bytes) -> Status {
    if (pointer == nullptr || bytes == 0) return {};
    Result<Workspace> copy = Workspace::allocate({p.device, p.device_index, nullptr}, bytes);
    if (!copy.ok()) return copy.status();
    if (Status status = cuda::copy(stream(), copy->data(), pointer, bytes); !status.ok()) {
      return status;
    }
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(copy->data());
    device_copies_.push_back(std::move(*copy));
    return {};
  };
  const size_t row_bytes = sizeof(int32_t) * static_cast<size_t>(p.batch);
  const void* out = tensors_.out;
  const float* lse = tensors_.log_sum_exp;
  const size_t kv = dtype_bytes(p.dtype_kv);
  const auto elements = [](int64_t heads, const Strides& s, int64_t batch, int64_t len,
                           int64_t dim) {
    return static_cast<size_t>((batch - 1) * s[0] + (heads - 1) * s[1] + (len - 1) * s[2] +
                               (dim - 1) * s[3] + 1);
  };
  const size_t mask_bytes =
      p.mask == MaskKind::kNone
          ? 0
          : elements(p.heads_q, p.stride_mask, p.batch, p.len_q, p.len_k) *
                (p.mask == MaskKind::kBoolean
                     ? 1
                     : (p.mask == MaskKind::kAdditiveF32 ? 4 : dtype_bytes(p.dtype_q)));
  for (Status status :
       {move(tensors_.q,
             elements(p.heads_q, p.stride_q, p.batch, p.len_q, p.dim_qk) * dtype_bytes(p.dtype_q)),
        move(tensors_.k, elements(p.heads_kv, p.stride_k, p.batch, p.len_k, p.dim_qk) * kv),
        move(tensors_.v, elements(p.heads_kv, p.stride_v, p.batch, p.len_k, p.dim_v) * kv),
        move(tensors_.mask, mask_bytes),
        move(tensors_.sinks, sizeof(float) * static_cast<size_t>(p.heads_q)),
        move(tensors_.key_lengths, row_bytes), move(tensors_.key_starts, row_bytes),
        move(out, host_->out.size()), move(lse, host_->log_sum_exp.size())}) {
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
