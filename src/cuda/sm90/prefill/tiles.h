// Tile sizes of sm90_prefill by head dimensions, and what they cost in shared memory.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/head_dims.h"
#include "cuda/common/packed_rows.h"
#include "cuda/sm90/common/panels.h"

namespace wh::cuda {

// How K and V lie in memory: elements of the type of Q, or codes of a byte.
enum class Stored : int32_t { kElements, kCodes };

struct PrefillTile {
  int warpgroups;  // consumers, 64 query rows each
  int tile_k;
  int stages;              // of K and of V; of codes, widened tiles of either
  int producer_registers;  // a thread; consumer_registers * warpgroups + this <= 504 or 512
  int consumer_registers;
  int load_slots = 0;  // of codes, tiles that TMA fills
  // Of the producer, the first warp, and of those beside it, which clean V or widen codes.
  int supply_warpgroups = 1;

  constexpr int tile_q() const { return 64 * warpgroups; }
  constexpr int threads() const { return 128 * (supply_warpgroups + warpgroups); }
  constexpr int widening_warps() const { return 4 * supply_warpgroups - 1; }
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
  // Pages of 64 come in boxes of 32 or 64 keys then: 80 keys are five of 16 for each panel, which
  // took 1.5 times as long as dense keys at 256. Packed keys share the code, and pay for it.
  if (!is_dense) tile_k = tile_k == 176 ? 128 : tile_k / 32 * 32;
  // The addresses of an array mask take registers.
  if (scores == Scores::kMasked) tile_k = dims.dim_qk <= 128 && dims.dim_v <= 128 ? 96 : 64;
  return {2, tile_k, 2, producer_registers, consumer_registers};
}

constexpr int kCodeScaleSlots = 4;  // tiles of keys whose scales of tokens are there

// Panels: Q, then the stages of K, then those of V, then barriers. Of codes, the ring of widened
// tiles, tiles of codes in panels of 128 columns, the scales of tokens of K and of V, then
// barriers.
struct PrefillMemory {
  int panels_qk, panels_v;
  int q_bytes, k_bytes, v_bytes;        // of one tile
  int load_bytes = 0, scale_bytes = 0;  // scales of a tile's K or V
  int k_offset, v_offset, load_offset = 0, scales_offset = 0, barrier_offset, bytes;

  constexpr PrefillMemory(HeadDims dims, PrefillTile tile)
      : panels_qk(panels_of(dims.dim_qk)),
        panels_v(panels_of(dims.dim_v)),
        q_bytes(panels_qk * panel_bytes(tile.tile_q())),
        k_bytes(panels_qk * panel_bytes(tile.tile_k)),
        v_bytes(panels_v * panel_bytes(tile.tile_k)),
        k_offset(q_bytes),
        v_offset(k_offset + tile.stages * k_bytes),
        barrier_offset(v_offset + tile.stages * v_bytes),
        bytes(barrier_offset + 256) {
    if (tile.load_slots == 0) return;
    k_bytes = v_bytes = k_bytes > v_bytes ? k_bytes : v_bytes;
    v_offset = k_offset;
    const int panels = panels_qk > panels_v ? panels_qk : panels_v;
    load_bytes = (panels + 1) / 2 * panel_bytes(tile.tile_k);
    load_offset = k_offset + tile.stages * k_bytes;
    scale_bytes = tile.tile_k * 4;
    scales_offset = load_offset + tile.load_slots * load_bytes;
    barrier_offset = scales_offset + 2 * kCodeScaleSlots * scale_bytes;
    bytes =
        barrier_offset + 16 * (tile.stages + tile.load_slots) + 104 + 32 * tile.widening_warps();
  }
};

// Where K and V are codes. Their widened tiles share one ring, in the order in which consumers read
// them: K0 K1 V0 K2 V1 and so on. Three are enough for one of each under way and one that is
// written.
//
// Bound: shared memory, 128 bytes a clock, where heads are 256 wide. A tile of 80 keys takes 2,560
// clocks of the tensor cores, 1,792 of the port for what they read, and 1,280 for codes (a byte
// written by TMA and read, two written), where 16 bits take 640: 3,072. At 128 it is 2,048 and
// 1,536 + 1,024 for 128 keys.
constexpr PrefillTile prefill_code_tile(HeadDims dims, Scores scores, Layouts layouts) {
  PrefillTile tile = prefill_tile(dims, scores, layouts);
  // Those who widen need registers. Three consumers have none for 128 keys beside them, two beside
  // seven such warps none where something is to be looked up, and none for 80 of 256-wide heads
  // where there are page tables, whose boxes are larger in 64.
  const bool is_narrow = tile.warpgroups == 3, is_wide = dims.dim_v > 128;
  const bool is_plain = scores == Scores::kPlain, is_dense = layouts == Layouts::kDense;
  if (is_narrow) {
    tile.tile_k = 96;
  } else if (is_wide) {
    if (!is_dense) tile.tile_k = 64;
    if (scores == Scores::kMasked) tile.tile_k = 48;
  } else {
    tile.tile_k = !is_plain ? 80 : is_dense ? 128 : 96;
  }
  // Three warps widen a tile in more time than consumers take; seven are enough where those leave
  // registers for them: a product of 256 columns has more than 512 threads may have each.
  tile.supply_warpgroups = is_narrow || is_wide ? 1 : 2;
  tile.producer_registers = is_narrow ? 56 : is_wide || !is_dense ? 72 : 64;
  tile.consumer_registers = is_narrow ? 152 : is_wide ? 216 : is_dense ? 192 : 184;
  tile.stages = is_wide ? 3 : 4;
  tile.load_slots = 4;
  while (PrefillMemory(dims, tile).bytes > most_shared_bytes()) --tile.load_slots;
  return tile;
}

constexpr PrefillTile prefill_tile(HeadDims dims, Scores scores, Layouts layouts, Stored stored) {
  return stored == Stored::kCodes ? prefill_code_tile(dims, scores, layouts)
                                  : prefill_tile(dims, scores, layouts);
}

}  // namespace wh::cuda
