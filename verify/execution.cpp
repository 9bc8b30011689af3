#include "verify/execution.h"

#include <algorithm>
#include <cstring>

#include "api/machine.h"
#include "plan/planner.h"

namespace wh {
namespace {

constexpr std::byte kGuard{0xff};      // NaN bits
constexpr std::byte kUntouched{0xa5};  // no value that ends a kernel's workspace by chance
// Long enough for the clock of events, which ticks in half microseconds.
constexpr double kReplayUs = 500;
constexpr int64_t kMostRuns = 50, kMostSets = 50;

}  // namespace

Execution::Execution(Plan plan, const Tensors& host, const ExecutionOptions& options,
                     Workspace workspace)
    : plan_(std::move(plan)), options_(options), workspace_(std::move(workspace)), tensors_(host) {
  if (plan_.workspace_bytes > 0) tensors_.workspace = this->workspace() + options.guard_bytes;
  tensors_.workspace_bytes = plan_.workspace_bytes;
}

Result<Execution> Execution::prepare(const Problem& p, const Limits& limits, const Tensors& host) {
  Result<Plan> plan = make_plan(p, limits, this_machine(p.device, p.device_index));
  if (!plan.ok()) return plan.status();
  return prepare(std::move(*plan), host);
}

Result<Execution> Execution::prepare(Plan plan, const Tensors& host,
                                     const ExecutionOptions& options) {
  WH_RETURN_IF_ERROR(runnable_status(plan));
  const Problem& p = plan.problem;
  // Here, where the tensors still are the host's: a device's key lengths nobody looks at.
  WH_RETURN_IF_ERROR(validate(p, host));
  WH_RETURN_IF_ERROR(validate_sequences(p, host));
  const size_t guards = 2 * static_cast<size_t>(options.guard_bytes);
  Result<Workspace> workspace =
      Workspace::allocate({p.device, {p.device_index, nullptr}}, plan.workspace_bytes + guards);
  if (!workspace.ok()) return workspace.status();
  Execution execution(std::move(plan), host, options, std::move(*workspace));
  WH_RETURN_IF_ERROR(execution.paint_guards());
  if (!execution.device().is_host()) WH_RETURN_IF_ERROR(execution.place_tensors());
  return execution;
}

Result<std::byte*> Execution::allocate(int64_t bytes) {
  Result<Workspace> memory =
      Workspace::allocate({plan_.problem.device, stream()}, static_cast<size_t>(bytes));
  if (!memory.ok()) return memory.status();
  memory_.push_back(std::move(*memory));
  return static_cast<std::byte*>(memory_.back().data());
}

// Makes `pointer` point to a copy on the device.
template <typename Pointer>
Status Execution::place(Pointer*& pointer, int64_t bytes, bool is_output) {
  const int64_t guard = options_.guard_bytes, all = bytes + 2 * guard;
  if (pointer == nullptr || all == 0) return {};
  const Result<std::byte*> device = allocate(all);
  if (!device.ok()) return device.status();
  // An input that a kernel writes to comes back changed, into a caller's tensor that is not const.
  auto* host = reinterpret_cast<std::byte*>(const_cast<std::remove_const_t<Pointer>*>(pointer));
  const Copy copy{host - guard, *device, static_cast<size_t>(all), is_output};
  copies_.push_back(copy);
  pointer = reinterpret_cast<Pointer*>(copy.device + guard);
  return backend(plan_.problem.device).copy(stream(), copy.device, copy.host, copy.bytes);
}

Status Execution::place_tensors() {
  const TensorBytes bytes = tensor_bytes(plan_.problem);
  const bool is_forward = plan_.problem.pass == Pass::kForward;
  const bool v_is_k = tensors_.v == tensors_.k;
  WH_RETURN_IF_ERROR(place(tensors_.q, bytes.q, false));
  WH_RETURN_IF_ERROR(place(tensors_.k, bytes.k, false));
  if (v_is_k) {
    tensors_.v = tensors_.k;
  } else {
    WH_RETURN_IF_ERROR(place(tensors_.v, bytes.v, false));
  }
  WH_RETURN_IF_ERROR(place(tensors_.scales_k, bytes.scales_k, false));
  WH_RETURN_IF_ERROR(place(tensors_.scales_v, bytes.scales_v, false));
  WH_RETURN_IF_ERROR(place(tensors_.mask, bytes.mask, false));
  WH_RETURN_IF_ERROR(place(tensors_.sinks, bytes.sinks, false));
  WH_RETURN_IF_ERROR(place(tensors_.key_lengths, bytes.key_lengths, false));
  WH_RETURN_IF_ERROR(place(tensors_.key_starts, bytes.key_starts, false));
  WH_RETURN_IF_ERROR(place(tensors_.query_offsets, bytes.query_offsets, false));
  WH_RETURN_IF_ERROR(place(tensors_.key_offsets, bytes.key_offsets, false));
  WH_RETURN_IF_ERROR(place(tensors_.page_table, bytes.page_table, false));
  WH_RETURN_IF_ERROR(place(tensors_.page_offsets, bytes.page_offsets, false));
  WH_RETURN_IF_ERROR(place(tensors_.out, bytes.out, is_forward));
  WH_RETURN_IF_ERROR(place(tensors_.log_sum_exp, bytes.log_sum_exp, is_forward));
  WH_RETURN_IF_ERROR(place(tensors_.d_out, bytes.d_out, false));
  WH_RETURN_IF_ERROR(place(tensors_.dq, bytes.dq, true));
  WH_RETURN_IF_ERROR(place(tensors_.dk, bytes.dk, true));
  WH_RETURN_IF_ERROR(place(tensors_.dv, bytes.dv, true));
  return place(tensors_.d_sinks, bytes.d_sinks, true);
}

// In pieces: some plans take hundreds of MB.
Status Execution::paint(std::byte* begin, size_t bytes, std::byte with) const {
  const std::vector<std::byte> piece(std::min(bytes, size_t{16} << 20), with);
  for (size_t done = 0; done < bytes; done += piece.size()) {
    WH_RETURN_IF_ERROR(
        device().copy(stream(), begin + done, piece.data(), std::min(piece.size(), bytes - done)));
  }
  return {};
}

Status Execution::paint_guards() {
  const auto guard = static_cast<size_t>(options_.guard_bytes);
  if (options_.paints_workspace) {
    return paint(workspace(), plan_.workspace_bytes + 2 * guard, kGuard);
  }
  WH_RETURN_IF_ERROR(paint(workspace(), guard, kGuard));
  return paint(workspace() + guard + plan_.workspace_bytes, guard, kGuard);
}

Result<bool> Execution::guards_intact() const {
  const auto guard = static_cast<size_t>(options_.guard_bytes);
  std::vector<std::byte> bytes(guard);
  for (const size_t begin : {size_t{0}, guard + plan_.workspace_bytes}) {
    WH_RETURN_IF_ERROR(device().copy(stream(), bytes.data(), workspace() + begin, guard));
    for (const std::byte byte : bytes) {
      if (byte != kGuard) return false;
    }
  }
  return true;
}

Status Execution::launch(const Tensors& tensors, RunOptions options) const {
  options.kernels = options_.kernels;
  return run_plan(plan_, tensors, options);
}

Status Execution::run(const RunOptions& options) {
  WH_RETURN_IF_ERROR(launch(tensors_, options));
  return device().synchronize(stream());
}

Status Execution::send_outputs() {
  for (const Copy& copy : copies_) {
    if (!copy.is_output) continue;
    WH_RETURN_IF_ERROR(device().copy(stream(), copy.device, copy.host, copy.bytes));
  }
  return {};
}

Status Execution::fetch(bool only_outputs) {
  for (const Copy& copy : copies_) {
    if (only_outputs && !copy.is_output) continue;
    WH_RETURN_IF_ERROR(device().copy(stream(), copy.host, copy.device, copy.bytes));
  }
  return {};
}

Status Execution::fetch_outputs() { return fetch(true); }
Status Execution::fetch() { return fetch(false); }

std::function<Result<double>()> Execution::device_clock() {
  if (device().is_host()) return nullptr;
  return [this] { return device_us(); };
}

Result<double> Execution::device_us() {
  if (replay_ == nullptr) WH_RETURN_IF_ERROR(capture_runs());
  const Result<double> us = replay_->us();
  if (!us.ok()) return us.status();
  return *us / static_cast<double>(replayed_runs_);
}

// Until all of them together are twice what the L2 cache holds.
Status Execution::copy_keys(std::vector<Tensors>& sets) {
  const Problem& p = plan_.problem;
  const TensorBytes bytes = tensor_bytes(p);
  const int64_t l2_bytes = device().facts(p.device_index).l2_bytes;
  const int64_t wanted =
      std::clamp<int64_t>(2 * l2_bytes / std::max<int64_t>(1, bytes.k + bytes.v) + 1, 1, kMostSets);
  const auto copy_of = [&](const void*& data, int64_t size) -> Status {
    if (data == nullptr || size == 0) return {};
    const Result<std::byte*> copy = allocate(size);
    if (!copy.ok()) return copy.status();
    const void* from = std::exchange(data, *copy);
    return device().copy(stream(), *copy, from, static_cast<size_t>(size));
  };
  sets.push_back(tensors_);
  while (static_cast<int64_t>(sets.size()) < wanted) {
    Tensors set = tensors_;
    WH_RETURN_IF_ERROR(copy_of(set.k, bytes.k));
    if (p.values_in_keys) {
      set.v = nullptr;
    } else {
      WH_RETURN_IF_ERROR(copy_of(set.v, bytes.v));
    }
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
  auto replay = device().capture(plan_.problem.device_index, [&](void* stream) -> Status {
    for (int64_t i = 0; i < replayed_runs_; ++i) {
      const Tensors& set = sets[static_cast<size_t>(i % sets_count)];
      WH_RETURN_IF_ERROR(launch(set, {.stream = stream}));
    }
    return {};
  });
  if (!replay.ok()) return replay.status();
  replay_ = std::move(*replay);
  return {};
}

void Execution::watch_workspace() {
  if (!device().is_host()) return;
  std::fill_n(static_cast<std::byte*>(tensors_.workspace), plan_.workspace_bytes, kUntouched);
}

uint64_t Execution::peak_workspace_bytes() const {
  if (!device().is_host()) return plan_.workspace_bytes;
  const auto* bytes = static_cast<const std::byte*>(tensors_.workspace);
  uint64_t touched = plan_.workspace_bytes;
  while (touched > 0 && bytes[touched - 1] == kUntouched) --touched;
  return touched;
}

}  // namespace wh
