#include "api/c_structs.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "api/environment.h"
#include "core/problem_fields.h"

namespace wh {
namespace {

// The enums count alike on both sides.
static_assert(WH_CUDA == static_cast<int>(Device::kCuda) &&
              WH_BF16 == static_cast<int>(Dtype::kBf16) &&
              WH_CAUSAL_TOP_LEFT == static_cast<int>(Causal::kTopLeft) &&
              WH_MASK_ADDITIVE == static_cast<int>(MaskKind::kAdditiveQ) &&
              WH_QUERIES_PACKED == static_cast<int>(QueryLayout::kPacked) &&
              WH_KEYS_PAGED == static_cast<int>(KeyLayout::kPaged) &&
              WH_Q4_0 == static_cast<int>(Quantised::kQ4_0) &&
              WH_SCALES_CHANNEL == static_cast<int>(Scales::kChannel));

template <typename Enum>
Status read_enum(const char* name, int32_t value, int32_t last, Enum& to) {
  if (value < 0 || value > last) {
    return invalid(fmt::format("{} is {}; it must be between 0 and {}", name, value, last));
  }
  to = static_cast<Enum>(value);
  return {};
}

// Integers of the C struct become enums only once they are known to be one's.
template <typename Enum, size_t kCount>
Status copy_field(const Choice<Enum, kCount>& field, int32_t from, Enum& to) {
  WH_RETURN_IF_ERROR(field.check(from));
  to = static_cast<Enum>(from);
  return {};
}
template <typename Enum, size_t kCount>
Status copy_field(const Choice<Enum, kCount>&, Enum from, int32_t& to) {
  to = static_cast<int32_t>(from);
  return {};
}
template <typename From, typename To>
Status copy_field(const StridesOf&, const From& from, To& to) {
  std::copy(std::begin(from), std::end(from), std::begin(to));
  return {};
}
template <typename Field, typename Value>
Status copy_field(const Field&, Value from, Value& to) {
  to = from;
  return {};
}

// From the C struct to the core's, or the other way, which cannot fail.
template <typename From, typename To>
Status copy_fields(const From& from, To& to) {
  Status status;
  visit_fields(
      [&](const auto& field, const auto& value, auto& target) {
        if (status.ok()) status = copy_field(field, value, target);
      },
      from, to);
  return status;
}

}  // namespace

// Sizes are those of 0.1.0 on a 64-bit system.
const SizedStruct<wh_problem>& problem_struct() {
  static const SizedStruct<wh_problem> sized{"problem", 280, problem_of(Problem{})};
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

namespace {

// Answers with the bits that are known.
uint32_t read_uses(uint32_t uses, Problem& to) {
  uint32_t known = 0;
  for (const Use& use : kUses) {
    known |= use.bit;
    to.*use.field = (uses & use.bit) != 0;
  }
  return known;
}

}  // namespace

Status read_layout(const wh_problem& from, Problem& to) {
  WH_RETURN_IF_ERROR(copy_fields(from, to));
  read_uses(from.uses, to);
  return to.key_layout != KeyLayout::kPaged ? Status()
                                            : check_range("page_size", to.page_size, 1, kMaxLength);
}

Status read_problem(const wh_problem* from, Problem& to) {
  wh_problem c{};
  WH_RETURN_IF_ERROR(read_sized(problem_struct(), from, c));
  WH_RETURN_IF_ERROR(copy_fields(c, to));
  const uint32_t known = read_uses(c.uses, to);
  if ((c.uses & ~known) != 0) {
    return invalid(fmt::format("uses is {:#x}; valid: combinations of {:#x}", c.uses, known));
  }
  WH_RETURN_IF_ERROR(validate(to));
  to = canonical(to);  // two that are equal must not differ
  return {};
}

wh_problem problem_of(const Problem& p) {
  wh_problem c{};
  (void)copy_fields(p, c);
  for (const Use& use : kUses) {
    if (p.*use.field) c.uses |= use.bit;
  }
  return c;
}

Status read_limits(const wh_limits* from, const Problem& problem, Limits& to) {
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
  return apply(environment(), problem, to);
}

Status read_tensors(const wh_tensors* from, Tensors& to) {
  wh_tensors c{};
  WH_RETURN_IF_ERROR(read_sized(kTensorsStruct, from, c));
  to = {.q = c.q,
        .k = c.k,
        .v = c.v,
        .out = c.out,
        .mask = c.mask,
        .sinks = c.sinks,
        .key_lengths = c.key_lengths,
        .key_starts = c.key_starts,
        .log_sum_exp = c.log_sum_exp,
        .d_out = c.d_out,
        .dq = c.dq,
        .dk = c.dk,
        .dv = c.dv,
        .d_sinks = c.d_sinks,
        .query_offsets = c.query_offsets,
        .key_offsets = c.key_offsets,
        .page_table = c.page_table,
        .page_offsets = c.page_offsets,
        .batch = c.batch,
        .total_q = c.total_q,
        .scales_k = c.scales_k,
        .scales_v = c.scales_v,
        .workspace = c.workspace,
        .workspace_bytes = c.workspace_bytes};
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
