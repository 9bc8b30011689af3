// Arithmetic on two 16-bit elements of a register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace wh::cuda::ptx {

// a - b.
template <typename T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t subtract_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t difference;
  const uint32_t minus_one = 0xbf80bf80u;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(minus_one), "r"(a));
  return difference;
}
template <>
__device__ __forceinline__ uint32_t subtract_pairs<__half>(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

// Of pairs of bf16. |pair|, where a number that is not finite becomes NaN, which max_pairs() passes
// over.
__device__ __forceinline__ uint32_t finite_magnitudes(uint32_t pair) {
  uint32_t magnitudes;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(magnitudes)
      : "r"(pair), "r"(0u), "r"(pair & 0x7fff7fffu));
  return magnitudes;
}
__device__ __forceinline__ uint32_t max_pairs(uint32_t a, uint32_t b) {
  uint32_t larger;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Four e4m3, the first in the lowest byte, as two pairs of f16. From halves of a register: taken
// apart in C++ each second pair cost a shift.
__device__ __forceinline__ uint2 e4m3_to_pairs(uint32_t word) {
  uint2 pairs;
  asm("{\n.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(pairs.x), "=r"(pairs.y)
      : "r"(word));
  return pairs;
}

}  // namespace wh::cuda::ptx
