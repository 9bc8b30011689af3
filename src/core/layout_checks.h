// What strides may be, for every tensor that a caller describes.
#pragma once

#include <array>
#include <cstdint>

#include "core/problem.h"
#include "core/status.h"

namespace wh {

using Extents = std::array<int64_t, 4>;

// One element is not stepped over, and neither is none.
constexpr bool is_stepped_over(int64_t extent) { return extent > 1; }

// Number of elements between the lowest and the highest address, or -1 on overflow.
int64_t span_elements(const Extents& extents, const Strides& strides);
// Not negative where they are stepped over, and within 64 bits.
Status check_strides(const char* name, const Extents& extents, const Strides& strides);
// Two different elements of what a run writes must not share an address.
Status check_distinct(const char* name, const Extents& extents, const Strides& strides);

// Where a tensor lies.
struct MemorySpan {
  const char* name;
  const void* data;
  int64_t bytes;
  int64_t element_bytes;  // what its address must be a multiple of; 0: anything
};
Status check_alignment(const MemorySpan& span);
// What is written shares no memory with another tensor.
Status check_apart(const MemorySpan& written, const MemorySpan& other);

}  // namespace wh
