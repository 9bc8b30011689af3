// Tile sizes of sm90_backward_wide by head dimensions, and what they cost in shared memory.
#pragma once

#include "cuda/common/head_dims.h"
#include "cuda/gradients/items.h"
#include "cuda/sm90/backward/tiles.h"
#include "cuda/sm90/common/panels.h"

namespace wh::cuda {

// What a block sums: of its own queries, or of its own keys.
enum class Gradient : int32_t { kDq, kDk, kDv };

constexpr Side side_of(Gradient of) { return of == Gradient::kDq ? Side::kQueries : Side::kKeys; }

constexpr int kWideGradientCluster = 2;  // blocks that share what streams past
constexpr GradientTile kWideGradientTile{64, 64, true};
constexpr int kWideGradientRows = kWideGradientCluster * kWideGradientTile.rows;  // of a cluster
constexpr int kWideGradientSlotBytes = panel_bytes(kWideGradientTile.columns);

// The block's own panels; slots of one panel each, a ring for either consumer; what consumers hand
// each other, 64 x 64 weights in f32, or rounded where they meet d_out alone; numbers of the
// queries; the block's item and barriers.
struct WideGradientMemory {
  int panels_qk, panels_v;  // of own rows and of rows that stream past; dv needs no v
  int own_bytes;
  int left_slots, right_slots;
  int ring_offset, exchange_offset, queries_offset, item_offset, barrier_offset, bytes;

  constexpr int slots() const { return left_slots + right_slots; }

  constexpr WideGradientMemory(HeadDims dims, Gradient of)
      : panels_qk(panels_of(dims.dim_qk)),
        panels_v(panels_of(dims.dim_v)),
        own_bytes((panels_qk + (of == Gradient::kDv ? 0 : panels_v)) *
                  panel_bytes(kWideGradientTile.rows)),
        left_slots(0),
        right_slots(0),
        ring_offset(own_bytes),
        exchange_offset(0),
        queries_offset(0),
        item_offset(0),
        barrier_offset(0),
        bytes(0) {
    const int pairs = kWideGradientTile.rows * kWideGradientTile.columns;
    const int exchange_bytes = pairs * (of == Gradient::kDv ? 2 : 4);
    const int queries_bytes =
        side_of(of) == Side::kKeys
            ? kGradientStages * kWideGradientTile.columns * GradientQuery::kBytes
            : 0;
    constexpr int kItemBytes = 64, kBarrierBytes = 384;
    const int left = most_shared_bytes() - own_bytes - exchange_bytes - queries_bytes - kItemBytes -
                     kBarrierBytes;
    const int slots = left / kWideGradientSlotBytes;
    // The right consumer of dv reads a third of what the left one does.
    right_slots = of == Gradient::kDv ? slots * 3 / 8 : slots / 2;
    left_slots = slots - right_slots;
    exchange_offset = ring_offset + slots * kWideGradientSlotBytes;
    queries_offset = exchange_offset + exchange_bytes;
    item_offset = queries_offset + queries_bytes;
    barrier_offset = item_offset + kItemBytes;
    bytes = barrier_offset + kBarrierBytes;
  }
};

}  // namespace wh::cuda
