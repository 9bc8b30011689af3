#include "core/kv_append.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "core/layout_checks.h"
#include "core/names.h"
#include "core/problem_fields.h"

namespace wh {
namespace {

// How the caller's struct calls what is K's or V's.
struct ArgumentNames {
  const char *cache, *rows, *stride_rows, *scales, *stride_scales;
};
const ArgumentNames& names_of(const AppendedRows& rows) {
  static constexpr ArgumentNames kOfK{"k", "new_k", "stride_new_k", "scales_k", "stride_scales_k"};
  static constexpr ArgumentNames kOfV{"v", "new_v", "stride_new_v", "scales_v", "stride_scales_v"};
  return rows.is_k ? kOfK : kOfV;
}

Extents extents_of_rows(const KvAppend& append, const AppendedRows& rows) {
  return {1, append.tokens, append.heads_kv, rows.stored.dim};
}

MemorySpan rows_span(const KvAppend& append, const AppendedRows& rows) {
  const Strides strides{0, rows.stride[0], rows.stride[1], rows.stride[2]};
  const auto element = static_cast<int64_t>(dtype_bytes(rows.dtype));
  return {names_of(rows).rows, rows.rows,
          span_elements(extents_of_rows(append, rows), strides) * element, element};
}

Status check_rows(const KvAppend& append, const AppendedRows& rows) {
  const char* const name = names_of(rows).stride_rows;
  const Extents extents = extents_of_rows(append, rows);
  for (size_t i = 0; i < 3; ++i) {  // numbered as the caller's struct has them
    if (!is_stepped_over(extents[i + 1]) || rows.stride[i] >= 0) continue;
    return invalid(fmt::format("{}[{}] is {}; strides are in elements and must not be negative",
                               name, i, rows.stride[i]));
  }
  return check_strides(name, extents, {0, rows.stride[0], rows.stride[1], rows.stride[2]});
}

// What is written: every element of the cache, and every token's scale, has a place of its own.
Status check_cache(const Problem& cache, const KvAppend& append, const AppendedRows& rows) {
  const KvTensor& stored = rows.stored;
  const Extents extents{append.storage.batch, append.heads_kv, append.storage.length, stored.dim};
  WH_RETURN_IF_ERROR(check_distinct(names_of(rows).cache, extents, stored.stride));
  const Extents of_scales = scales_extents(cache, stored.scales, stored.dim);
  switch (stored.scales) {
    case Scales::kNone:
    case Scales::kTensor:
      return {};
    case Scales::kTokenHead:
      return check_distinct(names_of(rows).scales, of_scales, stored.stride_scales);
    case Scales::kHead:
    case Scales::kChannel:
      if (cache.key_layout == KeyLayout::kDense || !is_stepped_over(of_scales[0]) ||
          stored.stride_scales[0] == 0) {
        return {};
      }
      return invalid(
          fmt::format("{}[0] is {}; it must be 0 where keys are {}, as a slot does "
                      "not say whose it is",
                      names_of(rows).stride_scales, stored.stride_scales[0],
                      kKeyLayouts.name(cache.key_layout)));
  }
  __builtin_unreachable();
}

}  // namespace

Status check(const Problem& cache, const KvAppend& append) {
  WH_RETURN_IF_ERROR(check_range("tokens", append.tokens, 0, kMaxLength));
  std::vector<MemorySpan> read, written;
  const TensorBytes bytes = tensor_bytes(cache);
  read.push_back({"slots", append.slots, append.tokens * 8, 8});
  for (int32_t i = 0; i < append.caches; ++i) {
    const AppendedRows& rows = append.of[i];
    WH_RETURN_IF_ERROR(check_rows(append, rows));
    WH_RETURN_IF_ERROR(check_cache(cache, append, rows));
    read.push_back(rows_span(append, rows));
    written.push_back({names_of(rows).cache, rows.cache, rows.is_k ? bytes.k : bytes.v,
                       stored_alignment(rows.stored.format, rows.stored.dtype)});
    if (rows.stored.scales == Scales::kNone) continue;
    const MemorySpan scales{names_of(rows).scales, rows.scales,
                            rows.is_k ? bytes.scales_k : bytes.scales_v, 4};
    (rows.stored.scales == Scales::kTokenHead ? written : read).push_back(scales);
  }
  if (append.tokens == 0) return {};
  for (const auto* spans : {&read, &written}) {
    for (const MemorySpan& span : *spans) {
      if (span.bytes > 0 && span.data == nullptr) {
        return invalid(fmt::format("{} is null; it must point to {} bytes", span.name, span.bytes));
      }
      WH_RETURN_IF_ERROR(check_alignment(span));
    }
  }
  // K and V, and scales beside codes, may share an allocation: whether one's rows lie between the
  // other's is the caller's to know.
  for (const MemorySpan& to : written) {
    for (const MemorySpan& from : read) WH_RETURN_IF_ERROR(check_apart(to, from));
  }
  return {};
}

Status check_slots(const KvAppend& append) {
  const int64_t most = append.slot_count() - 1;
  bool ascends = true;
  int64_t last = -1;
  for (int64_t i = 0; i < append.tokens; ++i) {
    const int64_t slot = append.slots[i];
    if (slot < 0) continue;
    if (slot > most) {
      return invalid(fmt::format(
          "slots[{}] is {}; it must be between 0 and {}, or negative for a token to skip", i, slot,
          most));
    }
    ascends = ascends && slot > last;
    last = slot;
  }
  if (ascends) return {};
  // Tokens of one slot would be written by several workers at once.
  std::vector<int64_t> sorted(append.slots, append.slots + append.tokens);
  std::sort(sorted.begin(), sorted.end());
  const auto used = std::lower_bound(sorted.begin(), sorted.end(), 0);
  const auto twice = std::adjacent_find(used, sorted.end());
  if (twice == sorted.end()) return {};
  const auto first = std::find(append.slots, append.slots + append.tokens, *twice);
  const auto second = std::find(first + 1, append.slots + append.tokens, *twice);
  return invalid(
      fmt::format("slots[{}] is {}, as is slots[{}]; tokens must have slots of their own",
                  second - append.slots, *twice, first - append.slots));
}

}  // namespace wh
