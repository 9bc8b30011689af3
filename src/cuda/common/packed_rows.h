// Grouped queries packed on the rows of a tile: all query heads that share a kv head are rows of
// one (batch, kv head) pair, query-major, and the keys of a pair may be split between blocks.
#pragma once

#include <cstdint>

#include "cuda/common/divisor.h"
#include "cuda/common/key_range.h"

namespace wh {
struct Config;  // the kernels must not be compiled anew when the planner changes
}

namespace wh::cuda {

// How a problem is cut into blocks; the same for planning and running. A block is up to
// Config::tile_q rows of one pair and one share of the key tiles that any of them may see. The
// shares follow the key lengths on the device; their number does not.
struct PackedShape {
  int64_t row_tiles;  // of a pair
  int64_t items;      // batch * heads_kv * row_tiles
  int64_t splits;     // blocks of an item; 1: keys are not split
  int64_t blocks;     // items * splits

  PackedShape(const Problem& problem, const Config& config);
};

struct PackedRows {
  Divisor group, heads_kv;
  Divisor row_tiles;
  Divisor splits;

  PackedRows() = default;
  PackedRows(const Problem& problem, const PackedShape& shape)
      : group(problem.group()),
        heads_kv(problem.heads_kv),
        row_tiles(shape.row_tiles),
        splits(shape.splits) {}
};

// What one block works on. `index` counts blocks; fastest are the row tiles of a pair, which read
// the same keys.
struct PackedItem {
  int32_t batch_idx, head_kv, split;
  int32_t first_row, rows;  // of the pair's len_q * group rows
  Keys present;
  Keys seen;  // by some row
  KeyTiles tiles;
  int32_t tile_begin, tile_end;  // of this split
  bool is_mixed;                 // some key is seen by some rows only

  constexpr PackedItem(const AttentionArgs& args, const PackedRows& packed, int32_t index,
                       int tile_q, int tile_k) {
    int32_t next = packed.row_tiles.quotient(index);
    first_row = packed.row_tiles.remainder(index, next) * tile_q;
    index = next;
    next = packed.splits.quotient(index);
    split = packed.splits.remainder(index, next);
    index = next;
    batch_idx = packed.heads_kv.quotient(index);
    head_kv = packed.heads_kv.remainder(index, batch_idx);
    const int32_t all_rows = args.len_q * args.group;
    rows = tile_q < all_rows - first_row ? tile_q : all_rows - first_row;
    present = present_keys(args, batch_idx);
    const int32_t first_query = packed.group.quotient(first_row);
    const int32_t last_query = packed.group.quotient(first_row + rows - 1);
    const Keys first = visible_keys(args, present, first_query);
    const Keys last = visible_keys(args, present, last_query);
    seen = {first.begin, last.end};
    is_mixed =
        args.mask_kind != MaskKind::kNone || first.begin != last.begin || first.end != last.end;
    tiles = key_tiles(args, present, first_query, last_query, tile_k);
    // Even shares; the first ones take what is left over.
    const int32_t count = tiles.end > tiles.begin ? tiles.end - tiles.begin : 0;
    const int32_t share = packed.splits.quotient(count);
    const int32_t left = packed.splits.remainder(count, share);
    tile_begin = tiles.begin + share * split + (split < left ? split : left);
    tile_end = tile_begin + share + (split < left ? 1 : 0);
  }
};

// One of the rows that a block works on.
struct PackedRow {
  int32_t head, query;

  constexpr PackedRow(const AttentionArgs& args, const PackedRows& packed, const PackedItem& item,
                      int32_t row) {
    const int32_t index = item.first_row + row;
    query = packed.group.quotient(index);
    head = item.head_kv * args.group + packed.group.remainder(index, query);
  }

  // Its place in log_sum_exp and among the rows of Partials.
  constexpr int64_t index(const AttentionArgs& args, const PackedItem& item) const {
    return (int64_t{item.batch_idx} * args.heads_q + head) * args.len_q + query;
  }
};

}  // namespace wh::cuda
