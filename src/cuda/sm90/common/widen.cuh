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

// What a warp widens of a tile, one group of 8 rows after another, all columns of them: panels of
// codes have 128 columns, those of T 64, and the rows of both are 128 bytes in the same swizzle. A
// lane takes 16 codes of a row at a time, so that eight lanes, whose accesses are one of the
// memory's, have a row each and all of its banks. From column to column addresses differ by
// constants: a lone warp has nobody to hide arithmetic on them behind. The groups of a tile are
// dealt in turn, and the next tile's go on where these end: a warp that has one more of one tile
// has one less of another.
template <typename T, int kRows, int kDim, int kWarps>
struct WidenedTile {
  static constexpr int kGroups = kRows / 8;
  static constexpr int kGroupBytes = panel_bytes(8);
  static constexpr int kPanels = kDim / kPanelColumns;  // of T
  static_assert(kRows % 8 == 0 && kDim % kPanelColumns == 0);

  int first;  // group, of this warp
  const unsigned char* codes;
  unsigned char* wide;

  static constexpr int next_first(int first) {
    const int next = first - kGroups % kWarps;
    return next < 0 ? next + kWarps : next;
  }

  // Where this lane's 16 codes of an even panel of T begin, and their first and second halves once
  // widened, of group 0.
  struct Lane {
    uint32_t codes, wide[2];
  };
  static __device__ __forceinline__ Lane lane() {
    const uint32_t row = threadIdx.x % 8, chunk = threadIdx.x % 32 / 8;
    const auto at = [&](uint32_t chunk) { return row * kPanelRowBytes + (chunk ^ row) * 16; };
    return {at(chunk), {at(2 * chunk), at(2 * chunk + 1)}};
  }
  // The codes of an odd panel of T are the second half of a row.
  static __device__ __forceinline__ uint32_t codes_offset(uint32_t even, int panel) {
    return (panel % 2 == 0 ? even : even ^ kPanelRowBytes / 2) + panel / 2 * panel_bytes(kRows);
  }

  template <Quantised kFormat>
  __device__ __forceinline__ void widen() const {
    constexpr int kAtOnce = kPanels < 4 ? kPanels : 4;  // loads under way
    const Lane at = lane();
#pragma unroll 1
    for (int group = first; group < kGroups; group += kWarps) {
      const unsigned char* from = codes + group * kGroupBytes;
      unsigned char* to = wide + group * kGroupBytes;
#pragma unroll
      for (int begin = 0; begin < kPanels; begin += kAtOnce) {
        uint4 words[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce && begin + i < kPanels; ++i) {
          words[i] = *reinterpret_cast<const uint4*>(from + codes_offset(at.codes, begin + i));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce && begin + i < kPanels; ++i) {
          const uint4 word = words[i];
          const uint2 a = widen_four<kFormat, T>(word.x), b = widen_four<kFormat, T>(word.y);
          const uint2 c = widen_four<kFormat, T>(word.z), d = widen_four<kFormat, T>(word.w);
          unsigned char* panel = to + (begin + i) * panel_bytes(kRows);
          *reinterpret_cast<uint4*>(panel + at.wide[0]) = make_uint4(a.x, a.y, b.x, b.y);
          *reinterpret_cast<uint4*>(panel + at.wide[1]) = make_uint4(c.x, c.y, d.x, d.y);
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
    const Lane at = lane();
    bool dropped = false;
#pragma unroll 1
    for (int group = first; group < kGroups; group += kWarps) {
      const int32_t key = tile_key + group * 8 + static_cast<int32_t>(threadIdx.x % 8);
      const bool exists = key >= present.begin && key < present.end;
#pragma unroll
      for (int i = 0; i < 2 * kPanels; ++i) {
        unsigned char* chunk =
            wide + group * kGroupBytes + i / 2 * panel_bytes(kRows) + at.wide[i % 2];
        dropped |= clean_chunk<T>(reinterpret_cast<uint4*>(chunk), exists);
      }
    }
    return dropped;
  }
};

}  // namespace wh::cuda
