// Quantised keys and values as kernels load them: four columns of a row by the word in which their
// codes lie. What core/kv_tensor.h says of an element is what comes out, bit by bit; index
// arithmetic and conversions alone, for host and device, so that the host's tests hold it to that.
#pragma once

#include "core/kv_tensor.h"

namespace wh::cuda {

// Four columns from a multiple of four on, in bytes from the tensor's first.
struct CodesAt {
  int64_t codes;  // 16 bits of two codes of q4_0 each, else a byte a code
  int64_t scale;  // f16, of a block
};
// `first`: the row's offset in elements, a multiple of a block's where there are blocks.
constexpr CodesAt codes_at(Quantised format, int64_t first, int column) {
  const int64_t block = first / kBlockElements + column / static_cast<int>(kBlockElements);
  const int in_block = column % static_cast<int>(kBlockElements);
  switch (format) {
    case Quantised::kNone:  // has no codes
    case Quantised::kE4m3:
    case Quantised::kInt8:
      break;
    case Quantised::kQ8_0: {
      const int64_t at = block * static_cast<int64_t>(sizeof(Q8_0));
      return {at + static_cast<int64_t>(offsetof(Q8_0, codes)) + in_block, at};
    }
    case Quantised::kQ4_0: {
      const int64_t at = block * static_cast<int64_t>(sizeof(Q4_0));
      constexpr int kHalf = kBlockElements / 2;
      return {at + static_cast<int64_t>(offsetof(Q4_0, codes)) + in_block % kHalf, at};
    }
  }
  return {first + column, 0};
}

// A byte as the lowest one of 2^23 makes a float without a conversion, which has a quarter of the
// rate or less; `least` is what a byte of 0 stands for.
constexpr float widen_byte(uint32_t byte, float least) {
  return std::bit_cast<float>(0x4b000000u | byte) - (0x1p23f - least);
}

// The codes of four columns without their scale, the first in the word's lowest byte.
constexpr void widen_codes(Quantised format, int column, uint32_t word, float (&to)[4]) {
  // An int8 code with its sign bit turned over counts from -128.
  const uint32_t bytes = format == Quantised::kE4m3   ? word
                         : format != Quantised::kQ4_0 ? word ^ 0x80808080u
                         : column % 32 < 16           ? word & 0x0f0f0f0fu
                                                      : word >> 4 & 0x0f0f0f0fu;
  const float least = format == Quantised::kQ4_0 ? -8 : -128;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = bytes >> 8 * i & 0xffu;
    to[i] = format == Quantised::kE4m3 ? to_float(E4m3{static_cast<uint8_t>(byte)})
                                       : widen_byte(byte, least);
  }
}

// Whether four columns of every row lie in one aligned word; those of blocks in two, as blocks are
// aligned to 2 bytes.
inline bool is_whole_words(const KvTensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.data) % 4 != 0 || tensor.stride[3] != 1) return false;
  for (size_t i = 0; i < 3; ++i) {
    if (tensor.stride[i] % 4 != 0) return false;
  }
  return tensor.dim % 4 == 0;
}

}  // namespace wh::cuda
