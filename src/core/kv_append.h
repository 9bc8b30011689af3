// New keys and values on their way into caches: wh_append(), on whatever device has them.
#pragma once

#include <array>
#include <cstdint>

#include "core/kv_tensor.h"
#include "core/problem.h"
#include "core/status.h"

namespace wh {

// For host and device. K or V. A row is rounded to the cache's type or format, to nearest even.
struct AppendedRows {
  bool is_k;
  const void* rows;               // [tokens, heads_kv, dim]
  Dtype dtype;                    // of rows
  std::array<int64_t, 3> stride;  // of a token, a head and an element
  void* cache;                    // what `stored.data` points to
  float* scales;                  // and `stored.scales_data`: written where tokens have their own
  KvTensor stored;

  constexpr int64_t offset(int64_t token, int64_t head) const {
    return token * stride[0] + head * stride[1];
  }
  // Whether rows are copied bit by bit.
  constexpr bool is_copy() const {
    return stored.format == Quantised::kNone && stored.dtype == dtype;
  }
};

struct KvAppend {
  int64_t tokens, heads_kv;
  const int64_t* slots;  // [tokens]: of the storage's tokens, one after another; negative: none
  Storage storage;       // of the caches
  int32_t caches;        // 2, or 1 where values lie in keys
  std::array<AppendedRows, 2> of;

  constexpr int64_t slot_count() const { return storage.batch * storage.length; }
  // Where a slot's rows are. Scales that sequences have of their own are those of the batch entry,
  // and all sequences' where a slot does not say whose it is: check() sees to it.
  constexpr KvPlace place(int64_t slot, int64_t head) const {
    const int64_t batch_idx = slot / storage.length;
    return {batch_idx, head, slot % storage.length, batch_idx};
  }
};

// Of a problem that validate() accepts. Names the argument, its value and what would be valid.
Status check(const Problem& cache, const KvAppend& append);
// What lies where the device has it: of the host.
Status check_slots(const KvAppend& append);

}  // namespace wh
