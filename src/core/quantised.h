// How quantised keys and values are stored: the bytes of each format, widening them exactly and
// rounding to them, to nearest even. Scalar on purpose: kernels widen with SIMD
// (cpu/common/kv_rows-inl.h), everything else is not hot.
//
//   e4m3   8 bits: sign, 4 of exponent (bias 7), 3 of mantissa; no infinity, 448 is the highest,
//          0x7f and 0xff are NaN. The OCP's "fn" format.
//   int8   8 bits, symmetric: no zero point
//   q8_0   blocks of 32 elements of a row: an f16 scale and 32 of int8. ggml's layout
//   q4_0   blocks of 32: an f16 scale and 16 bytes, of which byte i has element i in its low four
//          bits and element i + 16 in its high ones, 8 higher than it is. ggml's layout
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/float16.h"
#include "core/problem.h"

namespace wh {

struct E4m3 {
  uint8_t bits;
};
struct Int8 {
  int8_t bits;
};

constexpr int64_t kBlockElements = 32;
struct Q8_0 {
  Half scale;
  int8_t codes[kBlockElements];
};
struct Q4_0 {
  Half scale;
  uint8_t codes[kBlockElements / 2];
};
static_assert(sizeof(Q8_0) == 34 && alignof(Q8_0) == 2);
static_assert(sizeof(Q4_0) == 18 && alignof(Q4_0) == 2);

constexpr bool is_block_format(Quantised format) {
  switch (format) {
    case Quantised::kNone:
    case Quantised::kE4m3:
    case Quantised::kInt8:
      return false;
    case Quantised::kQ8_0:
    case Quantised::kQ4_0:
      return true;
  }
  __builtin_unreachable();  // validate() knows no other
}

// Of elements side by side, as many as whole blocks have; `dtype` is theirs where they are not
// quantised.
constexpr int64_t stored_bytes(Quantised format, Dtype dtype, int64_t elements) {
  switch (format) {
    case Quantised::kNone:
      return elements * static_cast<int64_t>(dtype_bytes(dtype));
    case Quantised::kE4m3:
    case Quantised::kInt8:
      return elements;
    case Quantised::kQ8_0:
      return elements / kBlockElements * static_cast<int64_t>(sizeof(Q8_0));
    case Quantised::kQ4_0:
      return elements / kBlockElements * static_cast<int64_t>(sizeof(Q4_0));
  }
  __builtin_unreachable();
}

// What the tensor's address must be a multiple of.
constexpr int64_t stored_alignment(Quantised format, Dtype dtype) {
  return is_block_format(format) ? 2 : stored_bytes(format, dtype, 1);
}

// For host and device, as are those below.
constexpr float to_float(Int8 value) { return value.bits; }
constexpr float to_float(E4m3 value) {
  const uint32_t sign = uint32_t{value.bits & 0x80u} << 24, magnitude = value.bits & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude >= 8) return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-9f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(subnormal));
}
constexpr float to_float(const Q8_0& block, int64_t idx) {
  return static_cast<float>(block.codes[idx]) * to_float(block.scale);
}
constexpr float to_float(const Q4_0& block, int64_t idx) {
  constexpr int64_t kHalf = kBlockElements / 2;
  const int code = idx < kHalf ? block.codes[idx] & 15 : block.codes[idx - kHalf] >> 4;
  return static_cast<float>(code - 8) * to_float(block.scale);
}

constexpr float kHighestE4m3 = 448;
constexpr float kHighestInt8 = 127;  // -128 is read, never written

// Not those of <cmath>: for host and device too.
constexpr bool is_nan(float value) { return value != value; }
constexpr float magnitude_of(float value) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0x7fffffffu);
}
constexpr float kNan = std::bit_cast<float>(0x7fc00000u);

// Beyond 448, infinity included, it is 448.
template <>
constexpr E4m3 from_float<E4m3>(float value) {
  const auto sign = static_cast<uint8_t>(std::bit_cast<uint32_t>(value) >> 24 & 0x80u);
  if (is_nan(value)) return {static_cast<uint8_t>(sign | 0x7f)};
  // By value: std::min() refers to its arguments, and devices have no address of the constant. What
  // nvcc makes of that ends in a trap, without a word.
  const float any = magnitude_of(value);
  const float magnitude = any < kHighestE4m3 ? any : kHighestE4m3;
  if (magnitude < 0x1p-6f) {  // subnormal result: let the adder round at 2^-9
    const auto rounded = std::bit_cast<uint32_t>(magnitude + 0x1p14f);
    return {static_cast<uint8_t>(sign | (rounded - std::bit_cast<uint32_t>(0x1p14f)))};
  }
  const auto bits = std::bit_cast<uint32_t>(magnitude);
  const uint32_t rounded = bits + 0x7ffffu + ((bits >> 20) & 1u) - (120u << 23);
  return {static_cast<uint8_t>(sign | (rounded >> 20))};
}

// To the nearest integer within [-most, most]; NaN, which has no code, becomes 0.
constexpr float round_to_code(float value, float most) {
  if (!(magnitude_of(value) <= most)) return is_nan(value) ? 0 : value < 0 ? -most : most;
  constexpr float kMagic = 0x1.8p23f;  // the adder rounds at 1
  return (value + kMagic) - kMagic;
}
template <>
constexpr Int8 from_float<Int8>(float value) {
  return {static_cast<int8_t>(round_to_code(value, kHighestInt8))};
}

// What is rounded to a code; a scale of 0 makes codes of 0. Processors make different NaN of the
// same operands, and stored bits must not tell them apart.
constexpr float unscaled(float value, float scale) {
  const float quotient = scale == 0 ? 0 : value / scale;
  return is_nan(quotient) ? kNan : quotient;
}

// The scale that gives the element farthest from 0 the highest code; NaN where that is.
constexpr float scale_of_largest(float largest, Quantised format) {
  const float highest = format == Quantised::kE4m3 ? kHighestE4m3 : kHighestInt8;
  return is_nan(largest) ? kNan : magnitude_of(largest) / highest;
}

// The element farthest from 0 of row(0) to row(count - 1), with its sign; NaN where one is NaN.
// Magnitudes are compared as integers, which have the same order, NaN behind infinity: a compiler
// makes vectors of that, and not of a loop that returns at a NaN.
template <typename Row>
constexpr float largest_of(const Row& row, int64_t count) {
  const auto magnitude = [&](int64_t i) {
    return static_cast<int32_t>(std::bit_cast<uint32_t>(row(i)) & 0x7fffffffu);
  };
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = magnitude(i) > most ? magnitude(i) : most;
  if (most > 0x7f800000) return kNan;
  if (most == 0) return 0;
  int64_t first = 0;
  while (magnitude(first) != most) ++first;
  return row(first);
}

// A block of row(0) to row(31). Codes are rounded by the scale that readers will have, which is
// f16.
template <typename Row>
constexpr void round_block(const Row& row, Q8_0& block) {
  const float largest = largest_of(row, kBlockElements);
  block.scale = from_float<Half>(scale_of_largest(largest, Quantised::kQ8_0));
  const float scale = to_float(block.scale);
  for (int64_t i = 0; i < kBlockElements; ++i) {
    block.codes[i] = from_float<Int8>(unscaled(row(i), scale)).bits;
  }
}
// The farthest element is -8 steps from 0, where the codes reach farther than on the other side.
template <typename Row>
constexpr void round_block(const Row& row, Q4_0& block) {
  const float largest = largest_of(row, kBlockElements);
  block.scale = from_float<Half>(is_nan(largest) ? kNan : largest / -8);
  const float scale = to_float(block.scale);
  const auto code = [&](float value) {
    return static_cast<uint8_t>(std::min(round_to_code(unscaled(value, scale), 8), 7.0f) + 8);
  };
  for (int64_t i = 0; i < kBlockElements / 2; ++i) {
    block.codes[i] = static_cast<uint8_t>(code(row(i)) | code(row(i + kBlockElements / 2)) << 4);
  }
}

// Of a row; see scale_of_largest().
float scale_of_row(const float* row, int64_t dim, Quantised format);

// Rounds a row to stored bytes. `scales` has one for each element, `scale_stride` apart; formats of
// blocks find their own, and take none.
void quantise_row(const float* row, int64_t dim, Quantised format, const float* scales,
                  int64_t scale_stride, void* to);

}  // namespace wh
