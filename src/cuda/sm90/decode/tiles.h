// Tile sizes of sm90_decode by head dimensions, and what they cost in shared memory.
#pragma once

#include "cuda/common/packed_rows.h"
#include "cuda/sm90/common/panels.h"

namespace wh::cuda {

constexpr int kDecodeTileQ = 64;  // wgmma's M

// One instantiation. Narrower problems use it too: TMA fills the columns they lack with zeros
// without reading anything, and the tensor cores have slack.
template <int kDimQk_, int kDimV_>
struct DecodeTile {
  static constexpr int kDimQk = kDimQk_, kDimV = kDimV_;
  static constexpr int kTileQ = kDecodeTileQ;
  // As many keys as make a step worth its barriers, in slots small enough for a deep ring.
  static constexpr int kTileK = kDimV > 256 ? 32 : 64;
  // The steps of one block of narrow heads take as long as its keys need to arrive. Two blocks of a
  // multiprocessor hide each other's, and short caches are cut finer: on an H200 8 % at 64K keys of
  // dim 128, 13 % at 4K. One block with tiles of 128 keys gains as much at 64K and loses 15 % at
  // 4K.
  static constexpr int kBlocksPerSm = kDimQk <= 128 ? 2 : 1;
  // 64 x 256 f32 sums are 128 registers a thread: wider V takes a second warpgroup, which repeats
  // the scores.
  static constexpr int kWarpgroups = kDimV > 256 ? 2 : 1;
  static constexpr int kConsumers = 128 * kWarpgroups;
  // A lone producer warp is free beside one warpgroup; beside two it would cost them registers
  // that only a whole producer warpgroup can give back.
  static constexpr int kThreads = kConsumers + (kWarpgroups == 1 ? 32 : 128);
  static constexpr int kColumns = kDimV / kWarpgroups;  // of V, a warpgroup

  static constexpr int kQueryBytes = kTileQ * kDimQk * 2;
  static constexpr int kSlotBytes = kTileK * (kDimQk > kDimV ? kDimQk : kDimV) * 2;
  static constexpr int kBarrierBytes = 16;  // of a slot
  // Whether warpgroups compute half of the columns of the scores each, and exchange them, in place
  // of all of them.
  static constexpr bool kHalvesScores = false;
  // The slots that TMA fills, and the columns of their panels. Those of codes are others.
  static constexpr bool kWidens = false;
  static constexpr int kStoredColumns = kPanelColumns;
  static constexpr int kFittingSlots =
      (most_shared_bytes(kBlocksPerSm) - kQueryBytes) / (kSlotBytes + kBarrierBytes);
  static constexpr int kSlots = kFittingSlots < 12 ? kFittingSlots : 12;
  static constexpr int kLoadSlots = kSlots, kLoadBytes = kSlotBytes;
  static constexpr int kRingBytes = kSlots * kSlotBytes;
  static constexpr int kSharedBytes = kQueryBytes + kRingBytes + kSlots * kBarrierBytes;

  static_assert(kDimQk % 64 == 0 && kDimV % 64 == 0 && kDimV <= kDimQk && kColumns <= 256);
  static_assert(kSlots >= 4);
};

// One over codes of a byte each. TMA fills a ring of tiles of codes; warps beside the producer
// widen them to f16 into a short ring of tiles, which consumers read as they read any other, and
// pass on what scales tokens have.
//
// Bound: shared memory, 128 bytes a clock. A code of K is written by TMA, read, written as two
// bytes and read as two by wgmma, which reads as many of Q where a tile has 64 keys: 8 bytes, and 6
// of V. At 512 both warpgroups read K, and Q twice for 32 keys: 16 and 6. That is 18 codes a clock
// up to 256 and 11 at 512, where an H200's memory hands an SM some 19.
template <int kDimQk_, int kDimV_>
struct DecodeCodeTile : DecodeTile<kDimQk_, kDimV_> {
  using Base = DecodeTile<kDimQk_, kDimV_>;
  static constexpr bool kWidens = true;
  static constexpr int kStoredColumns = 2 * kPanelColumns;
  // Where there is one block of one warpgroup, a second warpgroup of them.
  static constexpr int kWideners =
      Base::kBlocksPerSm == 1 && Base::kWarpgroups == 1 ? 7 * 32 : 3 * 32;
  static constexpr int kThreads = Base::kConsumers + 32 + kWideners;

  // Two warpgroups that both computed all scores read K twice and Q twice for 32 keys, half of what
  // passes shared memory. Their halves take 4 bytes a score and warpgroup, written and read.
  static constexpr bool kHalvesScores = Base::kWarpgroups == 2;
  static constexpr int kHalvesBytes = kHalvesScores ? Base::kConsumers * Base::kTileK / 2 * 4 : 0;
  // Widened: some are read, some are ready, one is written.
  static constexpr int kSlots = Base::kWarpgroups == 1 ? 4 : 3;
  // Scales of tokens: of a slot of codes as they come, of a widened one with their ValueUnit.
  static constexpr int kLoadScaleBytes = Base::kTileK * 4;
  static constexpr int kScaleBytes = kLoadScaleBytes + 16;
  static constexpr int kRowBytes = Base::kTileQ * 4 + 16;  // factors of rows, and the unit of sums
  static constexpr int kLoadBytes = Base::kSlotBytes / 2;
  static constexpr int kFittingSlots =
      (most_shared_bytes(Base::kBlocksPerSm) - Base::kQueryBytes - kRowBytes - kHalvesBytes -
       kSlots * (Base::kSlotBytes + kScaleBytes + Base::kBarrierBytes)) /
      (kLoadBytes + kLoadScaleBytes + Base::kBarrierBytes);
  static constexpr int kLoadSlots = kFittingSlots < 12 ? kFittingSlots : 12;
  static constexpr int kRingBytes = kSlots * Base::kSlotBytes + kLoadSlots * kLoadBytes;
  static constexpr int kSharedBytes = Base::kQueryBytes + kRingBytes + kSlots * kScaleBytes +
                                      kLoadSlots * kLoadScaleBytes + kRowBytes + kHalvesBytes +
                                      (kSlots + kLoadSlots) * Base::kBarrierBytes;

  // Registers of a thread of producer and wideners, and of a consumer, out of what the launch has
  // for all of them. Page tables take some of the producer.
  static constexpr int supply_registers(Layouts layouts) {
    if (Base::kBlocksPerSm == 2) return 72;
    if (Base::kWarpgroups == 1) return 128;
    return layouts == Layouts::kDense ? 72 : 80;
  }
  static constexpr int consumer_registers(Layouts layouts) {
    if (Base::kBlocksPerSm == 2) return 184;
    if (Base::kWarpgroups == 1) return 248;
    return layouts == Layouts::kDense ? 216 : 208;
  }

  static_assert(kDimQk_ % kStoredColumns == 0 && kDimV_ % kStoredColumns == 0);
  static_assert(kLoadSlots >= 3);
};

// Of a thread, where there are two warpgroups of consumers and one of producers. Page tables take
// some of the producer.
template <Layouts kLayouts>
struct DecodeRegisters {
  static constexpr int kProducer = kLayouts == Layouts::kDense ? 24 : 40;
  static constexpr int kConsumer = kLayouts == Layouts::kDense ? 240 : 232;
};

}  // namespace wh::cuda
