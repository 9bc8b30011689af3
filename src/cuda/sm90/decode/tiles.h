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
  static constexpr int kFittingSlots =
      (most_shared_bytes(kBlocksPerSm) - kQueryBytes) / (kSlotBytes + kBarrierBytes);
  static constexpr int kSlots = kFittingSlots < 12 ? kFittingSlots : 12;
  static constexpr int kSharedBytes = kQueryBytes + kSlots * (kSlotBytes + kBarrierBytes);

  static_assert(kDimQk % 64 == 0 && kDimV % 64 == 0 && kDimV <= kDimQk && kColumns <= 256);
  static_assert(kSlots >= 4);
};

// Of a thread, where there are two warpgroups of consumers and one of producers. Page tables take
// some of the producer.
template <Layouts kLayouts>
struct DecodeRegisters {
  static constexpr int kProducer = kLayouts == Layouts::kDense ? 24 : 40;
  static constexpr int kConsumer = kLayouts == Layouts::kDense ? 240 : 232;
};

}  // namespace wh::cuda
