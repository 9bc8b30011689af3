// How keys of a tile come by TMA: in one box where they lie side by side, in boxes of as many rows
// as no page ends in where they are paged. Of dense tensors nothing is left of this in the code.
#pragma once

#include <cstdint>

#include "cuda/common/key_range.h"
#include "cuda/common/packed_rows.h"

namespace wh::cuda {

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
    const int32_t end = present_keys<int32_t>(args.len_k, args.key_lengths, nullptr, origin).end;
    return (clamp_to(end - key, 0, kRows) + last) & ~last;
  }

  // copy(row, token, batch): one box, to that row of the tile, from K's third and first index on.
  template <int kRows, typename Copy>
  __device__ __forceinline__ void copy_each(int32_t key, Copy copy) const {
    if (kIsDense || args.page_table.entries == nullptr) {
      const bool is_packed = !kIsDense && args.key_offsets != nullptr;
      copy(0, is_packed ? origin + key : key, is_packed ? 0 : origin);
      return;
    }
    // Opaque: where the sequence's pages are is asked again for each tile, for the same reason.
    int32_t batch_idx = origin;
    asm volatile("" : "+r"(batch_idx));
    const int32_t* pages = args.page_table.of(batch_idx);
    const int32_t rows = count<kRows>(key);
#pragma unroll 1
    for (int32_t row = 0; row < rows; row += 1 << box_keys_log2) {
      const int32_t page = (key + row) / args.page_size;
      copy(row, key + row - page * static_cast<int32_t>(args.page_size), pages[page]);
    }
  }
};

}  // namespace wh::cuda
