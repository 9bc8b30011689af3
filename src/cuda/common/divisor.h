// Division by a number that the host knows: 20 dependent instructions in a row are 0.1 us of a
// kernel that takes 5, a multiplication is two.
#pragma once

#include <cstdint>

namespace wh::cuda {

// Of dividends below 2^31. Granlund and Montgomery, "Division by invariant integers using
// multiplication" (1994): with 2^shift >= value, multiplier = ceil(2^(31 + shift) / value) is
// exact.
struct Divisor {
  uint32_t value = 1;
  uint32_t multiplier = uint32_t{1} << 31;
  uint32_t shift = 0;

  constexpr Divisor() = default;
  constexpr explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + value - 1) / value);
  }

  // Of 0 <= dividend < 2^31.
  constexpr int32_t quotient(int32_t dividend) const {
    return static_cast<int32_t>(
        (static_cast<uint64_t>(static_cast<uint32_t>(dividend)) * multiplier) >> (31 + shift));
  }
  constexpr int32_t remainder(int32_t dividend, int32_t quotient) const {
    return dividend - quotient * static_cast<int32_t>(value);
  }
  explicit constexpr operator int32_t() const { return static_cast<int32_t>(value); }
  friend constexpr int32_t operator/(int32_t dividend, const Divisor& divisor) {
    return divisor.quotient(dividend);
  }
  friend constexpr int32_t operator%(int32_t dividend, const Divisor& divisor) {
    return divisor.remainder(dividend, divisor.quotient(dividend));
  }
};

}  // namespace wh::cuda
