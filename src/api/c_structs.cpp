#include "api/c_structs.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "api/environment.h"

namespace wh {
namespace {

template <typename Enum>
Status read_enum(const char* name, int32_t value, int32_t last, Enum& to) {
  if (value < 0 || value > last) {
    return invalid(fmt::format("{} is {}; it must be between 0 and {}", name, value, last));
  }
  to = static_cast<Enum>(value);
  return {};
}

struct Use {
  uint32_t bit;
  bool Problem::*field;
};
constexpr Use kUses[] = {{WH_USES_SINKS, &Problem::has_sinks},
                         {WH_USES_KEY_LENGTHS, &Problem::has_key_lengths},
                         {WH_USES_KEY_STARTS, &Problem::has_key_starts},
                         {WH_USES_LOG_SUM_EXP, &Problem::wants_log_sum_exp},
                         {WH_USES_VALUES_IN_KEYS, &Problem::values_in_keys}};

// What wh_problem and Problem both hold under one name, whichever way it goes.
template <typename From, typename To>
void copy_fields(const From& from, To& to) {
  to.device_index = from.device_index;
  to.batch = from.batch;
  to.heads_q = from.heads_q;
  to.heads_kv = from.heads_kv;
  to.len_q = from.len_q;
  to.len_k = from.len_k;
  to.dim_qk = from.dim_qk;
  to.dim_v = from.dim_v;
  std::copy_n(std::begin(from.stride_q), 4, std::begin(to.stride_q));
  std::copy_n(std::begin(from.stride_k), 4, std::begin(to.stride_k));
  std::copy_n(std::begin(from.stride_v), 4, std::begin(to.stride_v));
  std::copy_n(std::begin(from.stride_out), 4, std::begin(to.stride_out));
  std::copy_n(std::begin(from.stride_mask), 4, std::begin(to.stride_mask));
  to.scale = from.scale;
  to.softcap = from.softcap;
  to.window_left = from.window_left;
  to.window_right = from.window_right;
}

}  // namespace

// Sizes are those of 0.1.0 on a 64-bit system.
const SizedStruct<wh_problem>& problem_struct() {
  static const SizedStruct<wh_problem> sized = [] {
    wh_problem defaults{};
    defaults.batch = 1;
    defaults.heads_q = defaults.heads_kv = 1;
    defaults.window_left = defaults.window_right = WH_UNLIMITED;
    return SizedStruct<wh_problem>{"problem", 280, defaults};
  }();
  return sized;
}

const SizedStruct<wh_limits>& limits_struct() {
  static const SizedStruct<wh_limits> sized = [] {
    const Limits core;
    wh_limits defaults{};
    defaults.workspace_bytes = core.workspace_bytes;
    defaults.fused_above = core.fused_above;
    defaults.fresh_keys = core.fresh_keys;
    return SizedStruct<wh_limits>{"limits", 72, defaults};
  }();
  return sized;
}

static_assert(sizeof(wh_problem) >= 280 && sizeof(wh_limits) >= 72 &&
              sizeof(wh_tensors) >= kTensorsStruct.first_bytes &&
              sizeof(wh_run_options) >= kRunOptionsStruct.first_bytes);

Status read_problem(const wh_problem* from, Problem& to) {
  wh_problem c{};
  WH_RETURN_IF_ERROR(read_sized(problem_struct(), from, c));
  WH_RETURN_IF_ERROR(read_enum("device", c.device, WH_CUDA, to.device));
  WH_RETURN_IF_ERROR(read_enum("dtype_q", c.dtype_q, WH_BF16, to.dtype_q));
  WH_RETURN_IF_ERROR(read_enum("dtype_kv", c.dtype_kv, WH_BF16, to.dtype_kv));
  WH_RETURN_IF_ERROR(read_enum("causal", c.causal, WH_CAUSAL_TOP_LEFT, to.causal));
  WH_RETURN_IF_ERROR(read_enum("mask", c.mask, WH_MASK_ADDITIVE, to.mask));
  uint32_t known = 0;
  for (const Use& use : kUses) {
    known |= use.bit;
    to.*use.field = (c.uses & use.bit) != 0;
  }
  if ((c.uses & ~known) != 0) {
    return invalid(fmt::format("uses is {:#x}; valid: combinations of {:#x}", c.uses, known));
  }
  copy_fields(c, to);
  WH_RETURN_IF_ERROR(validate(to));
  to = canonical(to);  // two that are equal must not differ
  return {};
}

wh_problem problem_of(const Problem& p) {
  wh_problem c{};
  c.device = static_cast<int32_t>(p.device);
  c.dtype_q = static_cast<int32_t>(p.dtype_q);
  c.dtype_kv = static_cast<int32_t>(p.dtype_kv);
  c.causal = static_cast<int32_t>(p.causal);
  c.mask = static_cast<int32_t>(p.mask);
  for (const Use& use : kUses) {
    if (p.*use.field) c.uses |= use.bit;
  }
  copy_fields(p, c);
  return c;
}

Status read_limits(const wh_limits* from, Device device, Limits& to) {
  if (from != nullptr) {
    wh_limits c{};
    WH_RETURN_IF_ERROR(read_sized(limits_struct(), from, c));
    WH_RETURN_IF_ERROR(read_enum("limits.policy", c.policy, WH_FUSED_ABOVE, to.policy));
    WH_RETURN_IF_ERROR(read_enum("limits.precision", c.precision, WH_HIGH, to.precision));
    WH_RETURN_IF_ERROR(
        read_enum("limits.batch_invariant", c.batch_invariant, 1, to.batch_invariant));
    to.workspace_bytes = c.workspace_bytes;
    to.longest_step_us = c.longest_step_us;
    to.fused_above = c.fused_above;
    to.threads = c.threads;
    to.fresh_keys = c.fresh_keys;
    if (c.kernel != nullptr) to.kernel = c.kernel;
  }
  return apply(environment(), device, to);
}

Status read_tensors(const wh_tensors* from, Tensors& to) {
  wh_tensors c{};
  WH_RETURN_IF_ERROR(read_sized(kTensorsStruct, from, c));
  to = {c.q,           c.k,          c.v,           c.out,       c.mask,           c.sinks,
        c.key_lengths, c.key_starts, c.log_sum_exp, c.workspace, c.workspace_bytes};
  return {};
}

Status read_run_options(const wh_run_options* from, RunOptions& to) {
  if (from == nullptr) return {};
  wh_run_options c{};
  WH_RETURN_IF_ERROR(read_sized(kRunOptionsStruct, from, c));
  to.stream = c.stream;
  to.progress = c.progress;
  to.progress_context = c.progress_context;
  if (c.executor != nullptr) {
    if (c.executor->parallel == nullptr) {
      return invalid("run_options.executor.parallel is null; it must run count tasks");
    }
    to.executor = {c.executor->parallel, c.executor->context};
  }
  return {};
}

}  // namespace wh
