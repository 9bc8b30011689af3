#include "core/layout_checks.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <string>

namespace wh {

int64_t span_elements(const Extents& extents, const Strides& strides) {
  __int128 span = 1;
  for (int i = 0; i < 4; ++i) {
    if (extents[i] == 0) return 0;
    span += static_cast<__int128>(extents[i] - 1) * strides[i];
  }
  constexpr __int128 kLimit = std::numeric_limits<int64_t>::max() / 16;
  return span > kLimit ? -1 : static_cast<int64_t>(span);
}

Status check_strides(const char* name, const Extents& extents, const Strides& strides) {
  for (int i = 0; i < 4; ++i) {
    if (is_stepped_over(extents[i]) && strides[i] < 0) {
      return invalid(fmt::format("{}[{}] is {}; strides are in elements and must not be negative",
                                 name, i, strides[i]));
    }
  }
  if (span_elements(extents, strides) < 0) {
    return invalid(fmt::format("{} spans more elements than a 64-bit byte offset can reach", name));
  }
  return {};
}

// Sorted by stride, each dimension must step over everything below it.
Status check_distinct(const char* name, const Extents& extents, const Strides& strides) {
  if (std::find(extents.begin(), extents.end(), 0) != extents.end()) return {};
  std::array<int, 4> order{0, 1, 2, 3};
  std::sort(order.begin(), order.end(), [&](int a, int b) { return strides[a] < strides[b]; });
  int64_t reach = 0;
  for (int i : order) {
    if (!is_stepped_over(extents[i])) continue;
    if (strides[i] <= reach) {
      return invalid(
          fmt::format("stride_{}[{}] is {}; elements of {} would overlap, it must be at least {}",
                      name, i, strides[i], name, reach + 1));
    }
    reach += (extents[i] - 1) * strides[i];
  }
  return {};
}

Status check_alignment(const MemorySpan& span) {
  if (span.element_bytes == 0) return {};
  if (reinterpret_cast<uintptr_t>(span.data) % static_cast<uintptr_t>(span.element_bytes) == 0) {
    return {};
  }
  return invalid(fmt::format("{} is at {}; it must be aligned to its elements of {} bytes",
                             span.name, span.data, span.element_bytes));
}

namespace {

bool overlap(const MemorySpan& a, const MemorySpan& b) {
  if (a.data == nullptr || b.data == nullptr || a.bytes == 0 || b.bytes == 0) return false;
  const auto begin_a = reinterpret_cast<uintptr_t>(a.data);
  const auto begin_b = reinterpret_cast<uintptr_t>(b.data);
  return begin_a < begin_b + b.bytes && begin_b < begin_a + a.bytes;
}

std::string place(const MemorySpan& span) {
  return fmt::format("{}, {} bytes at {}", span.name, span.bytes, span.data);
}

}  // namespace

Status check_apart(const MemorySpan& written, const MemorySpan& other) {
  if (!overlap(written, other)) return {};
  return invalid(
      fmt::format("{} overlaps {} ({}; {}); what a run writes must share no memory with "
                  "another tensor",
                  written.name, other.name, place(written), place(other)));
}

}  // namespace wh
