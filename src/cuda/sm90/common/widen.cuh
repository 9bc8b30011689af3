// How warps widen 8-bit codes of K and V, between TMA, which brings tiles of them, and wgmma, which
// reads tiles of 16 bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "core/kv_tensor.h"
#include "cuda/common/clean_values.cuh"
#include "cuda/common/key_range.h"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/pairs.cuh"
#include "cuda/sm90/common/panels.h"

namespace wh::cuda {

__device__ __forceinline__ bool has_token_scales(const KvTensor& stored) {
  return stored.scales == Scales::kTokenHead;
}

// Four codes, the first in the lowest byte, as two pairs of T, exactly: both types hold all of
// them.
template <Quantised kFormat, typename T>
__device__ __forceinline__ uint2 widen_four(uint32_t word) {
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  uint32_t to[2];
  if constexpr (kFormat == Quantised::kE4m3) {
    const uint2 pairs = ptx::e4m3_to_pairs(word);
    if constexpr (kIsHalf) return pairs;
    to[0] = pairs.x, to[1] = pairs.y;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kFormat == Quantised::kE4m3) {
      const float2 both = __half22float2(reinterpret_cast<const __half2&>(to[i]));
      to[i] = ptx::pack<T>(both.x, both.y);
    } else if constexpr (kIsHalf) {
      // 0x64 in front of eight bits is 1024 more than they are; with the sign turned over they
      // count from -128.
      const uint32_t bytes = __byte_perm(word ^ 0x80808080u, 0x64646464u, i == 0 ? 0x4140 : 0x4342);
      to[i] = ptx::subtract_pairs<T>(bytes, 0x64806480u);
    } else {
      // 0x43 in front of seven bits is 128 more than they are. The eighth, the sign, counts -128:
      // with it 256 are too many, 0x4380.
      const uint32_t bytes = __byte_perm(word, 0x43434343u, i == 0 ? 0x4140 : 0x4342);
      to[i] = ptx::subtract_pairs<T>(bytes & 0xff7fff7fu, bytes & 0xff80ff80u);
    }
  }
  return {to[0], to[1]};
}

// One element, where speed does not matter.
__device__ __forceinline__ float widened_code(const KvTensor& stored, const KvPlace& at,
                                              int32_t column) {
  const uint8_t code = static_cast<const uint8_t*>(stored.data)[stored.offset(at) + column];
  const float value = stored.format == Quantised::kE4m3
                          ? __half2float(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3))
                          : static_cast<float>(static_cast<int8_t>(code));
  return value * stored.scale(at, column);
}

// What a warp widens of a tile, one block of 8 rows and 128 codes after another: panels of codes
// have as many columns, those of T 64, and the rows of both are 128 bytes in the same swizzle. A
// lane takes 16 codes of a row in each half of the panel, so that eight lanes, whose accesses are
// one of the memory's, have a row each and all of its banks. The blocks of a tile are dealt in
// turn, and the next tile's go on where these end: a warp that has one more of one tile has one
// less of another.
template <typename T, int kRows, int kDim, int kWarps>
struct WidenedTile {
  static constexpr int kPanels = (kDim + 2 * kPanelColumns - 1) / (2 * kPanelColumns);
  static constexpr int kRowBlocks = kRows / 8;
  static constexpr int kBlocks = kPanels * kRowBlocks;
  static constexpr int kBlockBytes = panel_bytes(8);
  static_assert(kRows % 8 == 0 && kDim % kPanelColumns == 0);

  int first;  // block, of this warp
  const unsigned char* codes;
  unsigned char* wide;

  static constexpr int next_first(int first) {
    const int next = first - kBlocks % kWarps;
    return next < 0 ? next + kWarps : next;
  }

  // Whether the panel of `block` has columns 64 to 127.
  static __device__ __forceinline__ bool has_second_half(int block) {
    return kDim % (2 * kPanelColumns) == 0 || block < (kPanels - 1) * kRowBlocks;
  }
  __device__ __forceinline__ const uint4* from(int block, int half) const {
    const int row = threadIdx.x % 8, chunk = threadIdx.x % 32 / 8 + 4 * half;
    return reinterpret_cast<const uint4*>(codes + block * kBlockBytes +
                                          chunk_offset(row, chunk, 8));
  }
  __device__ __forceinline__ uint4* to(int block, int half, int chunk_of_two) const {
    const int row = threadIdx.x % 8, chunk = threadIdx.x % 32 / 8 * 2 + chunk_of_two;
    const int wide_block = block + (block / kRowBlocks + half) * kRowBlocks;
    return reinterpret_cast<uint4*>(wide + wide_block * kBlockBytes + chunk_offset(row, chunk, 8));
  }

  template <Quantised kFormat>
  __device__ __forceinline__ void widen() const {
    constexpr int kHalves = kDim > kPanelColumns ? 2 : 1;
    constexpr int kBatch = 4 / kHalves;  // four loads under way
#pragma unroll 1
    for (int block = first; block < kBlocks; block += kBatch * kWarps) {
      uint4 words[kBatch][kHalves];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = block + i * kWarps;
        if (at >= kBlocks) break;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          if (half == 0 || has_second_half(at)) words[i][half] = *from(at, half);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = block + i * kWarps;
        if (at >= kBlocks) break;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          if (half == 1 && !has_second_half(at)) break;
          const uint4 word = words[i][half];
          const uint2 a = widen_four<kFormat, T>(word.x), b = widen_four<kFormat, T>(word.y);
          const uint2 c = widen_four<kFormat, T>(word.z), d = widen_four<kFormat, T>(word.w);
          *to(at, half, 0) = make_uint4(a.x, a.y, b.x, b.y);
          *to(at, half, 1) = make_uint4(c.x, c.y, d.x, d.y);
        }
      }
    }
  }
  __device__ __forceinline__ void widen(Quantised format) const {
    if (format == Quantised::kE4m3) {
      widen<Quantised::kE4m3>();
    } else {
      widen<Quantised::kInt8>();
    }
  }

  // clean_values() of what this thread has widened.
  __device__ __forceinline__ bool clean(Keys present, int32_t tile_key) const {
    bool dropped = false;
#pragma unroll 1
    for (int block = first; block < kBlocks; block += kWarps) {
      const int32_t key = tile_key + block % kRowBlocks * 8 + static_cast<int32_t>(threadIdx.x % 8);
      const bool exists = key >= present.begin && key < present.end;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= 2 && !has_second_half(block)) break;
        dropped |= clean_chunk<T>(to(block, i / 2, i % 2), exists);
      }
    }
    return dropped;
  }
};

}  // namespace wh::cuda
