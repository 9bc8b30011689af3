// The names of a problem's enum values: one table for printing and for parsing.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "core/problem.h"

namespace wh {

// Names of an enum's values, in the order of the values.
template <typename Enum, size_t kCount>
struct Names {
  const char* names[kCount];

  const char* name(Enum value) const { return names[static_cast<size_t>(value)]; }
  std::optional<Enum> value(std::string_view name) const {
    for (size_t i = 0; i < kCount; ++i) {
      if (name == names[i]) return static_cast<Enum>(i);
    }
    return std::nullopt;
  }
  // Of a number that a caller wrote.
  std::optional<Enum> value(int64_t number) const {
    if (number < 0 || number >= static_cast<int64_t>(kCount)) return std::nullopt;
    return static_cast<Enum>(number);
  }
  std::array<Enum, kCount> values() const {
    std::array<Enum, kCount> all{};
    for (size_t i = 0; i < kCount; ++i) all[i] = static_cast<Enum>(i);
    return all;
  }
  // "f32, f16, bf16": for messages.
  std::string list() const {
    std::string text;
    for (const char* name : names) text += (text.empty() ? "" : ", ") + std::string(name);
    return text;
  }
};

constexpr Names<Dtype, 3> kDtypes{{"f32", "f16", "bf16"}};
constexpr Names<Device, 2> kDevices{{"cpu", "cuda"}};
constexpr Names<Causal, 3> kCausals{{"none", "bottom-right", "top-left"}};
constexpr Names<MaskKind, 4> kMasks{{"none", "boolean", "additive-f32", "additive"}};
constexpr Names<Quantised, 5> kQuantiseds{{"none", "e4m3", "int8", "q8_0", "q4_0"}};
constexpr Names<Scales, 5> kScales{{"none", "tensor", "head", "token-head", "channel"}};
constexpr Names<Pass, 2> kPasses{{"forward", "backward"}};
constexpr Names<QueryLayout, 2> kQueryLayouts{{"dense", "packed"}};
constexpr Names<KeyLayout, 3> kKeyLayouts{{"dense", "packed", "paged"}};

}  // namespace wh
