#include "cpu/common/append.h"

#include <cstddef>
#include <cstring>

#include "core/element.h"
#include "core/quantised.h"

namespace wh::cpu {
namespace {

// `count` elements of so many bytes, strides in elements.
void copy_elements(std::byte* to, int64_t stride_to, const std::byte* from, int64_t stride_from,
                   int64_t count, int64_t element_bytes) {
  if (stride_to == 1 && stride_from == 1) {
    std::memcpy(to, from, static_cast<size_t>(count * element_bytes));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(to + i * stride_to * element_bytes, from + i * stride_from * element_bytes,
                static_cast<size_t>(element_bytes));
  }
}

// Rounds a row to what the cache holds, side by side, and stores the scale of a row that has its
// own.
void round_row(const float* row, const AppendedRows& rows, const KvPlace& at, std::byte* to) {
  const KvTensor& stored = rows.stored;
  if (stored.format == Quantised::kNone) {
    with_element_type(stored.dtype, [&]<typename T>(T) {
      for (int64_t d = 0; d < stored.dim; ++d) reinterpret_cast<T*>(to)[d] = from_float<T>(row[d]);
    });
    return;
  }
  constexpr float kOne = 1;
  const float* scales = &kOne;
  int64_t step = 0;
  if (stored.scales != Scales::kNone) {
    float* const own = rows.scales + stored.scale_offset(at);
    if (stored.scales == Scales::kTokenHead) *own = scale_of_row(row, stored.dim, stored.format);
    if (stored.scales == Scales::kChannel) step = stored.stride_scales[3];
    scales = own;
  }
  quantise_row(row, stored.dim, stored.format, scales, step, to);
}

void append_row(const AppendedRows& rows, int64_t token, const KvPlace& at) {
  const KvTensor& stored = rows.stored;
  std::byte* const to = static_cast<std::byte*>(rows.cache) + stored.bytes(stored.offset(at));
  const int64_t first = rows.offset(token, at.head_kv);
  if (rows.is_copy()) {
    const auto bytes = static_cast<int64_t>(dtype_bytes(rows.dtype));
    copy_elements(to, stored.stride[3], static_cast<const std::byte*>(rows.rows) + first * bytes,
                  rows.stride[2], stored.dim, bytes);
    return;
  }
  float row[kMaxDim];
  with_element_type(rows.dtype, [&]<typename T>(T) {
    const T* from = static_cast<const T*>(rows.rows) + first;
    for (int64_t d = 0; d < stored.dim; ++d) row[d] = to_float(from[d * rows.stride[2]]);
  });
  if (stored.stride[3] == 1) {
    round_row(row, rows, at, to);
    return;
  }
  alignas(float) std::byte rounded[kMaxDim * sizeof(float)];
  round_row(row, rows, at, rounded);
  copy_elements(to, stored.stride[3], rounded, 1, stored.dim, stored.bytes(1));
}

}  // namespace

void append_tokens(const KvAppend& append, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t slot = append.slots[token];
    if (slot < 0) continue;
    for (int32_t cache = 0; cache < append.caches; ++cache) {
      for (int64_t head = 0; head < append.heads_kv; ++head) {
        append_row(append.of[cache], token, append.place(slot, head));
      }
    }
  }
}

}  // namespace wh::cpu
