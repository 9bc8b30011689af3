// Scores, biases and sinks of any size count as what they are: on kernels' own ways of keeping
// exponents in range, where a case table drawn from moderate numbers never comes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "support/attention.h"

namespace wh {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class KernelsAtAnyMagnitude : public KernelTest {};

// How far an output may be from the mean of normal values: the output's rounding, and where weights
// are rounded before they multiply V theirs.
float rounding_bound(int32_t dtype) {
  return dtype == WH_BF16 ? 0x1p-6f : dtype == WH_F16 ? 0x1p-9f : 1e-5f;
}

float lowest_of(int32_t dtype) {
  return dtype == WH_F32   ? std::numeric_limits<float>::lowest()
         : dtype == WH_F16 ? -65504.0f
                           : -0x1.fep127f;
}

// A type, and the kind and the type of a mask that goes with it.
struct MaskTypes {
  int32_t dtype, kind, mask_dtype;
};
std::vector<MaskTypes> mask_types_of(const std::string& kernel) {
  std::vector<MaskTypes> types;
  for (const int32_t dtype : dtypes_of(kernel)) {
    types.push_back({dtype, WH_MASK_ADDITIVE_F32, WH_F32});
    types.push_back({dtype, WH_MASK_ADDITIVE, dtype});
  }
  return types;
}

// Of each column of V over the keys that `sees` takes.
template <typename Sees>
std::vector<double> mean_of_v(const Attention& attention, Sees sees) {
  const auto dim = static_cast<size_t>(attention.problem.dim_v);
  std::vector<double> mean(dim);
  double count = 0;
  for (size_t key = 0; key < static_cast<size_t>(attention.problem.len_k); ++key) {
    if (!sees(key)) continue;
    for (size_t d = 0; d < dim; ++d) mean[d] += attention.v[key * dim + d];
    ++count;
  }
  for (double& value : mean) value /= std::max(1.0, count);
  return mean;
}

// Rows [begin, end) of out are `want`, and their log-sum-exp is `lse`. Of one kv head and batch
// entry.
void expect_rows(const Attention& attention, size_t begin, size_t end,
                 const std::vector<double>& want, double lse) {
  for (size_t row = begin; row < end; ++row) {
    for (size_t d = 0; d < want.size(); ++d) {
      ASSERT_NEAR(attention.out[row * want.size() + d], want[d], rounding_bound(attention.dtype))
          << "row " << row << ", column " << d;
    }
    if (!std::isfinite(lse)) {
      ASSERT_EQ(attention.lse[row], lse) << "row " << row;
    } else {
      ASSERT_NEAR(attention.lse[row], lse, 1e-5 + 4e-6 * std::fabs(lse)) << "row " << row;
    }
  }
}
void expect_every_row(const Attention& attention, const std::vector<double>& want, double lse) {
  expect_rows(attention, 0, attention.lse.size(), want, lse);
}

// As finite biases and sinks beyond it count: docs/semantics.md.
double limited(double bias) {
  return std::isfinite(bias) ? std::clamp(bias, -0x1p126, 0x1p126) : bias;
}

// From where scores still count to where they vanish, both ends of every type and denormals.
constexpr float kMagnitudes[] = {1e-45f, 1e-40f,   1e-4f, 1.0f,  100.0f,
                                 1e4f,   65504.0f, 1e6f,  3e7f,  1e9f,
                                 3e9f,   1e12f,    7e15f, 1e20f, 3.3e27f,
                                 1e33f,  6e37f,    9e37f, 3e38f, std::numeric_limits<float>::max()};

// Whether it is a number of the type; `value` becomes the one it rounds to.
bool round_to(int32_t dtype, float& value) {
  value = floats_of(elements_of({value}, dtype), dtype)[0];
  return std::isfinite(value);
}

TEST_P(KernelsAtAnyMagnitude, TheHighestNumbersInKCountAsWhatTheyAre) {
  for (const int32_t dtype : dtypes_of(GetParam())) {
    const float highest = -lowest_of(dtype);
    float q = 4 / highest;
    round_to(dtype, q);
    Attention attention(1, 1, queries(), 100, 64);
    attention.dtype = dtype;
    attention.problem.scale = 1;
    std::fill(attention.q.begin(), attention.q.end(), 0.0f);
    std::fill(attention.k.begin(), attention.k.end(), 0.0f);
    for (size_t i = 0; i < attention.q.size(); i += 64) attention.q[i] = q;
    for (size_t i = 0; i < attention.k.size(); i += 2 * 64) attention.k[i] = highest;
    attention.run(GetParam());
    const double lse = std::log(50 + 50 * std::exp(static_cast<double>(q) * highest));
    for (const float have : attention.lse) ASSERT_NEAR(have, lse, 1e-5) << dtype;
  }
}

// Programs mask with the lowest number of a type. It is finite: a row that has nothing else is the
// mean of V, with no 0 and no NaN, in every kernel as in the reference.
TEST_P(KernelsAtAnyMagnitude, AFiniteBiasNeverHidesAKey) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  struct Row {
    float even, odd;           // biases of even and odd keys
    bool sees_even, sees_odd;  // what is left to sum
  };
  for (const MaskTypes& types : mask_types_of(GetParam())) {
    const float lowest = lowest_of(types.mask_dtype);
    const Row rows[] = {
        {lowest, lowest, true, true},
        {lowest, -kInfinity, true, false},
        {0, lowest, true, false},
        {-lowest, 0, true, false},
        {-lowest, -lowest, true, true},
        {-kInfinity, -kInfinity, false, false},
        // Beyond 2^126, where all count as that. Rounded to 16 bits they may not be.
        {kLowest, lowest_of(WH_BF16), true, true},
        {-3e38f, -1e38f, true, true}};
    for (const Row& row : rows) {
      Row rounded = row;
      if (!round_to(types.mask_dtype, rounded.even) && std::isfinite(row.even)) continue;
      if (!round_to(types.mask_dtype, rounded.odd) && std::isfinite(row.odd)) continue;
      SCOPED_TRACE(testing::Message() << row.even << " and " << row.odd << ", dtype " << types.dtype
                                      << ", mask kind " << types.kind);
      Attention attention(32, 1, queries() / 2, 45, 64);
      attention.dtype = types.dtype;
      attention.problem.mask = types.kind;
      std::fill(attention.q.begin(), attention.q.end(), 0.0f);  // every key weighs the same
      for (int64_t i = 0; i < queries() / 2 * 45; ++i) {
        attention.mask.push_back(i % 45 % 2 == 0 ? row.even : row.odd);
      }
      attention.run(GetParam());
      const auto sees = [&](size_t key) { return key % 2 == 0 ? row.sees_even : row.sees_odd; };
      const double seen = (row.sees_even ? 23 : 0) + (row.sees_odd ? 22 : 0);
      expect_every_row(attention, mean_of_v(attention, sees), limited(row.even) + std::log(seen));
    }
  }
}

// Scores count no more beside biases of 1e9: their sum rounds to the bias. Row 0 alone has biases;
// tiles, chunks and splits meet over the longer rows.
TEST_P(KernelsAtAnyMagnitude, ARowOfOneHugeBiasIsTheMeanOfV) {
  if (std::string(GetParam()) == "cpu_reference") {
    GTEST_SKIP() << "float64 still tells the scores apart beside 1e9";
  }
  for (const int64_t len_k : {int64_t{8}, int64_t{300}, int64_t{6000}}) {
    for (const MaskTypes& types : mask_types_of(GetParam())) {
      for (const float magnitude : kMagnitudes) {
        for (float bias : {-magnitude, magnitude}) {
          if (magnitude < 1e9f || !round_to(types.mask_dtype, bias)) continue;
          if (len_k == 6000 && (types.kind != WH_MASK_ADDITIVE_F32 || bias != -1e12f)) continue;
          SCOPED_TRACE(testing::Message() << bias << ", " << len_k << " keys, dtype " << types.dtype
                                          << ", mask kind " << types.kind);
          Attention attention(1, 1, queries(), len_k, 64), without(1, 1, queries(), len_k, 64);
          attention.dtype = without.dtype = types.dtype;
          attention.problem.mask = types.kind;
          attention.mask.assign(static_cast<size_t>(queries() * len_k), 0.0f);
          std::fill_n(attention.mask.begin(), len_k, bias);
          attention.run(GetParam());
          const auto all = [](size_t) { return true; };
          expect_rows(attention, 0, 1, mean_of_v(attention, all),
                      limited(bias) + std::log(static_cast<double>(len_k)));
          without.run(GetParam());
          for (size_t i = 64; i < without.out.size(); ++i) {
            ASSERT_NEAR(attention.out[i], without.out[i], rounding_bound(types.dtype)) << i;
          }
        }
      }
    }
  }
}

// It is not low enough to swallow scores, which keep 7 bits behind the point (in base 2) beside it.
TEST_P(KernelsAtAnyMagnitude, ARowOfTheLowestNumberOfF16StaysNearWhatItIsWithout) {
  for (const MaskTypes& types : mask_types_of(GetParam())) {
    if (types.mask_dtype == WH_BF16) continue;
    Attention with(1, 1, queries(), 300, 64), without(1, 1, queries(), 300, 64);
    with.dtype = without.dtype = types.dtype;
    with.problem.mask = types.kind;
    with.mask.assign(static_cast<size_t>(queries() * 300), lowest_of(WH_F16));
    with.run(GetParam());
    without.run(GetParam());
    expect_near(with.out, without.out, 0.01f + 2 * rounding_bound(types.dtype));
    for (size_t row = 0; row < with.lse.size(); ++row) {
      ASSERT_NEAR(with.lse[row], lowest_of(WH_F16) + without.lse[row], 0.02) << row;
    }
  }
}

// Equal scores: the bias alone is what the largest of them is made of.
TEST_P(KernelsAtAnyMagnitude, EqualBiasesOfAnySizeAreTheMeanOfV) {
  for (const MaskTypes& types : mask_types_of(GetParam())) {
    for (const float magnitude : kMagnitudes) {
      for (float bias : {-magnitude, magnitude}) {
        if (!round_to(types.mask_dtype, bias)) continue;
        SCOPED_TRACE(testing::Message()
                     << bias << ", dtype " << types.dtype << ", mask kind " << types.kind);
        Attention attention(3, 1, queries(), 150, 64);
        attention.dtype = types.dtype;
        attention.problem.mask = types.kind;
        std::fill(attention.q.begin(), attention.q.end(), 0.0f);
        attention.mask.assign(static_cast<size_t>(queries() * 150), bias);
        attention.run(GetParam());
        expect_every_row(attention, mean_of_v(attention, [](size_t) { return true; }),
                         limited(bias) + std::log(150.0));
      }
    }
  }
}

// Whichever of two biases is the larger is all that a row sees, in whatever order tiles bring them.
TEST_P(KernelsAtAnyMagnitude, TheLargerOfTwoHugeBiasesHidesTheOther) {
  for (const MaskTypes& types : mask_types_of(GetParam())) {
    for (const float magnitude : {1e4f, 1e9f, 1e12f, 1e20f, 6e37f}) {
      for (float larger : {-magnitude, magnitude}) {
        float smaller = larger - magnitude / 2;
        if (!round_to(types.mask_dtype, larger) || !round_to(types.mask_dtype, smaller)) continue;
        for (const bool larger_first : {false, true}) {
          SCOPED_TRACE(testing::Message() << larger << " over " << smaller << ", first "
                                          << larger_first << ", dtype " << types.dtype);
          Attention attention(2, 1, queries(), 400, 64);
          attention.dtype = types.dtype;
          attention.problem.mask = types.kind;
          std::fill(attention.q.begin(), attention.q.end(), 0.0f);
          const auto sees = [&](size_t key) { return (key < 230) == larger_first; };
          for (int64_t i = 0; i < queries() * 400; ++i) {
            attention.mask.push_back(sees(static_cast<size_t>(i % 400)) ? larger : smaller);
          }
          attention.run(GetParam());
          expect_every_row(attention, mean_of_v(attention, sees),
                           larger + std::log(larger_first ? 230.0 : 170.0));
        }
      }
    }
  }
}

// Without a mask: the products of queries and keys are what is large. Powers of two, whose sums are
// the same in any order: a library's product takes its last columns in another.
TEST_P(KernelsAtAnyMagnitude, EqualScoresOfAnySizeAreTheMeanOfV) {
  for (const int32_t dtype : dtypes_of(GetParam())) {
    for (const float magnitude :
         {0x1p-60f, 1.0f, 256.0f, 0x1p15f, 0x1p20f, 0x1p30f, 0x1p43f, 0x1p59f}) {
      for (const float sign : {1.0f, -1.0f}) {
        float each = magnitude;
        if (!round_to(dtype, each)) continue;
        SCOPED_TRACE(testing::Message() << sign << " * " << each << "^2, dtype " << dtype);
        Attention attention(3, 1, queries(), 150, 64);
        attention.dtype = dtype;
        attention.problem.scale = 1;
        std::fill(attention.q.begin(), attention.q.end(), sign * each);
        std::fill(attention.k.begin(), attention.k.end(), each);
        attention.run(GetParam());
        expect_every_row(attention, mean_of_v(attention, [](size_t) { return true; }),
                         64.0 * sign * each * each + std::log(150.0));
      }
    }
  }
}

TEST_P(KernelsAtAnyMagnitude, EightEqualScoresOf3e4SquaredAreTheMeanOfV) {
  for (const int32_t dtype : dtypes_of(GetParam())) {
    Attention attention(1, 1, queries(), 8, 64);
    attention.dtype = dtype;
    attention.problem.scale = 1;
    float each = 3e4f;
    ASSERT_TRUE(round_to(dtype, each));
    std::fill(attention.q.begin(), attention.q.end(), each);
    std::fill(attention.k.begin(), attention.k.end(), each);
    attention.run(GetParam());
    expect_every_row(attention, mean_of_v(attention, [](size_t) { return true; }),
                     64.0 * each * each + std::log(8.0));
  }
}

// A sink as large as what it stands beside, far above it and far below, at every size.
TEST_P(KernelsAtAnyMagnitude, ASinkOfAnySizeTakesItsShare) {
  for (const int32_t dtype : dtypes_of(GetParam())) {
    for (const float magnitude : kMagnitudes) {
      for (const float bias : {-magnitude, magnitude}) {
        Attention attention(3, 1, queries(), 150, 64);
        attention.dtype = dtype;
        std::fill(attention.q.begin(), attention.q.end(), 0.0f);
        attention.problem.mask = WH_MASK_ADDITIVE_F32;
        attention.mask.assign(static_cast<size_t>(queries() * 150), bias);
        const std::vector<double> mean = mean_of_v(attention, [](size_t) { return true; });
        for (const float sink : {bias, -bias, 0.0f, -kInfinity}) {
          SCOPED_TRACE(testing::Message()
                       << "sink " << sink << " beside " << bias << ", dtype " << dtype);
          attention.sinks.assign(3, sink);
          attention.run(GetParam());
          const double of_keys = limited(bias) + std::log(150.0), of_sink = limited(sink);
          const double top = std::max(of_keys, of_sink);
          const double lse = top + std::log(std::exp(of_keys - top) + std::exp(of_sink - top));
          // In base 2 and f32, as kernels have it, equal sizes are equal and others far apart.
          double share = std::exp(of_keys - lse);
          if (magnitude > 1e9f) share = sink == bias ? 150.0 / 151 : of_keys > of_sink ? 1 : 0;
          std::vector<double> want = mean;
          for (double& value : want) value *= share;
          expect_every_row(attention, want, lse);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Every, KernelsAtAnyMagnitude, testing::ValuesIn(kernels_under_test()),
                         kernel_name);

}  // namespace
}  // namespace wh
