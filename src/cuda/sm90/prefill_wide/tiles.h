// Tile sizes of sm90_prefill_wide by head dimensions, and what they cost in shared memory.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/sm90/prefill/tiles.h"

namespace wh::cuda {

constexpr int kWideTileQ = 64;   // rows of a block
constexpr int kWideCluster = 2;  // blocks that share K and V
constexpr int kWideThreads = 3 * 128;
constexpr int kWideSlotBytes = 16384;
constexpr int kWideValueRows = 32;  // keys of a slot of V

struct WideTile {
  int tile_k;
  int left_slots, right_slots;                              // of the two warpgroups' rings
  int producer_registers, left_registers, right_registers;  // their sum is 504
};

// 96 keys would ask less of shared memory's port, but ran at 470 to 520 TFLOP/s where 64 keys run
// at 515 to 555: with 8 + 3 slots of a tile against 6 of the ring the copies come too late.
constexpr WideTile wide_tile(HeadDims dims, Scores, Layouts layouts) {
  const int left_slots = dims.dim_qk > 512 ? 5 : 6;
  // Page tables take registers of the producer.
  if (layouts == Layouts::kAll) return {64, left_slots, 3, 56, 240, 208};
  return {64, left_slots, 3, 40, 248, 216};
}

// Panels of 64 columns of K in a slot. Of one panel each block of the cluster loads half of the
// rows, of two panels one.
constexpr int wide_panels_of_slot(WideTile tile) {
  return kWideSlotBytes / panel_bytes(tile.tile_k);
}

// Q in panels of 64 columns, the rings, P, row factors, barriers.
struct WideMemory {
  int panels_qk;
  int q_bytes, p_bytes;
  int ring_offset, p_offset, factor_offset, barrier_offset, bytes;

  constexpr WideMemory(HeadDims dims, WideTile tile)
      : panels_qk(panels_of(dims.dim_qk)),
        q_bytes(panels_qk * panel_bytes(kWideTileQ)),
        p_bytes(panels_of(tile.tile_k) * panel_bytes(kWideTileQ)),
        ring_offset(q_bytes),
        p_offset(ring_offset + (tile.left_slots + tile.right_slots) * kWideSlotBytes),
        factor_offset(p_offset + p_bytes),
        barrier_offset(factor_offset + 2 * kWideTileQ * 4),
        bytes(barrier_offset + 512) {}
};

}  // namespace wh::cuda
