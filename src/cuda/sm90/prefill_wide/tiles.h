// Tile sizes of sm90_prefill_wide by head dimensions, and what they cost in shared memory.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/sm90/prefill/tiles.h"

namespace wh::cuda {

constexpr int kWideTileQ = 64;   // rows of a block
constexpr int kWideCluster = 2;  // blocks that share K and V
constexpr int kWideSlotBytes = 16384;
constexpr int kWideValueRows = 32;  // keys of a slot of V

struct WideTile {
  int tile_k;
  int left_slots, right_slots;  // of the two warpgroups' rings
  // supply_warpgroups * the first + the other two are 504 or 512
  int producer_registers, left_registers, right_registers;
  int load_slots = 0;         // of codes, those that TMA fills
  int supply_warpgroups = 1;  // as in PrefillTile
  int cluster = kWideCluster;

  constexpr int threads() const { return 128 * (supply_warpgroups + 2); }
  constexpr int widening_warps() const { return 4 * supply_warpgroups - 1; }
};

// 96 keys would ask less of shared memory's port, but ran at 470 to 520 TFLOP/s where 64 keys run
// at 515 to 555: with 8 + 3 slots of a tile against 6 of the ring the copies come too late.
constexpr WideTile wide_tile(HeadDims dims, Scores, Layouts layouts) {
  const int left_slots = dims.dim_qk > 512 ? 5 : 6;
  // Page tables take registers of the producer.
  if (layouts == Layouts::kAll) return {64, left_slots, 3, 56, 240, 208};
  return {64, left_slots, 3, 40, 248, 216};
}

// Where K and V are codes. Each block loads and widens for itself: what one widened for two would
// have to go through the network between multiprocessors, which has a tenth of shared memory's
// rate. Seven warps widen; three take twice as long. So the block has 512 threads, for which a
// product of 256 columns has too many registers (C7602): those over values are of 128.
constexpr WideTile wide_code_tile(HeadDims, Scores, Layouts) {
  return {64, 5, 2, 64, 224, 160, 5, 2, 1};
}

constexpr WideTile wide_tile(HeadDims dims, Scores scores, Layouts layouts, Stored stored) {
  return stored == Stored::kCodes ? wide_code_tile(dims, scores, layouts)
                                  : wide_tile(dims, scores, layouts);
}

// Panels of 64 columns of K in a slot. Of one panel each block of the cluster loads half of the
// rows, of two panels one.
constexpr int wide_panels_of_slot(WideTile tile) {
  return kWideSlotBytes / panel_bytes(tile.tile_k);
}

// Rows of a box of K. Codes come in panels of 128 columns, and such a slot is one.
constexpr int wide_box_keys(WideTile tile) {
  if (tile.load_slots > 0) return tile.tile_k;
  return tile.tile_k * wide_panels_of_slot(tile) / tile.cluster;
}

// Q in panels of 64 columns, the rings, of codes slots of half the bytes that TMA fills, P, row
// factors, of codes the scales of tokens of K and of V, barriers.
struct WideMemory {
  int panels_qk;
  int q_bytes, p_bytes, scale_bytes;  // scales of a tile's K or V
  int ring_offset, load_offset, p_offset, factor_offset, scales_offset, barrier_offset, bytes;

  constexpr WideMemory(HeadDims dims, WideTile tile)
      : panels_qk(panels_of(dims.dim_qk)),
        q_bytes(panels_qk * panel_bytes(kWideTileQ)),
        p_bytes(panels_of(tile.tile_k) * panel_bytes(kWideTileQ)),
        scale_bytes(tile.load_slots > 0 ? tile.tile_k * 4 : 0),
        ring_offset(q_bytes),
        load_offset(ring_offset + (tile.left_slots + tile.right_slots) * kWideSlotBytes),
        p_offset(load_offset + tile.load_slots * kWideSlotBytes / 2),
        factor_offset(p_offset + p_bytes),
        scales_offset(factor_offset + 2 * kWideTileQ * 4),
        barrier_offset(scales_offset + 2 * kCodeScaleSlots * scale_bytes),
        bytes(barrier_offset + 512) {}
};

}  // namespace wh::cuda
