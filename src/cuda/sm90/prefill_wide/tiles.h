// Tile sizes of sm90_prefill_wide by head dimensions, and what they cost in shared memory.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/sm90/prefill/tiles.h"

namespace wh::cuda {

// src/cuda/CMakeLists.txt compiles one file for each of these.
constexpr HeadDims kWideDims[] = {{512, 512}, {576, 512}};

constexpr int kWideTileQ = 64;   // rows of a block
constexpr int kWideCluster = 2;  // blocks that share K and V
constexpr int kWideThreads = 3 * 128;
constexpr int kWideSlotBytes = 16384;
constexpr int kWideValueRows = 32;  // keys of a slot of V

struct WideTile {
  int tile_k;
  int slots;                                                // of the ring
  int producer_registers, left_registers, right_registers;  // their sum is 504
};

// 96 keys: Q K^T then reads 107 bytes of shared memory a clock, with 64 keys all 128 that there
// are; 128 keys (96 bytes) leave the left warpgroup no registers. Softcap and masks need some, so
// that only 64 keys fit.
constexpr WideTile wide_tile(HeadDims dims, Scores scores) {
  const bool is_widest = dims.dim_qk > 512;
  if (scores != Scores::kPlain) return {64, is_widest ? 8 : 9, 40, 248, 216};
  return {96, is_widest ? 7 : 8, 40, 256, 208};
}

// Panels of 64 columns of K in a slot. Of one panel each block of the cluster loads half of the
// rows, of two panels one.
constexpr int wide_panels_of_slot(WideTile tile) { return kWideSlotBytes / (tile.tile_k * 128); }

// Q in panels of 64 columns, the ring, two buffers of P, row factors, barriers.
struct WideMemory {
  int panels_qk;
  int q_bytes, p_bytes;  // p: of one buffer
  int ring_offset, p_offset, factor_offset, barrier_offset, bytes;

  constexpr WideMemory(HeadDims dims, WideTile tile)
      : panels_qk((dims.dim_qk + 63) / 64),
        q_bytes(panels_qk * kWideTileQ * 128),
        p_bytes(kWideTileQ * ((tile.tile_k + 63) / 64) * 128),
        ring_offset(q_bytes),
        p_offset(ring_offset + tile.slots * kWideSlotBytes),
        factor_offset(p_offset + 2 * p_bytes),
        barrier_offset(factor_offset + 3 * kWideTileQ * 4),
        bytes(barrier_offset + 512) {}
};

}  // namespace wh::cuda
