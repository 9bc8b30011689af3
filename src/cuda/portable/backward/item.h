// What a block of cuda_portable_backward works on: queries or keys of a sequence, dense or packed.
#pragma once

#include <cstdint>

#include "core/own_keys.h"
#include "cuda/gradients/items.h"

namespace wh::cuda {

// Counted as BackwardItem's blocks are. Of a packed sequence that is shorter than the longest that
// a batch may have, some have no rows.
struct PortableItem {
  Sequence sequence;
  int32_t head;         // a query head, or a kv head
  int32_t first, rows;  // of the block's side, in the sequence
  int32_t begin, end;   // MetTiles
  int32_t full_begin, full_end;

  constexpr PortableItem(const GradientArgs& args, Side side, int32_t tiles, int32_t index,
                         int tile_rows, int tile_columns) {
    const AttentionArgs& a = args.attention;
    const int32_t heads = side == Side::kQueries ? a.heads_q : args.heads_kv;
    const int32_t all_heads = index / tiles, tile = index - all_heads * tiles;
    const int32_t batch_idx = all_heads / heads;
    sequence = sequence_at(a, batch_idx);
    head = all_heads - batch_idx * heads;
    const bool is_of_queries = side == Side::kQueries;
    const int32_t length = is_of_queries ? sequence.len_q : own_keys<int32_t>(a, batch_idx);
    first = (is_of_queries ? tiles - 1 - tile : tile) * tile_rows;
    rows = tile_rows < length - first ? tile_rows : length - first;
    begin = end = full_begin = full_end = 0;
    if (rows <= 0) return;
    const MetTiles met(a, sequence, side, first, rows, tile_columns);
    begin = met.begin;
    end = met.end;
    full_begin = met.full_begin;
    full_end = met.full_end;
  }

  constexpr bool is_full(int32_t tile) const { return tile >= full_begin && tile < full_end; }
};

}  // namespace wh::cuda
