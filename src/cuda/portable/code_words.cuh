// Codes of four elements, a byte each, as two pairs of bf16, which hold every code exactly: what a
// warp multiplies without writing widened keys anywhere. 2 to 2.5 instructions an element.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "core/quantised.h"
#include "cuda/ptx/math.cuh"

namespace wh::cuda {

// a - b of pairs of bf16.
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  uint32_t difference;
  const uint32_t minus_one = 0xbf80bf80u;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(minus_one), "r"(a));
  return difference;
}

template <Quantised kFormat>
__device__ __forceinline__ void widen_word(uint32_t word, uint32_t (&to)[2]) {
  static_assert(kFormat != Quantised::kNone);
  if constexpr (kFormat == Quantised::kE4m3) {
#if __CUDA_ARCH__ >= 890
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2_raw halves =
          __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(word >> 16 * i), __NV_E4M3);
      const float2 both = __half22float2(halves);
      to[i] = ptx::pack<__nv_bfloat16>(both.x, both.y);
    }
#else
    // Exponent and mantissa where bf16 has them make a number 2^120 times too small, subnormal
    // codes too.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bytes = __byte_perm(word, 0, i == 0 ? 0x1404 : 0x3424);  // upper halves
      const uint32_t small = (bytes >> 4 & 0x07f007f0u) | (bytes & 0x80008000u);
      const uint32_t factor = 0x7b807b80u, zero = 0x80008000u;  // -0 changes no sign
      asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(to[i]) : "r"(small), "r"(factor), "r"(zero));
    }
    const uint32_t nan = ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
    if (nan != 0) {
      if (nan & 0x80u) to[0] |= 0x7fc0u;
      if (nan & 0x8000u) to[0] |= 0x7fc00000u;
      if (nan & 0x800000u) to[1] |= 0x7fc0u;
      if (nan & 0x80000000u) to[1] |= 0x7fc00000u;
    }
#endif
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // 0x43 in front of seven bits is 128 more than they are.
      const uint32_t bytes = __byte_perm(word, 0x43434343u, i == 0 ? 0x4140 : 0x4342);
      if constexpr (kFormat == Quantised::kQ4_0) {
        to[i] = subtract_pairs(bytes, 0x43084308u);  // and those are 8 more than the code
      } else {
        // The eighth, the sign, counts -128: with it 256 are too many, 0x4380.
        to[i] = subtract_pairs(bytes & 0xff7fff7fu, bytes & 0xff80ff80u);
      }
    }
  }
}

// The same byte of two words side by side: of bytes 0, 0, 1, 1 and 2, 2, 3, 3.
__device__ __forceinline__ uint32_t interleave_low(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5140);
}
__device__ __forceinline__ uint32_t interleave_high(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7362);
}

}  // namespace wh::cuda
