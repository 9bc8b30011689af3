// The SIMD conversions of 16-bit floats, bit by bit, on every instruction set that this CPU has.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/float16.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "test_vector_math.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/common/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Counts are multiples of any vector.
void widen_halves(const Half* from, size_t count, float* to) {
  for (size_t i = 0; i < count; i += hn::Lanes(F32())) store_as(load_f32(from + i), to + i);
}
void narrow_to_halves(const float* from, size_t count, Half* to) {
  for (size_t i = 0; i < count; i += hn::Lanes(F32())) store_as(load_f32(from + i), to + i);
}
void narrow_to_bfloats(const float* from, size_t count, Bfloat16* to) {
  for (size_t i = 0; i < count; i += hn::Lanes(F32())) store_as(load_f32(from + i), to + i);
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
// Not only `wh`: with one instruction set the dispatch is a call into a namespace of `cpu`.
namespace wh::cpu {

HWY_EXPORT(widen_halves);
HWY_EXPORT(narrow_to_halves);
HWY_EXPORT(narrow_to_bfloats);

namespace {

constexpr size_t kMostLanes = 16;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A number and the bits that it must round to.
struct Rounding {
  float from;
  uint16_t to;
};

void add_with_sign(std::vector<Rounding>& list, float from, uint16_t to) {
  list.push_back({from, to});
  list.push_back({-from, static_cast<uint16_t>(to | 0x8000u)});
}

// Around the middle of every two neighbours: to nearest, to even in the middle. `infinity` is the
// format's pattern for it, `value` what a pattern stands for.
template <typename Value>
std::vector<Rounding> roundings(uint16_t infinity, Value&& value) {
  std::vector<Rounding> list;
  for (uint16_t low = 0; low < infinity; ++low) {
    const auto high = static_cast<uint16_t>(low + 1);
    // Past the largest number the next one would be as far away as the one before it.
    const double above = high == infinity ? 2 * value(low) - value(low - 1) : value(high);
    const auto middle = static_cast<float>((value(low) + above) / 2);
    add_with_sign(list, static_cast<float>(value(low)), low);
    add_with_sign(list, middle, low % 2 == 0 ? low : high);
    add_with_sign(list, std::nextafter(middle, 0.0f), low);
    add_with_sign(list, std::nextafter(middle, kInfinity), high);
  }
  add_with_sign(list, kInfinity, infinity);
  add_with_sign(list, std::numeric_limits<float>::max(), infinity);
  while (list.size() % kMostLanes != 0) list.push_back({0.0f, 0});
  return list;
}

template <typename T, typename Narrow>
void expect_roundings(const std::vector<Rounding>& list, const Narrow& narrow) {
  std::vector<float> from;
  for (const Rounding& one : list) from.push_back(one.from);
  std::vector<T> to(from.size());
  narrow(from.data(), from.size(), to.data());
  int wrong = 0;
  for (size_t i = 0; i < list.size() && wrong < 10; ++i) {
    wrong += to[i].bits != list[i].to;
    EXPECT_EQ(to[i].bits, list[i].to) << from[i];
    EXPECT_EQ(from_float<T>(from[i]).bits, list[i].to) << from[i] << ", by from_float()";
  }
}

template <typename T, typename Narrow>
void expect_nan_stays(const Narrow& narrow) {
  std::vector<float> from{kNan, -kNan, std::numeric_limits<float>::signaling_NaN(),
                          std::bit_cast<float>(0x7fffffffu), std::bit_cast<float>(0xff800001u)};
  from.resize(kMostLanes, kNan);
  std::vector<T> to(from.size());
  narrow(from.data(), from.size(), to.data());
  for (size_t i = 0; i < to.size(); ++i) EXPECT_TRUE(std::isnan(to_float(to[i]))) << i;
}

// One test for each instruction set that this CPU has and this build knows.
class VectorMath : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { hwy::SetSupportedTargetsForTest(GetParam()); }
  void TearDown() override { hwy::SetSupportedTargetsForTest(before_); }

 private:
  const int64_t before_ = hwy::SupportedTargets();
};

TEST_P(VectorMath, EveryHalfWidensExactlyAndComesBack) {
  std::vector<Half> halves, back(65536);
  for (uint32_t bits = 0; bits < 65536; ++bits) halves.push_back({static_cast<uint16_t>(bits)});
  std::vector<float> wide(65536);
  HWY_DYNAMIC_DISPATCH(widen_halves)(halves.data(), halves.size(), wide.data());
  HWY_DYNAMIC_DISPATCH(narrow_to_halves)(wide.data(), wide.size(), back.data());
  for (size_t i = 0; i < 65536; ++i) {
    const double magnitude =
        i % 0x8000 < 0x400 ? std::ldexp(i % 0x400, -24)
                           : std::ldexp(0x400 + i % 0x400, static_cast<int>(i / 0x400 % 32) - 25);
    if (i % 0x8000 > 0x7c00) {
      ASSERT_TRUE(std::isnan(wide[i]) && std::isnan(to_float(back[i]))) << i;
      continue;
    }
    const double want = i % 0x8000 == 0x7c00 ? double{kInfinity} : magnitude;
    ASSERT_EQ(wide[i], i < 0x8000 ? want : -want) << i;
    ASSERT_EQ(back[i].bits, halves[i].bits);
  }
}

TEST_P(VectorMath, HalvesRoundToNearestEven) {
  const auto value = [](uint32_t bits) {
    return double{to_float(Half{static_cast<uint16_t>(bits)})};
  };
  expect_roundings<Half>(roundings(0x7c00, value), HWY_DYNAMIC_DISPATCH(narrow_to_halves));
  expect_nan_stays<Half>(HWY_DYNAMIC_DISPATCH(narrow_to_halves));
}

TEST_P(VectorMath, BfloatsRoundToNearestEven) {
  const auto value = [](uint32_t bits) {
    return double{to_float(Bfloat16{static_cast<uint16_t>(bits)})};
  };
  expect_roundings<Bfloat16>(roundings(0x7f80, value), HWY_DYNAMIC_DISPATCH(narrow_to_bfloats));
  expect_nan_stays<Bfloat16>(HWY_DYNAMIC_DISPATCH(narrow_to_bfloats));
}

std::vector<int64_t> targets() {
  std::vector<int64_t> list;
  for (int64_t rest = hwy::SupportedTargets() & HWY_TARGETS; rest != 0; rest &= rest - 1) {
    list.push_back(rest & -rest);
  }
  return list;
}

INSTANTIATE_TEST_SUITE_P(Every, VectorMath, testing::ValuesIn(targets()),
                         [](const auto& info) { return std::string(hwy::TargetName(info.param)); });

}  // namespace
}  // namespace wh::cpu
#endif
