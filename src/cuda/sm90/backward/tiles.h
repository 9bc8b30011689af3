// Tile sizes of sm90_backward by head dimensions, and what they cost in shared memory.
#pragma once

#include "cuda/common/head_dims.h"
#include "cuda/gradients/items.h"
#include "cuda/sm90/common/panels.h"

namespace wh::cuda {

constexpr int kGradientStages = 2;
constexpr int kGradientConsumers = 2;  // warpgroups
constexpr int kGradientThreads = 128 * (1 + kGradientConsumers);
constexpr int kGradientProducerRegisters = 40, kGradientConsumerRegisters = 232;

struct GradientTile {
  int rows;        // of the block's side
  int columns;     // of the other side, at once
  bool has_roles;  // the consumers share 64 rows: one sums dv, the other dk
};

// A consumer thread holds its sums, columns / 2 scores and as many elements of d_out v^T, and half
// of each again as operands of 16 bits: 208 of its 232 registers at most where consumers have
// roles, 200 where they have not (208 spilled). Below 80 columns the first two products are bound
// by shared memory, by 1.14 at 48. Two stages of both tensors beside the block's own rows leave 48
// keys at dim 256.
constexpr GradientTile gradient_tile(HeadDims dims, Side side) {
  if (side == Side::kKeys) {
    const int sums = dims.dim_qk + dims.dim_v;
    // dk and dv of 64 rows are too many for one consumer beyond 256 columns.
    if (sums > 256) return {64, 64, true};
    return {128, sums > 128 ? 48 : 64, false};
  }
  const int columns = dims.dim_qk <= 64    ? 96
                      : dims.dim_qk <= 128 ? 80
                      : dims.dim_qk <= 192 ? 64
                                           : 48;
  return {128, columns, false};
}

// What a block of keys reads of a query.
struct GradientQuery {
  static constexpr int kBytes = 16;  // shift, delta, first key, count of keys
};

// Panels of the block's own q and d_out, or k and v; then the stages of the other side's two
// tensors; then weights on their way from one role to the other; then numbers of the queries, by
// stage; then the block's item and barriers.
struct GradientMemory {
  int panels_qk, panels_v;
  int own_qk_bytes, own_v_bytes, qk_bytes, v_bytes;  // of one tile
  int own_v_offset, qk_offset, v_offset, exchange_offset, queries_offset, item_offset,
      barrier_offset, bytes;

  constexpr GradientMemory(HeadDims dims, Side side)
      : GradientMemory(dims, side, gradient_tile(dims, side)) {}
  constexpr GradientMemory(HeadDims dims, Side side, GradientTile tile)
      : panels_qk(panels_of(dims.dim_qk)),
        panels_v(panels_of(dims.dim_v)),
        own_qk_bytes(panels_qk * panel_bytes(tile.rows)),
        own_v_bytes(panels_v * panel_bytes(tile.rows)),
        qk_bytes(panels_qk * panel_bytes(tile.columns)),
        v_bytes(panels_v * panel_bytes(tile.columns)),
        own_v_offset(own_qk_bytes),
        qk_offset(own_v_offset + own_v_bytes),
        v_offset(qk_offset + kGradientStages * qk_bytes),
        exchange_offset(v_offset + kGradientStages * v_bytes),
        queries_offset(exchange_offset + (tile.has_roles ? 64 * tile.columns * 4 : 0)),
        item_offset(queries_offset + (side == Side::kKeys
                                          ? kGradientStages * tile.columns * GradientQuery::kBytes
                                          : 0)),
        barrier_offset(item_offset + 64),
        bytes(barrier_offset + 128) {}
};

}  // namespace wh::cuda
