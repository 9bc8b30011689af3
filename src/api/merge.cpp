#include "api/merge.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/layout_checks.h"
#include "core/names.h"
#include "core/problem_fields.h"
#include "plan/backend.h"

namespace wh {
namespace {

Strides strides_of(const int64_t (&from)[4]) { return {from[0], from[1], from[2], from[3]}; }
// A log-sum-exp is a tensor of one column.
Strides strides_of(const int64_t (&from)[3]) { return {from[0], from[1], from[2], 1}; }

// A tensor of the call: what is checked of all of them alike.
struct Argument {
  std::string name;  // "parts[2].out"
  const void* data;
  Dtype dtype;
  Extents extents;
  Strides strides;

  int64_t bytes() const {
    return span_elements(extents, strides) * static_cast<int64_t>(dtype_bytes(dtype));
  }
  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(data); }
  bool overlaps(const Argument& other) const {
    return begin() < other.begin() + static_cast<uintptr_t>(other.bytes()) &&
           other.begin() < begin() + static_cast<uintptr_t>(bytes());
  }
  // Whether every element lies where the other's does.
  bool is(const Argument& other) const {
    if (data != other.data || dtype != other.dtype) return false;
    for (size_t i = 0; i < 4; ++i) {
      if (is_stepped_over(extents[i]) && strides[i] != other.strides[i]) return false;
    }
    return true;
  }
};

Status check(const Argument& tensor) {
  std::string strides = tensor.name;
  strides.insert(strides.rfind('.') + 1, "stride_");  // "parts[2].stride_out"
  WH_RETURN_IF_ERROR(check_strides(strides.c_str(), tensor.extents, tensor.strides));
  if (tensor.data == nullptr) return invalid(fmt::format("{} is null", tensor.name));
  const size_t element = dtype_bytes(tensor.dtype);
  if (tensor.begin() % element != 0) {
    return invalid(fmt::format("{} is at {}; it must be aligned to its elements of {} bytes",
                               tensor.name, tensor.data, element));
  }
  return {};
}

Status check_apart(const Argument& written, const Argument& other) {
  if (!written.overlaps(other)) return {};
  return invalid(fmt::format(
      "{} overlaps {} ({} bytes at {}; {} at {}); what is written must be a part's own tensor, of "
      "the same type and strides, or share no memory with it",
      written.name, other.name, written.bytes(), written.data, other.bytes(), other.data));
}

Status check_dtype(const std::string& name, int32_t dtype) {
  return check_range(name.c_str(), dtype, WH_F32, WH_BF16);
}

}  // namespace

Status merge(const wh_merged& merged, std::span<const wh_partial> parts,
             const RunOptions& options) {
  WH_RETURN_IF_ERROR(check_range("merged.device", merged.device, WH_CPU, WH_CUDA));
  WH_RETURN_IF_ERROR(kDeviceIndex.check(merged.device_index));
  const Backend& device = backend(static_cast<Device>(merged.device));
  WH_RETURN_IF_ERROR(check_dtype("merged.dtype", merged.dtype));
  WH_RETURN_IF_ERROR(check_range("batch", merged.batch, 0, kMaxLength));
  WH_RETURN_IF_ERROR(check_range("heads_q", merged.heads_q, 1, kMaxLength));
  WH_RETURN_IF_ERROR(check_range("len_q", merged.len_q, 0, kMaxLength));
  WH_RETURN_IF_ERROR(check_range("dim_v", merged.dim_v, 1, kMaxDim));
  if (merged.batch == 0 || merged.len_q == 0) return {};
  const Extents of_out{merged.batch, merged.heads_q, merged.len_q, merged.dim_v};
  const Extents of_lse{merged.batch, merged.heads_q, merged.len_q, 1};
  const Argument out{"out", merged.out, static_cast<Dtype>(merged.dtype), of_out,
                     strides_of(merged.stride_out)};
  const Argument lse{"log_sum_exp", merged.log_sum_exp, Dtype::kF32, of_lse,
                     strides_of(merged.stride_log_sum_exp)};
  const Argument sinks{"sinks", merged.sinks, Dtype::kF32, {1, 1, 1, merged.heads_q}, {0, 0, 0, 1}};
  std::vector<const Argument*> written{&out};
  if (merged.log_sum_exp != nullptr) written.push_back(&lse);
  for (const Argument* each : written) {
    WH_RETURN_IF_ERROR(check(*each));
    WH_RETURN_IF_ERROR(check_distinct(each->name.c_str(), each->extents, each->strides));
  }
  if (written.size() == 2) WH_RETURN_IF_ERROR(check_apart(out, lse));
  if (merged.sinks != nullptr) {
    WH_RETURN_IF_ERROR(check(sinks));
    for (const Argument* each : written) WH_RETURN_IF_ERROR(check_apart(*each, sinks));
  }
  std::vector<OutputPart> read;
  for (size_t i = 0; i < parts.size(); ++i) {
    const wh_partial& part = parts[i];
    const std::string name = fmt::format("parts[{}]", i);
    WH_RETURN_IF_ERROR(check_dtype(name + ".dtype", part.dtype));
    const Argument part_out{name + ".out", part.out, static_cast<Dtype>(part.dtype), of_out,
                            strides_of(part.stride_out)};
    const Argument part_lse{name + ".log_sum_exp", part.log_sum_exp, Dtype::kF32, of_lse,
                            strides_of(part.stride_log_sum_exp)};
    for (const Argument* argument : {&part_out, &part_lse}) {
      WH_RETURN_IF_ERROR(check(*argument));
      for (const Argument* each : written) {
        // In place: a row is read whole before it is written.
        const bool is_own = each == (argument == &part_out ? &out : &lse);
        if (!is_own || !each->is(*argument)) WH_RETURN_IF_ERROR(check_apart(*each, *argument));
      }
    }
    const auto& steps = part.stride_log_sum_exp;
    read.push_back({part.out,
                    part.log_sum_exp,
                    part_out.dtype,
                    part_out.strides,
                    {steps[0], steps[1], steps[2]}});
  }
  const auto& steps = merged.stride_log_sum_exp;
  const OutputMerge work{of_out,
                         out.dtype,
                         merged.out,
                         out.strides,
                         merged.log_sum_exp,
                         {steps[0], steps[1], steps[2]},
                         merged.sinks,
                         read};
  return device.merge(work, options.executor, {merged.device_index, options.stream});
}

}  // namespace wh
