// One rank's tensors where its device wants them.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "api/workspace.h"
#include "verify/sharded_data.h"

namespace wh::sharded {

class RankOnDevice {
 public:
  // `local` must outlive this. On the host the tensors are `local` itself.
  static Result<RankOnDevice> make(const ShardedData& data, LocalTensors& local,
                                   int32_t device_index) {
    RankOnDevice made(data.whole().device, device_index, local);
    made.tensors_ = data.tensors(local);
    if (made.device().is_host()) return made;
    Tensors& t = made.tensors_;
    WH_RETURN_IF_ERROR(made.place(t.q, local.q.size()));
    WH_RETURN_IF_ERROR(made.place(t.k, local.k.size()));
    WH_RETURN_IF_ERROR(made.place(t.v, local.v.size()));
    WH_RETURN_IF_ERROR(made.place(t.out, local.out.size()));
    WH_RETURN_IF_ERROR(made.place(t.log_sum_exp, local.log_sum_exp.size() * sizeof(float)));
    WH_RETURN_IF_ERROR(made.place(t.page_table, local.page_table.size() * sizeof(int32_t)));
    const TensorBytes bytes = tensor_bytes(data.whole());
    WH_RETURN_IF_ERROR(made.place(t.mask, static_cast<size_t>(bytes.mask)));
    WH_RETURN_IF_ERROR(made.place(t.sinks, static_cast<size_t>(bytes.sinks)));
    return made;
  }
  // With so many bytes of workspace in place of what it had.
  Status take_workspace(size_t bytes) {
    workspace_.reset();
    Result<Workspace> taken = Workspace::allocate({device_, on_}, bytes);
    if (!taken.ok()) return taken.status();
    workspace_.emplace(std::move(*taken));
    tensors_.workspace = workspace_->data();
    tensors_.workspace_bytes = bytes;
    return {};
  }
  const Tensors& tensors() const { return tensors_; }
  // What the rank computed back into `local`.
  Status fetch() const {
    if (device().is_host()) return {};
    const auto take = [&](void* to, const void* from, size_t bytes) -> Status {
      return bytes == 0 ? Status() : device().copy(on_, to, from, bytes);
    };
    WH_RETURN_IF_ERROR(take(local_->out.data(), tensors_.out, local_->out.size()));
    return take(local_->log_sum_exp.data(), tensors_.log_sum_exp,
                local_->log_sum_exp.size() * sizeof(float));
  }
  // The same of some rows of out alone: of GBs few are looked at.
  Status fetch(const SampledRows& sampled) const {
    return each_row(sampled, [&](std::byte* here, std::byte* there, size_t bytes) {
      return device().copy(on_, here, there, bytes);
    });
  }
  // Leaves NaN in them, which nobody may leave.
  Status poison(const SampledRows& sampled) const {
    for (const SampledRows::Row& row : sampled.rows) {
      std::fill_n(local_->out.data() + row.begin_bytes, row.size_bytes, std::byte{0xff});
    }
    return each_row(sampled, [&](std::byte* here, std::byte* there, size_t bytes) {
      return device().copy(on_, there, here, bytes);
    });
  }

 private:
  // Between `local` and the device.
  template <typename Visit>
  Status each_row(const SampledRows& sampled, const Visit& visit) const {
    if (device().is_host()) return {};
    for (const SampledRows::Row& row : sampled.rows) {
      WH_RETURN_IF_ERROR(visit(local_->out.data() + row.begin_bytes,
                               static_cast<std::byte*>(tensors_.out) + row.begin_bytes,
                               row.size_bytes));
    }
    return {};
  }
  RankOnDevice(Device device, int32_t device_index, LocalTensors& local)
      : device_(device), on_{device_index, nullptr}, local_(&local) {}
  const Backend& device() const { return backend(device_); }
  // Makes the pointer one to a copy on the device.
  template <typename Pointer>
  Status place(Pointer*& pointer, size_t bytes) {
    if (pointer == nullptr || bytes == 0) return {};
    Result<Workspace> memory = Workspace::allocate({device_, on_}, bytes);
    if (!memory.ok()) return memory.status();
    const void* from = pointer;
    pointer = static_cast<Pointer*>(memory->data());
    void* to = memory->data();
    memory_.push_back(std::move(*memory));
    return device().copy(on_, to, from, bytes);
  }

  Device device_;
  DeviceStream on_;
  LocalTensors* local_;
  Tensors tensors_;
  std::vector<Workspace> memory_;  // of the tensors
  std::optional<Workspace> workspace_;
};

}  // namespace wh::sharded
