#include "measure/execution.h"

#include <algorithm>
#include <cstring>

#include "api/machine.h"
#include "plan/cuda_facts.h"
#include "plan/planner.h"

namespace wh::cli {
namespace {

constexpr int kPaint = 0xa5;
// Long enough for the clock of events, which ticks in half microseconds.
constexpr double kReplayUs = 500;
constexpr int64_t kMostRuns = 50, kMostSets = 50;

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

// Makes `data`, of the host or the device, point to a copy on the device.
Status Execution::copy_of(const void*& data, int64_t bytes) {
  if (data == nullptr || bytes == 0) return {};
  const Problem& p = plan_.problem;
  const auto size = static_cast<size_t>(bytes);
  Result<Workspace> copy = Workspace::allocate({p.device, p.device_index, nullptr}, size);
  if (!copy.ok()) return copy.status();
  WH_RETURN_IF_ERROR(cuda::copy(stream(), copy->data(), data, size));
  data = copy->data();
  device_copies_.push_back(std::move(*copy));
  return {};
}

Status Execution::copy_to_device() {
  const auto move = [&](const auto*& pointer, int64_t bytes) -> Status {
    const void* data = pointer;
    WH_RETURN_IF_ERROR(copy_of(data, bytes));
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(data);
    return {};
  };
  const TensorBytes bytes = tensor_bytes(plan_.problem);
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
  Status status = launch(tensors_, progress, executor, nullptr);
  if (status.ok() && p.device == Device::kCuda) status = cuda::synchronize(stream());
  return status;
}

Status Execution::launch(const Tensors& tensors, Progress& progress, const Executor& executor,
                         void* stream) const {
  return run_kernel(plan_.kernel,
                    {plan_.problem, plan_.config, tensors, executor, progress, stream});
}

Result<double> Execution::device_us() {
  if (!replay_) WH_RETURN_IF_ERROR(capture_runs());
  const Result<double> us = replay_->us();
  if (!us.ok()) return us.status();
  return *us / static_cast<double>(replayed_runs_);
}

// Until all of them together are twice what the L2 cache holds.
Status Execution::copy_keys(std::vector<Tensors>& sets) {
  const Problem& p = plan_.problem;
  const TensorBytes bytes = tensor_bytes(p);
  const int64_t l2_bytes = cuda_facts(p.device_index).l2_bytes;
  const int64_t wanted =
      std::clamp<int64_t>(2 * l2_bytes / std::max<int64_t>(1, bytes.k + bytes.v) + 1, 1, kMostSets);
  sets.push_back(tensors_);
  while (static_cast<int64_t>(sets.size()) < wanted) {
    Tensors set = tensors_;
    WH_RETURN_IF_ERROR(copy_of(set.k, bytes.k));
    WH_RETURN_IF_ERROR(copy_of(set.v, bytes.v));
    sets.push_back(set);
  }
  return {};
}

Status Execution::capture_runs() {
  // A long run overwrites what the one before left in the cache, and is a sample by itself.
  std::vector<Tensors> sets;
  if (plan_.estimated_us < kReplayUs) {
    WH_RETURN_IF_ERROR(copy_keys(sets));
  } else {
    sets.push_back(tensors_);
  }
  const auto sets_count = static_cast<int64_t>(sets.size());
  const double runs_us = kReplayUs / std::max(1.0, plan_.estimated_us);
  replayed_runs_ =
      std::max(sets_count, std::clamp<int64_t>(static_cast<int64_t>(runs_us), 1, kMostRuns));
  Result<cuda::Replay> replay =
      cuda::Replay::capture(plan_.problem.device_index, [&](void* stream) -> Status {
        Progress nobody(nullptr, nullptr);
        for (int64_t i = 0; i < replayed_runs_; ++i) {
          const Tensors& set = sets[static_cast<size_t>(i % sets_count)];
          WH_RETURN_IF_ERROR(launch(set, nobody, default_executor(), stream));
        }
        return {};
      });
  if (!replay.ok()) return replay.status();
  replay_.emplace(std::move(*replay));
  return {};
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
