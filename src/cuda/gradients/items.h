// How the backward kernels cut a problem into blocks, and what they leave each other about its
// rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/carver.h"
#include "core/own_keys.h"
#include "cuda/common/key_range.h"
#include "cuda/common/tile_slots.h"
#include "cuda/gradients/gradients.h"

namespace wh::cuda {

// Whose gradients a block sums; rows of the other side stream past.
enum class Side : int32_t { kQueries, kKeys };

// What the kernels leave each other: a number for each row, numbered as log-sum-exps are. A key of
// score s weighs 2^((s - base) * log2(e) - shift) in its row; `base` is 0 unless the row's
// log-sum-exp is too coarse.
struct BackwardRows {
  float* base;
  float* shift;      // infinite: the row is empty, or no row
  float* delta;      // sum of d_out * out
  float* d_sink;     // the row's part of its head's; null without sinks
  int32_t* dropped;  // [1]: whether a product read 0 in the place of NaN or infinity

  BackwardRows() = default;
  BackwardRows(Carver& carver, const Problem& p) {
    const int64_t rows = all_query_rows(p);
    base = carver.take<float>(rows);
    shift = carver.take<float>(rows);
    delta = carver.take<float>(rows);
    d_sink = carver.take<float>(p.has_sinks ? rows : 0);
    dropped = carver.take<int32_t>(1);
  }
};

// A row's number there.
constexpr int64_t row_number(const AttentionArgs& a, const Sequence& of, int32_t head,
                             int32_t query) {
  return row_index(a.query_layout(), a.heads_q, a.len_q, of.query_batch, head,
                   of.first_query + query);
}

// How many blocks own a problem's queries, and how many its keys; those of queries come first. Of
// packed tensors a head's tiles are slots of all sequences (tile_slots.h), some of them empty; of
// no tokens there are none.
struct BackwardBlocks {
  int64_t query_tiles, key_tiles;  // of a head, of packed tensors of all sequences
  int64_t queries, keys;           // blocks

  constexpr BackwardBlocks(const Problem& p, int64_t query_rows, int64_t key_rows)
      : query_tiles((p.len_q + query_rows - 1) / query_rows),
        key_tiles((p.len_k + key_rows - 1) / key_rows),
        queries(p.batch * p.heads_q * query_tiles),
        keys(p.batch * p.heads_kv * key_tiles) {
    if (p.query_layout == QueryLayout::kPacked) {
      query_tiles = p.total_q == 0 ? 0 : slot_count(p.total_q, query_rows, p.batch);
      queries = p.heads_q * query_tiles;
    }
    if (p.key_layout == KeyLayout::kPacked) {
      key_tiles = p.total_k == 0 ? 0 : slot_count(p.total_k, key_rows, p.batch);
      keys = p.heads_kv * key_tiles;
    }
  }
  constexpr int64_t all() const { return queries + keys; }
};

// slot_tile() of packed keys.
constexpr SlotTile key_slot(const AttentionArgs& a, int32_t tile_rows, int32_t slot) {
  AttentionArgs keys{};  // as if they were queries
  keys.query_offsets = a.key_offsets;
  keys.total_q = a.total_k;
  keys.batch = a.batch;
  return slot_tile(keys, {1, tile_rows}, slot);
}

// The rows of one side of a sequence.
struct SideRows {
  int32_t batch_idx;  // index into the tensors' first dimension
  int32_t first;      // index of its first token there
  int32_t length;
  bool is_packed;
};

// What a block works on: queries or keys of a sequence. Blocks are counted in an order that begins
// with the longest of a head and sequence: with causal its last queries, or its first keys.
//
// The order of the fields counts, as that of AttentionArgs does: where head and first were loaded
// together, sm90_backward spilled a register.
struct BackwardItem {
  Sequence sequence;
  int32_t keys;         // of the sequence, absent ones too
  int32_t head;         // a query head, or a kv head
  int32_t first, rows;  // of the block's side, in the sequence; no rows: there is nothing to do
  int32_t begin, end;   // tiles of the other side: of keys, or of each head's queries
  // Tiles of keys that every query of the block sees whole, or of queries that see every key of it.
  int32_t full_begin, full_end;

  constexpr BackwardItem(const GradientArgs& args, Side side, int32_t tiles, int32_t index,
                         int tile_rows, int tile_columns) {
    const AttentionArgs& a = args.attention;
    const bool is_of_queries = side == Side::kQueries;
    const int32_t heads = is_of_queries ? a.heads_q : args.heads_kv;
    const int32_t all_heads = index / tiles;
    SlotTile at{all_heads / heads, index - all_heads * tiles};
    head = all_heads - at.batch_idx * heads;
    if (is_of_queries && a.query_offsets != nullptr) at = slot_tile(a, {1, tile_rows}, at.tile);
    if (!is_of_queries && a.key_offsets != nullptr) at = key_slot(a, tile_rows, at.tile);
    sequence = sequence_at(a, at.batch_idx);
    keys = own_keys<int32_t>(a, at.batch_idx);
    const int32_t length = is_of_queries ? sequence.len_q : keys;
    if (is_of_queries) at.tile = (length + tile_rows - 1) / tile_rows - 1 - at.tile;
    first = at.tile * tile_rows;
    rows = tile_rows < length - first ? tile_rows : length - first;
    if (first < 0) rows = 0;
    begin = end = full_begin = full_end = 0;
    if (rows <= 0) return;
    if (is_of_queries) {
      const KeyTiles met = key_tiles(a, sequence, first, first + rows - 1, tile_columns);
      begin = met.begin;
      end = met.end;
      full_begin = met.full_begin;
      full_end = met.full_end;
    } else {
      const Queries met = queries_that_see(a, sequence, {first, first + rows});
      begin = met.begin / tile_columns;
      end = met.empty() ? begin : (met.end + tile_columns - 1) / tile_columns;
      // Queries past a tensor's last one are nobody's: their tile may be full. Past a packed
      // sequence's they are the next one's.
      const Queries whole = queries_that_see_all(a, sequence, {first, first + rows});
      full_begin = (whole.begin + tile_columns - 1) / tile_columns;
      const bool is_to_the_end = whole.end == sequence.len_q && a.query_offsets == nullptr;
      full_end = is_to_the_end ? end : whole.end / tile_columns;
      if (whole.empty() || a.mask_kind != MaskKind::kNone) full_begin = full_end = begin;
    }
  }

  constexpr bool is_full(int32_t tile) const { return tile >= full_begin && tile < full_end; }
  constexpr SideRows rows_of(const AttentionArgs& a, Side side) const {
    if (side == Side::kQueries) {
      return {sequence.query_batch, sequence.first_query, sequence.len_q,
              a.query_offsets != nullptr};
    }
    return {sequence.key_batch, sequence.first_key, keys, a.key_offsets != nullptr};
  }

  // The rows of the other side that a block of `side` sums; others may hold anything.
  constexpr Keys met_rows(Side side) const {
    return side == Side::kQueries ? sequence.present : Keys{0, sequence.len_q};
  }
  // Whether TMA brings others with rows [first, first + count): absent keys, or rows of the next
  // packed sequence. What lies past a tensor it makes 0. Never of a full tile.
  constexpr bool brings_others(const AttentionArgs& a, Side side, int32_t first,
                               int32_t count) const {
    const Keys met = met_rows(side);
    const SideRows of = rows_of(a, side == Side::kQueries ? Side::kKeys : Side::kQueries);
    const int32_t end = first + count;
    return first < met.begin || (of.is_packed || end < of.length ? end : of.length) > met.end;
  }
};
static_assert(sizeof(BackwardItem) <= 64, "tiles.h of the kernels leaves it so many bytes");

}  // namespace wh::cuda
