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

// Where a lane's box of a tile of keys lies, as TMA is told: from K's third and first index on. Of
// dense keys the tile's first key says it all.
template <Layouts kLayouts>
struct BoxPlace {
  int32_t token, batch_idx;  // negative token: the lane has no box
};
template <>
struct BoxPlace<Layouts::kDense> {};

// Whoever walks over tiles finds the boxes of each once, for K and V, and a tile ahead: the length,
// where the sequence's pages are and the page are some 500 clocks of reads that wait for each
// other. Found anew for each of a tile's eight copies, sm90_prefill_wide took 1.94 times as long
// over pages as over dense keys.
template <Layouts kLayouts>
struct KeyBoxes {
  static constexpr bool kIsDense = kLayouts == Layouts::kDense;
  using Place = BoxPlace<kLayouts>;

  const AttentionArgs& args;
  int32_t box_keys_log2;  // of pages
  // Of packed keys the sequence's first token, of others its batch index, of pages the end of the
  // sequence: one register of the few that producer threads have.
  int32_t origin;
  const int32_t* pages;

  __device__ __forceinline__ KeyBoxes(const AttentionArgs& args, int32_t box_keys_log2,
                                      const Sequence& sequence)
      : args(args), box_keys_log2(box_keys_log2), origin(sequence.key_batch), pages(nullptr) {
    if constexpr (kIsDense) return;
    if (args.key_offsets != nullptr) origin = sequence.first_key;
    if (!is_paged()) return;
    origin = sequence.present.end;
    pages = args.page_table.of(sequence.batch_idx);
  }

  // How many of the keys [key, key + kRows) are copied, whole boxes. Those past the sequence's end
  // are not asked for: their pages may not be.
  template <int kRows>
  __device__ __forceinline__ int32_t count(int32_t key) const {
    if (!is_paged()) return kRows;
    const int32_t last = (1 << box_keys_log2) - 1;
    return (clamp_to(origin - key, 0, kRows) + last) & ~last;
  }

  // Of the tile that begins with this key; before the first one there is nothing.
  __device__ __forceinline__ Place find(int32_t key) const {
    if constexpr (kIsDense) {
      return {};
    } else if (is_paged()) {
      key += first_row();
      if (static_cast<uint32_t>(key) >= static_cast<uint32_t>(origin)) return {-1, 0};
      const int32_t page = key / args.page_size;
      return {key - page * static_cast<int32_t>(args.page_size), pages[page]};
    } else {
      const bool is_packed = args.key_offsets != nullptr;
      return {is_packed ? origin + key : key, is_packed ? 0 : origin};
    }
  }

  // The rows [begin, begin + kRows) of a tile, of which `key` is the first, by copy(row, token,
  // batch): one box, to that row of them. Of their keys count() are copied.
  template <int kRows, typename Copy>
  __device__ __forceinline__ void copy_rows(const Place& place, int32_t key, int32_t begin,
                                            Copy copy) const {
    static_assert(kRows <= 32 * 8, "a lane has a box");
    if constexpr (kIsDense) {
      copy(0, key, origin);
    } else if (is_paged()) {
      const int32_t row = first_row() - begin;
      if (place.token >= 0 && row >= 0 && row < kRows) copy(row, place.token, place.batch_idx);
    } else if (Producers<kLayouts>::is_leader()) {
      copy(0, place.token + begin, place.batch_idx);
    }
  }

 private:
  __device__ __forceinline__ bool is_paged() const {
    return !kIsDense && args.page_table.entries != nullptr;
  }
  // Of this lane's box in its tile.
  __device__ __forceinline__ int32_t first_row() const {
    return static_cast<int32_t>(threadIdx.x % 32) << box_keys_log2;
  }
};

}  // namespace wh::cuda
