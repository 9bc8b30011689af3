// Rows of K or V of a tile as they lie in the cache, by format.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "core/element.h"
#include "core/quantised.h"

namespace wh::cuda {
namespace {

template <typename Body>
__device__ __forceinline__ void with_format(Quantised format, const Body& body) {
  switch (format) {
    case Quantised::kNone:  // has no codes
      break;
    case Quantised::kE4m3:
      return body.template operator()<Quantised::kE4m3>();
    case Quantised::kInt8:
      return body.template operator()<Quantised::kInt8>();
    case Quantised::kQ8_0:
      return body.template operator()<Quantised::kQ8_0>();
    case Quantised::kQ4_0:
      return body.template operator()<Quantised::kQ4_0>();
  }
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// Rows of K or V of a tile in shared memory, as they lie in the cache.
template <Quantised kFormat>
struct CodeRows {
  const unsigned char* data;
  int pitch;  // bytes

  static constexpr bool kHasBlocks = is_block_format(kFormat);
  static constexpr int kBlockBytes = static_cast<int>(stored_bytes(kFormat, Dtype::kF32, 32));
  static constexpr int kScaleBytes = kHasBlocks ? 2 : 0;

  // Word `word` of the codes of 32 columns: of eight, or of four in four bits.
  __device__ __forceinline__ uint32_t word(int row, int block, int word) const {
    const unsigned char* const at =
        data + row * pitch + block * kBlockBytes + kScaleBytes + 4 * word;
    if constexpr (!kHasBlocks) return *reinterpret_cast<const uint32_t*>(at);
    // Every other block's codes lie two bytes off.
    const auto shift = static_cast<uint32_t>(block % 2 == 0 ? 2 : 0);
    const auto* const words = reinterpret_cast<const uint32_t*>(at - shift);
    return __funnelshift_r(words[0], words[1], 8 * shift);
  }
  // Four columns from 4 * `piece` on of a block, ready for widen_word().
  __device__ __forceinline__ uint32_t codes(int row, int block, int piece) const {
    if constexpr (kFormat != Quantised::kQ4_0) return word(row, block, piece);
    return word(row, block, piece % 4) >> (piece < 4 ? 0 : 4) & 0x0f0f0f0fu;
  }
  // Both halves of columns 4 * `piece` and 16 + 4 * `piece`.
  __device__ __forceinline__ void codes(int row, int block, int piece, uint32_t (&to)[2]) const {
    to[0] = word(row, block, piece);
    if constexpr (kFormat == Quantised::kQ4_0) {
      to[1] = to[0] >> 4 & 0x0f0f0f0fu;
      to[0] &= 0x0f0f0f0fu;
    } else {
      to[1] = word(row, block, piece + 4);
    }
  }
  __device__ __forceinline__ float scale(int row, int block) const {
    return __half2float(*reinterpret_cast<const __half*>(data + row * pitch + block * kBlockBytes));
  }
};
}  // namespace
}  // namespace wh::cuda
