// The fields of a problem, once: what each is called, what it may hold and where it lies. The
// conversion of the C struct, JSON both ways, the range checks and the command line's flags follow
// this list, so that a field more is a line here, beside the member of Problem and of wh_problem.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/names.h"
#include "core/problem.h"
#include "core/status.h"
#include "widehead/widehead.h"

namespace wh {

// "NAME is VALUE; it must be between LEAST and MOST"
Status check_range(const char* name, int64_t value, int64_t least, int64_t most);

// What a field may hold. check() takes what the C struct has as well as what Problem has.

template <typename Enum, size_t kCount>
struct Choice {
  const char* name;
  const char* json;  // its name there
  const Names<Enum, kCount>& values;

  constexpr Choice(const char* n, const char* j, const Names<Enum, kCount>& v)
      : name(n), json(j), values(v) {}
  template <typename Value>
  Status check(Value value) const {
    return check_range(name, static_cast<int64_t>(value), 0, int64_t{kCount} - 1);
  }
};

struct Whole {
  const char* name;
  int64_t least, most;

  Status check(int64_t value) const { return check_range(name, value, least, most); }
};

// An extent of the tensors, which their dense strides follow from.
struct Extent : Whole {};

struct Real {
  const char* name;
  float least;
  const char* valid;  // in words

  Status check(float value) const;
};

// Strides depend on the extents: validate() looks at them.
struct StridesOf {
  const char* name;

  Status check(const auto&) const { return {}; }
};

// Its name in JSON.
template <typename Field>
constexpr const char* json_name(const Field& field) {
  return field.name;
}
template <typename Enum, size_t kCount>
constexpr const char* json_name(const Choice<Enum, kCount>& field) {
  return field.json;
}

constexpr Whole kDeviceIndex{"device_index", 0, 1023};
constexpr Whole kWindowLeft{"window_left", kUnlimited, kMaxLength};
constexpr Whole kWindowRight{"window_right", kUnlimited, kMaxLength};

// Calls visit(what it may hold, its value in each of the problems) for every field that Problem and
// wh_problem have under one name; the problems are of either kind.
template <typename Visit, typename... Problems>
void visit_fields(Visit&& visit, Problems&... p) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  visit(Choice("device", "device", kDevices), p.device...);
  visit(kDeviceIndex, p.device_index...);
  visit(Choice("dtype_q", "dtype", kDtypes), p.dtype_q...);
  visit(Choice("dtype_kv", "kv_dtype", kDtypes), p.dtype_kv...);
  visit(Extent{"batch", 0, kMaxLength}, p.batch...);
  visit(Extent{"heads_q", 1, kMaxLength}, p.heads_q...);
  visit(Extent{"heads_kv", 1, kMaxLength}, p.heads_kv...);
  visit(Extent{"len_q", 0, kMaxLength}, p.len_q...);
  visit(Extent{"len_k", 0, kMaxLength}, p.len_k...);
  visit(Extent{"dim_qk", 1, kMaxDim}, p.dim_qk...);
  visit(Extent{"dim_v", 1, kMaxDim}, p.dim_v...);
  visit(StridesOf{"stride_q"}, p.stride_q...);
  visit(StridesOf{"stride_k"}, p.stride_k...);
  visit(StridesOf{"stride_v"}, p.stride_v...);
  visit(StridesOf{"stride_out"}, p.stride_out...);
  visit(StridesOf{"stride_mask"}, p.stride_mask...);
  visit(Real{"scale", kLowest, "finite"}, p.scale...);
  visit(Real{"softcap", 0, "positive, or 0 for none"}, p.softcap...);
  visit(Choice("causal", "causal", kCausals), p.causal...);
  visit(kWindowLeft, p.window_left...);
  visit(kWindowRight, p.window_right...);
  visit(Choice("mask", "mask", kMasks), p.mask...);
  visit(Choice("pass", "pass", kPasses), p.pass...);
  visit(StridesOf{"stride_d_out"}, p.stride_d_out...);
  visit(StridesOf{"stride_dq"}, p.stride_dq...);
  visit(StridesOf{"stride_dk"}, p.stride_dk...);
  visit(StridesOf{"stride_dv"}, p.stride_dv...);
  visit(Extent{"total_q", 0, kMaxLength}, p.total_q...);
  visit(Extent{"total_k", 0, kMaxLength}, p.total_k...);
  visit(Extent{"page_size", 0, kMaxLength}, p.page_size...);
  visit(Extent{"pages", 0, kMaxLength}, p.pages...);
  visit(Whole{"page_entries", 0, kMaxLength}, p.page_entries...);
  visit(Whole{"stride_page_table", 0, kMaxLength}, p.stride_page_table...);
  visit(Choice("query_layout", "query_layout", kQueryLayouts), p.query_layout...);
  visit(Choice("key_layout", "key_layout", kKeyLayouts), p.key_layout...);
  visit(Choice("quantised_k", "quantised_k", kQuantiseds), p.quantised_k...);
  visit(Choice("quantised_v", "quantised_v", kQuantiseds), p.quantised_v...);
  visit(Choice("scales_k", "scales_k", kScales), p.scales_k...);
  visit(Choice("scales_v", "scales_v", kScales), p.scales_v...);
  visit(StridesOf{"stride_scales_k"}, p.stride_scales_k...);
  visit(StridesOf{"stride_scales_v"}, p.stride_scales_v...);
}

// What a problem uses or not: a bit of wh_problem's `uses` each.
struct Use {
  const char* name;
  uint32_t bit;
  bool Problem::*field;
};
constexpr Use kUses[] = {{"sinks", WH_USES_SINKS, &Problem::has_sinks},
                         {"key_lengths", WH_USES_KEY_LENGTHS, &Problem::has_key_lengths},
                         {"key_starts", WH_USES_KEY_STARTS, &Problem::has_key_starts},
                         {"log_sum_exp", WH_USES_LOG_SUM_EXP, &Problem::wants_log_sum_exp},
                         {"values_in_keys", WH_USES_VALUES_IN_KEYS, &Problem::values_in_keys},
                         {"page_offsets", WH_USES_PAGE_OFFSETS, &Problem::has_page_offsets},
                         {"f32_out", WH_USES_F32_OUT, &Problem::f32_out}};

// The first field that is out of its range, of either kind of problem.
template <typename ProblemOrStruct>
Status check_fields(const ProblemOrStruct& p) {
  Status status;
  visit_fields(
      [&](const auto& field, const auto& value) {
        if (status.ok()) status = field.check(value);
      },
      p);
  return status;
}

// The same of the extents alone, for who has not set the rest yet.
template <typename ProblemOrStruct>
Status check_extents(const ProblemOrStruct& p) {
  Status status;
  visit_fields(
      [&]<typename Field>(const Field& field, const auto& value) {
        if constexpr (std::is_same_v<Field, Extent>) {
          if (status.ok()) status = field.check(value);
        }
      },
      p);
  return status;
}

}  // namespace wh
