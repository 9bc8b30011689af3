// The warps of sm90_decode that widen tiles of codes: from the ring that TMA fills into the one
// that consumers read.
#pragma once

#include <cstdint>

#include "core/kv_tensor.h"
#include "cuda/sm90/common/ring.cuh"
#include "cuda/sm90/common/widen.cuh"
#include "cuda/sm90/decode/block.cuh"

namespace wh::cuda::decode {

// Who arrives at a slot that is full: those who widen, or the thread that asks TMA for it.
template <typename Tile>
constexpr int widening_warps() {
  if constexpr (Tile::kWidens) {
    return Tile::kWideners / 32;
  } else {
    return 1;
  }
}

__device__ __forceinline__ KvPlace place_of_key(const KeyRows& rows, const PackedItem& item,
                                                int32_t key) {
  const auto at = rows.place(key);
  return {at.batch_idx, item.head_kv, at.token_idx, item.sequence.batch_idx};
}

// Some of a tile of codes in panels of 128 columns, on their way to one in panels of 64. A warp
// takes 8 rows and 64 columns at a time, a lane 16 codes of a row: the chunks of eight lanes lie in
// as many banks, and where they go is a step of 1,024 bytes from piece to piece. As many loads of a
// warp are under way at once as registers hold: a lone warp has nobody to hide its steps behind.
template <typename Tile, int kDim, int kFirst>
class CodePieces {
  static constexpr int kWarps = Tile::kWideners / 32;
  static constexpr int kRowGroups = Tile::kTileK / 8;
  static constexpr int kPieces = kRowGroups * (kDim / kPanelColumns);
  static constexpr int kMost = (kPieces + kWarps - 1) / kWarps;  // of a warp
  static constexpr int kAtOnce = Tile::kPiecesAtOnce;
  static constexpr int kCount = kMost - kFirst < kAtOnce ? kMost - kFirst : kAtOnce;
  // Of codes, and of each half of what they become.
  static constexpr int kPieceBytes = 8 * kPanelRowBytes;

 public:
  static constexpr int kNext = kFirst + kCount;
  static constexpr bool kIsLast = kNext == kMost;

  __device__ __forceinline__ CodePieces(const unsigned char* codes, int thread)
      : warp_(thread / 32), lane_(thread % 32) {
    // Places of pieces are counted anew for each tile: kept, they are a register each.
    asm volatile("" : "+r"(warp_));
    const uint32_t row = lane_ % 8, chunk = lane_ / 8;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!exists(i)) break;
      const uint32_t piece = warp_ + (kFirst + i) * kWarps;
      const uint32_t half = piece / kRowGroups % 2;  // of a row's 128 codes
      const uint32_t at =
          (piece / (2 * kRowGroups) * kRowGroups + piece % kRowGroups) * kPieceBytes +
          row * kPanelRowBytes + ((4 * half + chunk) ^ row) * 16;
      words_[i] = *reinterpret_cast<const uint4*>(codes + at);
    }
  }

  template <Quantised kFormat, typename T>
  __device__ __forceinline__ void store(unsigned char* wide) const {
    const uint32_t row = lane_ % 8;
    unsigned char* even = wide + (warp_ + kFirst * kWarps) * kPieceBytes + row * kPanelRowBytes;
    unsigned char* odd = even + ((lane_ / 8 * 2 + 1) ^ row) * 16;
    even += (lane_ / 8 * 2 ^ row) * 16;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!exists(i)) break;
      const uint2 a = widen_four<kFormat, T>(words_[i].x), b = widen_four<kFormat, T>(words_[i].y);
      const uint2 c = widen_four<kFormat, T>(words_[i].z), d = widen_four<kFormat, T>(words_[i].w);
      constexpr int kStep = kWarps * kPieceBytes;
      *reinterpret_cast<uint4*>(even + i * kStep) = make_uint4(a.x, a.y, b.x, b.y);
      *reinterpret_cast<uint4*>(odd + i * kStep) = make_uint4(c.x, c.y, d.x, d.y);
    }
  }

 private:
  __device__ __forceinline__ bool exists(int i) const {
    const int first = (kFirst + i) * kWarps;
    return first + kWarps <= kPieces || first + warp_ < kPieces;
  }

  uint32_t warp_, lane_;
  uint4 words_[kCount];
};

template <typename Tile, typename T>
class Widener {
 public:
  __device__ __forceinline__ Widener(const DecodeArgs& args, const PackedItem& item,
                                     const Shared<Tile>& shared, unsigned char* smem)
      : args_(args),
        item_(item),
        shared_(shared),
        smem_(smem),
        thread_(threadIdx.x - Tile::kConsumers - 32) {}

  __device__ __forceinline__ void run() const {
    ptx::wait_for_dependency();  // scales
    const KvPlace all{0, item_.head_kv, 0, item_.sequence.batch_idx};
    const float scale_k = has_token_scales(args_.stored_k) ? 0 : args_.stored_k.scale(all, 0);
    const float* const first_k = first_scale(args_.stored_k);
    const float* const first_v = first_scale(args_.stored_v);
    Ring<Tile::kLoadSlots> loads;
    Ring<Tile::kSlots> ring;
    const int count = 2 * (item_.tile_end - item_.tile_begin);
    // A tile ahead: nobody waits for scales where their codes are there.
    float scale = first_k == nullptr ? scale_k : scale_of(args_.stored_k, first_k, 0);
#pragma unroll 1
    for (int n = 0; n < count; ++n) {
      float next_scale = scale_k;
      if (n % 2 == 0) {
        if (first_v != nullptr) next_scale = scale_of(args_.stored_v, first_v, n / 2);
      } else {
        if (first_k != nullptr) next_scale = scale_of(args_.stored_k, first_k, n / 2 + 1);
      }
      ptx::mbarrier_wait(shared_.loads_full + 8 * loads.slot, loads.parity);
      const uint32_t empty = n < Tile::kSlots ? 0 : shared_.empty + 8 * ring.slot;
      if (n % 2 == 0) {
        widen<Tile::kDimQk>(args_.stored_k.format, loads.slot, ring, empty);
      } else {
        widen<Tile::kDimV>(args_.stored_v.format, loads.slot, ring, empty);
      }
      if (thread_ < Tile::kTileK) {
        reinterpret_cast<float*>(smem_ + Shared<Tile>::kScalesOffset +
                                 ring.slot * Tile::kScaleBytes)[thread_] = scale;
      }
      scale = next_scale;
      ptx::async_proxy_fence();
      __syncwarp();
      if (thread_ % 32 == 0) {
        ptx::mbarrier_arrive(shared_.loads_empty + 8 * loads.slot);
        ptx::mbarrier_arrive(shared_.full + 8 * ring.slot);
      }
      loads.next();
      ring.next();
    }
  }

 private:
  // Of the sequence's first key where keys lie side by side; null: tokens have none.
  __device__ __forceinline__ const float* first_scale(const KvTensor& stored) const {
    if (!has_token_scales(stored)) return nullptr;
    const auto rows = item_.key_rows(args_.attention);
    return stored.scales_data + stored.scale_offset({rows.key_batch, item_.head_kv, rows.first_key,
                                                     item_.sequence.batch_idx});
  }
  // That of the thread's key of the block's `tile`-th tile. Of keys that nobody sees none may be
  // there.
  __device__ __forceinline__ float scale_of(const KvTensor& stored, const float* first,
                                            int32_t tile) const {
    const int32_t key = (item_.tile_begin + tile) * Tile::kTileK + thread_;
    if (thread_ >= Tile::kTileK || key < item_.seen.begin || key >= item_.seen.end) return 1;
    if (item_.pages == nullptr) return first[key * stored.stride_scales[2]];
    return stored.scale(place_of_key(item_.key_rows(args_.attention), item_, key), 0);
  }

  // Into the slot that `ring` is at, as soon as it is empty; 0: it is.
  template <int kDim, int kFirst = 0>
  __device__ __forceinline__ void widen(Quantised format, int load_slot,
                                        const Ring<Tile::kSlots>& ring, uint32_t empty) const {
    using Pieces = CodePieces<Tile, kDim, kFirst>;
    const Pieces pieces(
        smem_ + Tile::kQueryBytes + Shared<Tile>::kWideBytes + load_slot * Tile::kLoadBytes,
        thread_);
    unsigned char* wide = smem_ + Tile::kQueryBytes + ring.slot * Tile::kSlotBytes;
    if (empty != 0) ptx::mbarrier_wait(empty, ring.parity ^ 1);
    if (format == Quantised::kE4m3) {
      pieces.template store<Quantised::kE4m3, T>(wide);
    } else {
      pieces.template store<Quantised::kInt8, T>(wide);
    }
    if constexpr (!Pieces::kIsLast) widen<kDim, Pieces::kNext>(format, load_slot, ring, 0);
  }

  const DecodeArgs& args_;
  const PackedItem& item_;
  const Shared<Tile>& shared_;
  unsigned char* smem_;
  int thread_;
};

}  // namespace wh::cuda::decode
