// Grouped queries packed on the rows of a tile: all query heads that share a kv head are rows of
// one (batch, kv head) pair, query-major, and the keys of a pair may be split between blocks.
#pragma once

#include <cstdint>

#include "cuda/common/divisor.h"
#include "cuda/common/key_range.h"
#include "cuda/common/tile_slots.h"

namespace wh {
struct Config;  // the kernels must not be compiled anew when the planner changes
}

namespace wh::cuda {

// How a problem is cut into blocks; the same for planning and running. A block is up to
// Config::tile_q rows of one pair and one share of the key tiles that any of them may see. The
// shares follow the key lengths on the device; their number does not. Packed queries may have fewer
// rows than there are blocks for: those find none and end at once.
struct PackedShape {
  bool has_slots;     // row tiles are slots of all sequences (tile_slots.h), not each one's own
  int64_t row_tiles;  // of a pair, or slots of a kv head
  int64_t items;      // batch * heads_kv * row_tiles, or heads_kv * row_tiles
  int64_t splits;     // blocks of an item; 1: keys are not split
  int64_t blocks;     // items * splits

  PackedShape(const Problem& problem, const Config& config);
};

struct PackedRows {
  Divisor group, heads_kv;
  Divisor row_tiles;
  Divisor splits;
  bool has_slots = false;

  PackedRows() = default;
  PackedRows(const Problem& problem, const PackedShape& shape)
      : group(problem.group()),
        heads_kv(problem.heads_kv),
        row_tiles(shape.row_tiles),
        splits(shape.splits),
        has_slots(shape.has_slots) {}
};

// What a kernel is handed: one of dense tensors alone asks for no offsets, slots and pages before
// its first load.
enum class Layouts : int32_t { kDense, kAll };

// What one block works on. `index` counts blocks; fastest are the row tiles of a pair, which read
// the same keys.
struct PackedItem {
  Sequence sequence;
  const int32_t* pages = nullptr;  // of the sequence, where keys are paged
  int32_t head_kv, split;
  int32_t first_row, rows;  // of the pair's len_q * group rows; none: the block has nothing to do
  Keys seen{};              // by some row
  KeyTiles tiles{};
  int32_t tile_begin = 0, tile_end = 0;  // of this split
  bool is_mixed = false;                 // some key is seen by some rows only

  constexpr PackedItem(const AttentionArgs& args, const PackedRows& packed, int32_t index,
                       int tile_q, int tile_k, Layouts layouts = Layouts::kAll) {
    const bool is_dense = layouts == Layouts::kDense;
    int32_t next = packed.row_tiles.quotient(index);
    SlotTile at{0, packed.row_tiles.remainder(index, next)};
    index = next;
    next = packed.splits.quotient(index);
    split = packed.splits.remainder(index, next);
    index = next;
    at.batch_idx = packed.heads_kv.quotient(index);
    head_kv = packed.heads_kv.remainder(index, at.batch_idx);
    if (!is_dense && packed.has_slots) at = slot_tile(args, {args.group, tile_q}, at.tile);
    sequence = is_dense ? dense_sequence(args, at.batch_idx) : sequence_at(args, at.batch_idx);
    first_row = at.tile * tile_q;
    const int32_t all_rows = sequence.len_q * args.group;
    rows = tile_q < all_rows - first_row ? tile_q : all_rows - first_row;
    if (rows <= 0) return;
    if (!is_dense) pages = args.page_table.of(at.batch_idx);
    const int32_t first_query = packed.group.quotient(first_row);
    const int32_t last_query = packed.group.quotient(first_row + rows - 1);
    const Keys first = visible_keys(args, sequence, first_query);
    const Keys last = visible_keys(args, sequence, last_query);
    seen = {first.begin, last.end};
    is_mixed =
        args.mask_kind != MaskKind::kNone || first.begin != last.begin || first.end != last.end;
    tiles = key_tiles(args, sequence, first_query, last_query, tile_k);
    // Even shares; the first ones take what is left over.
    const int32_t count = tiles.end > tiles.begin ? tiles.end - tiles.begin : 0;
    const int32_t share = packed.splits.quotient(count);
    const int32_t left = packed.splits.remainder(count, share);
    tile_begin = tiles.begin + share * split + (split < left ? split : left);
    tile_end = tile_begin + share + (split < left ? 1 : 0);
  }

  constexpr KeyRows key_rows(const AttentionArgs& args) const {
    return wh::key_rows(pages, args.page_size, sequence);
  }
};

// One of the rows that a block works on.
struct PackedRow {
  int32_t head, query;  // of the sequence

  constexpr PackedRow(const AttentionArgs& args, const PackedRows& packed, const PackedItem& item,
                      int32_t row) {
    const int32_t index = item.first_row + row;
    query = packed.group.quotient(index);
    head = item.head_kv * args.group + packed.group.remainder(index, query);
  }

  // Its place in log_sum_exp and among the rows of Partials.
  constexpr int64_t index(const AttentionArgs& args, const PackedItem& item) const {
    const Sequence& sequence = item.sequence;
    return row_index<int64_t>(args.query_layout(), args.heads_q, args.len_q, sequence.query_batch,
                              head, sequence.first_query + query);
  }
  // In q or out, by the strides of batch, heads and length.
  constexpr int64_t offset(const int64_t* stride, const PackedItem& item) const {
    const Sequence& sequence = item.sequence;
    return sequence.query_batch * stride[0] + head * stride[1] +
           (sequence.first_query + query) * stride[2];
  }
};

}  // namespace wh::cuda
