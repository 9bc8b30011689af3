// Tile sizes of sm90_prefill by head dimensions, and what they cost in shared memory.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/head_dims.h"
#include "cuda/common/packed_rows.h"
#include "cuda/sm90/common/panels.h"

namespace wh::cuda {

struct PrefillTile {
  int warpgroups;  // consumers, 64 query rows each
  int tile_k;
  int stages;              // of K and of V
  int producer_registers;  // a thread; consumer_registers * warpgroups + this <= 504 or 512
  int consumer_registers;

  constexpr int tile_q() const { return 64 * warpgroups; }
  constexpr int threads() const { return 128 * (1 + warpgroups); }
};

// The widest K tile whose accumulators fit the registers, and whose two stages fit shared memory: a
// consumer thread holds tile_k / 2 scores, tile_k / 4 packed weights and dim_v / 2 sums. Below 80
// keys Q K^T is bound by shared memory. At dim 64 three warpgroups of 64 rows share each K tile; 48
// bytes of spill there halve the speed.
constexpr PrefillTile prefill_tile(HeadDims dims, Scores scores, Layouts layouts) {
  const bool is_plain = scores == Scores::kPlain;
  // Page tables take registers of the producer.
  const bool is_dense = layouts == Layouts::kDense;
  const int producer_registers = is_dense ? 40 : 56, consumer_registers = is_dense ? 232 : 224;
  if (dims.dim_v <= 64 && dims.dim_qk <= 64) {
    if (is_plain) return {3, 128, 2, 32, 160};
    return {2, 128, 2, producer_registers, consumer_registers};
  }
  int tile_k = 80;
  if (dims.dim_qk > 256) {
    tile_k = 64;
  } else if (dims.dim_v <= 128) {
    // 176 at dim 128: as fast without a mask, 2 to 3 % slower where causal cuts tiles.
    tile_k = dims.dim_qk <= 112 && is_plain ? 176 : 128;
  } else if (dims.dim_v <= 192) {
    tile_k = 112;
  }
  // The addresses of an array mask take registers.
  if (scores == Scores::kMasked) tile_k = dims.dim_qk <= 128 && dims.dim_v <= 128 ? 96 : 64;
  return {2, tile_k, 2, producer_registers, consumer_registers};
}

// Panels: Q, then the stages of K, then those of V, then barriers.
struct PrefillMemory {
  int panels_qk, panels_v;
  int q_bytes, k_bytes, v_bytes;  // of one tile
  int k_offset, v_offset, barrier_offset, bytes;

  constexpr PrefillMemory(HeadDims dims, PrefillTile tile)
      : panels_qk(panels_of(dims.dim_qk)),
        panels_v(panels_of(dims.dim_v)),
        q_bytes(panels_qk * panel_bytes(tile.tile_q())),
        k_bytes(panels_qk * panel_bytes(tile.tile_k)),
        v_bytes(panels_v * panel_bytes(tile.tile_k)),
        k_offset(q_bytes),
        v_offset(k_offset + tile.stages * k_bytes),
        barrier_offset(v_offset + tile.stages * v_bytes),
        bytes(barrier_offset + 256) {}
};

}  // namespace wh::cuda
