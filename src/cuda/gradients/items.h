// How the backward kernels cut a problem into blocks, and what they leave each other about its
// rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/carver.h"
#include "core/sequence.h"
#include "cuda/common/key_range.h"
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

// How many blocks own a problem's queries, and how many its keys; those of queries come first.
struct BackwardBlocks {
  int64_t query_tiles, key_tiles;  // of a head
  int64_t queries, keys;           // blocks

  constexpr BackwardBlocks(const Problem& p, int64_t query_rows, int64_t key_rows)
      : query_tiles((p.len_q + query_rows - 1) / query_rows),
        key_tiles((p.len_k + key_rows - 1) / key_rows),
        queries(p.batch * p.heads_q * query_tiles),
        keys(p.batch * p.heads_kv * key_tiles) {}
  constexpr int64_t all() const { return queries + keys; }
};

// What a block meets of the other side: tiles of keys, or of each head's queries.
struct MetTiles {
  int32_t begin, end;
  // Tiles of keys that every query of the block sees whole, or of queries that see every key of it.
  int32_t full_begin, full_end;

  constexpr MetTiles(const AttentionArgs& a, const Sequence& sequence, Side side, int32_t first,
                     int32_t rows, int tile_columns) {
    if (side == Side::kQueries) {
      const KeyTiles keys = key_tiles(a, sequence, first, first + rows - 1, tile_columns);
      begin = keys.begin;
      end = keys.end;
      full_begin = keys.full_begin;
      full_end = keys.full_end;
    } else {
      const Queries queries = queries_that_see(a, sequence, {first, first + rows});
      begin = queries.begin / tile_columns;
      end = queries.empty() ? begin : (queries.end + tile_columns - 1) / tile_columns;
      // Queries past the last one are nobody's: their tile may be full.
      const Queries whole = queries_that_see_all(a, sequence, {first, first + rows});
      full_begin = (whole.begin + tile_columns - 1) / tile_columns;
      full_end = whole.end == sequence.len_q ? end : whole.end / tile_columns;
      if (whole.empty() || a.mask_kind != MaskKind::kNone) full_begin = full_end = begin;
    }
  }
};

// What a block works on. Blocks are counted in an order that begins with the longest of a head:
// with causal its last queries, or its first keys.
struct BackwardItem {
  int32_t batch_idx, head;  // a query head, or a kv head
  int32_t first, rows;      // of the block's side
  Keys present;
  int32_t begin, end;  // tiles of the other side: of keys, or of each head's queries
  // Tiles of keys that every query of the block sees whole, or of queries that see every key of it.
  int32_t full_begin, full_end;

  constexpr Sequence sequence(const AttentionArgs& a) const {
    return dense_sequence(a, batch_idx, present);
  }
  constexpr bool is_full(int32_t tile) const { return tile >= full_begin && tile < full_end; }

  constexpr BackwardItem(const GradientArgs& args, Side side, int32_t tiles, int32_t index,
                         int tile_rows, int tile_columns) {
    const AttentionArgs& a = args.attention;
    const int32_t heads = side == Side::kQueries ? a.heads_q : args.heads_kv;
    const int32_t length = side == Side::kQueries ? a.len_q : a.len_k;
    const int32_t all_heads = index / tiles;
    const int32_t tile = index - all_heads * tiles;
    batch_idx = all_heads / heads;
    head = all_heads - batch_idx * heads;
    first = (side == Side::kQueries ? tiles - 1 - tile : tile) * tile_rows;
    rows = tile_rows < length - first ? tile_rows : length - first;
    present = dense_keys(a, batch_idx);
    const MetTiles met(a, sequence(a), side, first, rows, tile_columns);
    begin = met.begin;
    end = met.end;
    full_begin = met.full_begin;
    full_end = met.full_end;
  }
};

}  // namespace wh::cuda
