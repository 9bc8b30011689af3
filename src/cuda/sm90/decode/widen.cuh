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

// In what unit a tile's weights by scales of V's tokens, and all sums from there on, are counted:
// beside the scales.
struct ValueUnit {
  float change;      // from the unit before, what sums are multiplied by
  uint32_t in_bf16;  // whether the values are of bf16, not f16
};

// Scales of V's tokens as far as they were seen: which power of two keeps weights by scales, of up
// to 2^15, within f16, and whether that leaves enough bits for those of small scales. What is below
// 2^-25 f16 loses, and of a row some weight is 2^7: under the least scale, 2^-8 of the largest,
// 2^16 keys that are lost beside it are 2^-8 of it.
class ScaleRange {
 public:
  // Of a warp's keys; a lane's is |scale|.
  __device__ __forceinline__ void add(uint32_t magnitude, bool is_seen) {
    const bool is_finite = magnitude < 0x7f800000u;
    most_ = max(most_, __reduce_max_sync(~0u, is_seen && is_finite ? magnitude : 0u));
    least_ = min(least_, __reduce_min_sync(~0u, !is_seen ? least_ : is_finite ? magnitude : 0u));
  }
  // What scales are multiplied by, as f32 has it: they then are below 1.
  __device__ __forceinline__ uint32_t factor() const {
    return static_cast<uint32_t>(max(exponent(), 1)) << 23;
  }
  __device__ __forceinline__ bool fits() const {
    return exponent() > 0 && __uint_as_float(least_) * 256 >= __uint_as_float(most_);
  }

 private:
  __device__ __forceinline__ int exponent() const { return 253 - static_cast<int>(most_ >> 23); }

  uint32_t most_ = 0, least_ = 0x7f800000u;
};

template <typename Tile>
class Widener {
 public:
  __device__ __forceinline__ Widener(const DecodeArgs& args, const PackedItem& item,
                                     const Shared<Tile>& shared, unsigned char* smem)
      : args_(args),
        item_(item),
        shared_(shared),
        smem_(smem),
        warp_((threadIdx.x - Tile::kConsumers - 32) / 32),
        first_(warp_) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (int32_t tile = item_.tile_begin; tile < item_.tile_end; ++tile) {
      begin();
      if (has_token_scales(args_.stored_k) && warp_ == 0) pass_scales(1);
      widen<__half, Tile::kDimQk>(args_.stored_k.format);
      finish();
      begin();
      bool in_bf16 = false;
      if (has_token_scales(args_.stored_v)) {
        const uint32_t before = range_.factor();
        add_scales(tile * Tile::kTileK);
        in_bf16 = !range_.fits();
        if (warp_ == 1) pass_values_scales(before, in_bf16);
      }
      if (in_bf16) {
        widen<__nv_bfloat16, Tile::kDimV>(args_.stored_v.format);
      } else {
        widen<__half, Tile::kDimV>(args_.stored_v.format);
      }
      finish();
    }
  }

 private:
  // Once the next tile of codes is there, and a slot for what it becomes.
  __device__ __forceinline__ void begin() const {
    ptx::mbarrier_wait(shared_.empty + 8 * ring_.slot, ring_.parity ^ 1);
    ptx::mbarrier_wait(shared_.loads_full + 8 * loads_.slot, loads_.parity);
  }
  __device__ __forceinline__ void finish() {
    ptx::async_proxy_fence();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      ptx::mbarrier_arrive(shared_.loads_empty + 8 * loads_.slot);
      ptx::mbarrier_arrive(shared_.full + 8 * ring_.slot);
    }
    loads_.next();
    ring_.next();
  }

  // That of row lane + 32 i of the tile.
  __device__ __forceinline__ float scale(int i) const {
    return reinterpret_cast<const float*>(
        smem_ + Shared<Tile>::load_scales_offset(loads_.slot))[threadIdx.x % 32 + 32 * i];
  }
  // In the order in which a consumer's thread asks for them: 4 at once, of columns 16 i + 2 c +
  // {0, 1, 8, 9}.
  __device__ __forceinline__ void pass_scales(float factor) const {
    const int lane = threadIdx.x % 32;
    const int at = lane / 16 * 16 + lane % 8 / 2 * 4 + lane / 8 % 2 * 2 + lane % 2;
#pragma unroll
    for (int i = 0; i < Tile::kTileK / 32; ++i) {
      reinterpret_cast<float*>(smem_ + Shared<Tile>::scales_offset(ring_.slot))[at + 32 * i] =
          scale(i) * factor;
    }
  }
  __device__ __forceinline__ void pass_values_scales(uint32_t before, bool in_bf16) const {
    const uint32_t factor = range_.factor();
    pass_scales(__uint_as_float(factor));
    // Sums more than 2^126 below the unit are 0.
    const int exponent = 127 + static_cast<int>(factor >> 23) - static_cast<int>(before >> 23);
    *reinterpret_cast<ValueUnit*>(smem_ + Shared<Tile>::scales_offset(ring_.slot) +
                                  Tile::kLoadScaleBytes) = {
        exponent > 0 ? __uint_as_float(exponent << 23) : 0.0f, in_bf16 ? 1u : 0u};
    *reinterpret_cast<uint32_t*>(smem_ + Shared<Tile>::unit_offset()) = factor;
  }
  __device__ __forceinline__ void add_scales(int32_t tile_key) {
#pragma unroll
    for (int i = 0; i < Tile::kTileK / 32; ++i) {
      const int32_t key = tile_key + static_cast<int32_t>(threadIdx.x % 32) + 32 * i;
      range_.add(__float_as_uint(scale(i)) & 0x7fffffffu,
                 key >= item_.seen.begin && key < item_.seen.end);
    }
  }

  template <typename Wide, int kDim>
  __device__ __forceinline__ void widen(Quantised format) {
    const WidenedTile<Wide, Tile::kTileK, kDim, Tile::kWideners / 32> tile{
        first_,
        smem_ + Tile::kQueryBytes + Shared<Tile>::kWideBytes + loads_.slot * Tile::kLoadBytes,
        smem_ + Tile::kQueryBytes + ring_.slot * Tile::kSlotBytes};
    tile.widen(format);
    first_ = tile.next_first(first_);
  }

  const DecodeArgs& args_;
  const PackedItem& item_;
  const Shared<Tile>& shared_;
  unsigned char* smem_;
  int warp_;
  int first_;  // group of rows of the next tile that is this warp's
  Ring<Tile::kLoadSlots> loads_;
  Ring<Tile::kSlots> ring_;
  ScaleRange range_;
};

}  // namespace wh::cuda::decode
