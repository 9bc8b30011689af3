// Elements of tensors, whose type is known when the program runs.
#pragma once

#include <cstdint>

#include "core/float16.h"
#include "core/problem.h"

namespace wh {

// Calls f with an element of the type, for what is written once as a template. A type more is an
// error here and in every other switch over types (-Werror=switch), never read as one of these.
template <typename F>
__attribute__((always_inline)) constexpr auto with_element_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kF32:
      return f(float{});
    case Dtype::kF16:
      return f(Half{});
    case Dtype::kBf16:
      return f(Bfloat16{});
  }
  __builtin_unreachable();  // validate() knows no other
}

// One element as f32. For code that is not hot.
constexpr float load_element(const void* data, Dtype dtype, int64_t offset) {
  return with_element_type(
      dtype, [&]<typename T>(T) { return to_float(static_cast<const T*>(data)[offset]); });
}

// Rounds to nearest even.
inline void store_element(void* data, Dtype dtype, int64_t offset, float value) {
  with_element_type(dtype,
                    [&]<typename T>(T) { static_cast<T*>(data)[offset] = from_float<T>(value); });
}

}  // namespace wh
