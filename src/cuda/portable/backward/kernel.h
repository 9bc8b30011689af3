// cuda_portable_backward, the running side.
#pragma once

#include "core/carver.h"
#include "core/status.h"
#include "cuda/common/key_range.h"
#include "cuda/gradients/gradients.h"
#include "cuda/portable/backward/tiles.h"

namespace wh {
struct Launch;
}

namespace wh::cuda {

// What the kernels leave each other: a number for each row, [batch, heads_q, len_q]. A key of
// score s weighs 2^((s - base) * log2(e) - shift) in its row; `base` is 0 unless the row's
// log-sum-exp is too coarse.
struct BackwardRows {
  float* base;
  float* shift;      // infinite: the row is empty, or no row
  float* delta;      // sum of d_out * out
  float* d_sink;     // the row's part of its head's; null without sinks
  int32_t* dropped;  // [1]: whether a product read 0 in the place of NaN or infinity
  size_t bytes;

  BackwardRows() = default;
  BackwardRows(void* base_address, const Problem& p) {
    Carver carver(base_address);
    const int64_t rows = p.batch * p.heads_q * p.len_q;
    base = carver.take<float>(rows);
    shift = carver.take<float>(rows);
    delta = carver.take<float>(rows);
    d_sink = carver.take<float>(p.has_sinks ? rows : 0);
    dropped = carver.take<int32_t>(1);
    bytes = carver.bytes();
  }
};

struct PortableBackwardArgs {
  GradientArgs gradients;
  BackwardRows rows;
  // Rows that can be copied 16 bytes at a time; others are element by element.
  bool q_is_whole, k_is_whole, v_is_whole, d_out_is_whole;
  // Pairs of elements can be stored at once.
  bool dq_is_whole, dk_is_whole, dv_is_whole;
  int32_t tiles;       // of a head of the block's side
  int32_t first_item;  // of this launch
};

// What a block works on. Blocks are counted in an order that begins with the longest of a head:
// with causal its last queries, or its first keys.
struct BackwardItem {
  int32_t batch_idx, head;  // a query head, or a kv head
  int32_t first, rows;      // of the block's side
  Keys present;
  int32_t begin, end;            // tiles of the other side: of keys, or of each head's queries
  int32_t full_begin, full_end;  // tiles of keys that every query sees whole; of queries: none

  constexpr Sequence sequence(const AttentionArgs& a) const {
    return dense_sequence(a, batch_idx, present);
  }

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
    full_begin = full_end = 0;
    if (side == Side::kQueries) {
      const KeyTiles keys = key_tiles(a, sequence(a), first, first + rows - 1, tile_columns);
      begin = keys.begin;
      end = keys.end;
      full_begin = keys.full_begin;
      full_end = keys.full_end;
    } else {
      const Queries queries = queries_that_see(a, sequence(a), {first, first + rows});
      begin = queries.begin / tile_columns;
      end = queries.empty() ? begin : (queries.end + tile_columns - 1) / tile_columns;
    }
  }
};
static_assert(sizeof(BackwardItem) <= kBackwardItemBytes);

// The kernels compiled for these; instance.cu.in defines them.
template <Side kSide, int kDimQk, int kDimV, Dtype kDtype, SharedMemory kMemory>
const void* portable_backward_instance();

Status run_portable_backward(const Launch& launch);

}  // namespace wh::cuda
