// How keys of a tile come by TMA: in one box where they lie side by side, in boxes of as many rows
// as no page ends in where they are paged. Of dense tensors nothing is left of this in the code.
//
// A lone thread asks for dense keys, a warp for others: each lane knows where a box of the tile
// lies and asks for it. One thread that went from box to box took 0.1 us for each, looking up its
// page and moving its coordinates to uniform registers: pages of any size made sm90_prefill's tiles
// of 80 keys, 5 boxes of 16 rows for each panel, take 2.24 times as long as dense ones.
#pragma once

#include <cstdint>

#include "cuda/common/key_range.h"
#include "cuda/common/packed_rows.h"

namespace wh::cuda {

// Those who ask, a thread or a warp: what one of them does for all, and where they meet.
template <Layouts kLayouts>
struct Producers {
  static constexpr int kThreads = kLayouts == Layouts::kDense ? 1 : 32;

  static __device__ __forceinline__ bool is_leader() {
    return kThreads == 1 || threadIdx.x % 32 == 0;
  }
  // Also after all have waited for a slot, before the leader expects its bytes: one of which no row
  // is asked for is then full at once, and would be free again before the last had looked.
  static __device__ __forceinline__ void meet() {
    if constexpr (kThreads > 1) __syncwarp();
  }
};

template <Layouts kLayouts>
struct KeyBoxes {
  static constexpr bool kIsDense = kLayouts == Layouts::kDense;

  const AttentionArgs& args;
  int32_t box_keys_log2;  // of pages
  // Of packed keys the sequence's first token, of others its batch index: one register of the few
  // that producer threads have.
  int32_t origin;

  __device__ __forceinline__ KeyBoxes(const AttentionArgs& args, int32_t box_keys_log2,
                                      const Sequence& sequence)
      : args(args),
        box_keys_log2(box_keys_log2),
        origin(!kIsDense && args.key_offsets != nullptr ? sequence.first_key : sequence.key_batch) {
  }

  // How many of the keys [key, key + kRows) are copied, whole boxes. Those past the sequence's end
  // are not asked for: their pages may not be.
  template <int kRows>
  __device__ __forceinline__ int32_t count(int32_t key) const {
    if (kIsDense || args.page_table.entries == nullptr) return kRows;
    const int32_t last = (1 << box_keys_log2) - 1;
    const int32_t end =
        present_keys<int32_t>(args.len_k, args.key_lengths, nullptr, opaque_origin()).end;
    return (clamp_to(end - key, 0, kRows) + last) & ~last;
  }

  // copy(row, token, batch): one box, to that row of the tile, from K's third and first index on.
  // `rows` is their count().
  template <int kRows, typename Copy>
  __device__ __forceinline__ void copy_each(int32_t key, int32_t rows, Copy copy) const {
    static_assert(kRows <= 32 * 8, "a lane has a box");
    if (kIsDense || args.page_table.entries == nullptr) {
      const bool is_packed = !kIsDense && args.key_offsets != nullptr;
      if (Producers<kLayouts>::is_leader()) {
        copy(0, is_packed ? origin + key : key, is_packed ? 0 : origin);
      }
      return;
    }
    const int32_t row = threadIdx.x % 32 << box_keys_log2;
    if (row >= rows) return;
    const int32_t page = (key + row) / args.page_size;
    copy(row, key + row - page * static_cast<int32_t>(args.page_size),
         args.page_table.of(opaque_origin())[page]);
  }

 private:
  // Where the sequence's length and pages are is found again for each tile, for the same reason.
  __device__ __forceinline__ int32_t opaque_origin() const {
    int32_t batch_idx = origin;
    asm volatile("" : "+r"(batch_idx));
    return batch_idx;
  }
};

}  // namespace wh::cuda
