#include "api/c_structs.h"

#include <fmt/format.h>

#include <algorithm>

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
  constexpr uint32_t kKnown = WH_USES_SINKS | WH_USES_KEY_LENGTHS | WH_USES_KEY_STARTS |
                              WH_USES_LOG_SUM_EXP | WH_USES_VALUES_IN_KEYS;
  if ((c.uses & ~kKnown) != 0) {
    return invalid(fmt::format("uses is {:#x}; valid: combinations of {:#x}", c.uses, kKnown));
  }
  to.device_index = c.device_index;
  to.batch = c.batch;
  to.heads_q = c.heads_q;
  to.heads_kv = c.heads_kv;
  to.len_q = c.len_q;
  to.len_k = c.len_k;
  to.dim_qk = c.dim_qk;
  to.dim_v = c.dim_v;
  std::copy_n(c.stride_q, 4, to.stride_q.begin());
  std::copy_n(c.stride_k, 4, to.stride_k.begin());
  std::copy_n(c.stride_v, 4, to.stride_v.begin());
  std::copy_n(c.stride_out, 4, to.stride_out.begin());
  // Without a mask its strides mean nothing, and must not make two equal problems differ.
  if (to.mask != MaskKind::kNone) std::copy_n(c.stride_mask, 4, to.stride_mask.begin());
  to.scale = c.scale;
  to.softcap = c.softcap;
  to.window_left = c.window_left;
  to.window_right = c.window_right;
  to.has_sinks = (c.uses & WH_USES_SINKS) != 0;
  to.has_key_lengths = (c.uses & WH_USES_KEY_LENGTHS) != 0;
  to.has_key_starts = (c.uses & WH_USES_KEY_STARTS) != 0;
  to.wants_log_sum_exp = (c.uses & WH_USES_LOG_SUM_EXP) != 0;
  to.values_in_keys = (c.uses & WH_USES_VALUES_IN_KEYS) != 0;
  return validate(to);
}

wh_problem problem_of(const Problem& p) {
  wh_problem c{};
  c.device = static_cast<int32_t>(p.device);
  c.device_index = p.device_index;
  c.dtype_q = static_cast<int32_t>(p.dtype_q);
  c.dtype_kv = static_cast<int32_t>(p.dtype_kv);
  c.batch = p.batch;
  c.heads_q = p.heads_q;
  c.heads_kv = p.heads_kv;
  c.len_q = p.len_q;
  c.len_k = p.len_k;
  c.dim_qk = p.dim_qk;
  c.dim_v = p.dim_v;
  std::copy_n(p.stride_q.begin(), 4, c.stride_q);
  std::copy_n(p.stride_k.begin(), 4, c.stride_k);
  std::copy_n(p.stride_v.begin(), 4, c.stride_v);
  std::copy_n(p.stride_out.begin(), 4, c.stride_out);
  std::copy_n(p.stride_mask.begin(), 4, c.stride_mask);
  c.scale = p.scale;
  c.softcap = p.softcap;
  c.causal = static_cast<int32_t>(p.causal);
  c.mask = static_cast<int32_t>(p.mask);
  c.window_left = p.window_left;
  c.window_right = p.window_right;
  if (p.has_sinks) c.uses |= WH_USES_SINKS;
  if (p.has_key_lengths) c.uses |= WH_USES_KEY_LENGTHS;
  if (p.has_key_starts) c.uses |= WH_USES_KEY_STARTS;
  if (p.wants_log_sum_exp) c.uses |= WH_USES_LOG_SUM_EXP;
  if (p.values_in_keys) c.uses |= WH_USES_VALUES_IN_KEYS;
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
