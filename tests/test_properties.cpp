// What must hold whatever the numbers: relations between runs, and bits that must not move.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "support/attention.h"

namespace wh {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void expect_near(const std::vector<float>& have, const std::vector<float>& want, float bound) {
  ASSERT_EQ(have.size(), want.size());
  for (size_t i = 0; i < have.size(); ++i) ASSERT_NEAR(have[i], want[i], bound) << "element " << i;
}

// A NaN's payload is nobody's promise.
bool same_bits_but_nan(std::vector<float> a, std::vector<float> b) {
  for (auto* values : {&a, &b}) {
    for (float& value : *values) value = std::isnan(value) ? kNan : value;
  }
  return same_bits(a, b);
}

class Kernels : public KernelTest {
 protected:
  // How far two ways to compute the same may be apart: outputs are below 2, and each way rounds
  // them, and in bf16 the weights, to the type.
  static float bound() {
    if (!takes(GetParam(), WH_F32)) return 0x1p-6f;
    return is_cuda(GetParam()) ? 1e-5f : 3e-6f;  // products of three parts of each factor
  }
};

// What GPU's kernels have none of.
class KernelsOnThreads : public Kernels {
  void SetUp() override {
    if (is_cuda(GetParam())) GTEST_SKIP() << "threads of the host are for CPU kernels";
    Kernels::SetUp();
  }
};

TEST_P(Kernels, GroupedQueriesEqualRepeatedHeads) {
  Attention grouped(6, 2, queries(), 130, 64), repeated(6, 6, queries(), 130, 64);
  repeated.q = grouped.q;
  const size_t head = 130 * 64;
  for (size_t h = 0; h < 6; ++h) {
    std::copy_n(grouped.k.begin() + static_cast<long>(h / 3 * head), head,
                repeated.k.begin() + static_cast<long>(h * head));
    std::copy_n(grouped.v.begin() + static_cast<long>(h / 3 * head), head,
                repeated.v.begin() + static_cast<long>(h * head));
  }
  grouped.run(GetParam());
  repeated.run(GetParam());
  expect_near(grouped.out, repeated.out, bound());
}

TEST_P(Kernels, TheOrderOfKeysDoesNotMatter) {
  Attention one(2, 1, queries(), 100, 40), other(2, 1, queries(), 100, 40);
  for (int64_t j = 0; j < 100; ++j) {
    const int64_t to = (j * 37 + 11) % 100;
    std::copy_n(one.k.begin() + j * 40, 40, other.k.begin() + to * 40);
    std::copy_n(one.v.begin() + j * 40, 40, other.v.begin() + to * 40);
  }
  one.run(GetParam());
  other.run(GetParam());
  expect_near(one.out, other.out, bound());
  expect_near(one.lse, other.lse, 1e-5f);
}

TEST_P(Kernels, TwoHalvesMergeByLogSumExp) {
  Attention whole(2, 1, queries(), 200, 64), low(2, 1, queries(), 90, 64),
      high(2, 1, queries(), 110, 64);
  low.q = high.q = whole.q;
  low.k.assign(whole.k.begin(), whole.k.begin() + 90 * 64);
  low.v.assign(whole.v.begin(), whole.v.begin() + 90 * 64);
  high.k.assign(whole.k.begin() + 90 * 64, whole.k.end());
  high.v.assign(whole.v.begin() + 90 * 64, whole.v.end());
  whole.run(GetParam());
  low.run(GetParam());
  high.run(GetParam());
  for (size_t row = 0; row < whole.lse.size(); ++row) {
    const double lse = std::log(std::exp(static_cast<double>(low.lse[row])) +
                                std::exp(static_cast<double>(high.lse[row])));
    ASSERT_NEAR(whole.lse[row], lse, 1e-5);
    for (size_t d = 0; d < 64; ++d) {
      const size_t i = row * 64 + d;
      const double merged =
          low.out[i] * std::exp(low.lse[row] - lse) + high.out[i] * std::exp(high.lse[row] - lse);
      ASSERT_NEAR(whole.out[i], merged, bound());
    }
  }
}

TEST_P(KernelsOnThreads, AnyNumberOfThreadsGivesTheSameBits) {
  Attention attention(4, 2, queries(), 9000, 64);
  attention.limits.threads = 1;
  attention.run(GetParam());
  const std::vector<float> out = attention.out, lse = attention.lse;
  for (const int32_t threads : {2, 3, 8}) {
    attention.limits.threads = threads;
    attention.run(GetParam());
    EXPECT_TRUE(same_bits(attention.out, out) && same_bits(attention.lse, lse))
        << threads << " threads";
  }
}

TEST_P(KernelsOnThreads, ASerialExecutorGivesTheSameBits) {
  Attention attention(4, 2, queries(), 9000, 64);
  attention.limits.threads = 4;
  attention.run(GetParam());
  const std::vector<float> out = attention.out;
  const wh_executor serial{[](void*, int32_t count, void (*task)(void*, int32_t), void* argument) {
                             for (int32_t i = count - 1; i >= 0; --i) task(argument, i);
                           },
                           nullptr};
  attention.run(GetParam(), &serial);
  EXPECT_TRUE(same_bits(attention.out, out));
}

TEST_P(Kernels, BatchInvariantRowsKeepTheirBitsAlone) {
  Attention both(4, 2, queries(), 5000, 64, 2), alone(4, 2, queries(), 5000, 64, 1);
  both.limits.batch_invariant = alone.limits.batch_invariant = true;
  alone.q.assign(both.q.begin() + static_cast<long>(both.q.size() / 2), both.q.end());
  alone.k.assign(both.k.begin() + static_cast<long>(both.k.size() / 2), both.k.end());
  alone.v.assign(both.v.begin() + static_cast<long>(both.v.size() / 2), both.v.end());
  both.run(GetParam());
  alone.run(GetParam());
  EXPECT_TRUE(same_bits({both.out.begin() + static_cast<long>(both.out.size() / 2), both.out.end()},
                        alone.out));
}

TEST_P(Kernels, ARowThatSeesNoKeyIsZeroAndMinusInfinity) {
  Attention attention(2, 1, queries(), 50, 64, 2);
  attention.key_lengths = {0, 50};
  attention.run(GetParam());
  const size_t rows = attention.lse.size() / 2;
  for (size_t row = 0; row < rows; ++row) ASSERT_EQ(attention.lse[row], -kInfinity);
  for (size_t i = 0; i < rows * 64; ++i) ASSERT_EQ(attention.out[i], 0.0f);
  for (size_t row = rows; row < 2 * rows; ++row) ASSERT_TRUE(std::isfinite(attention.lse[row]));
}

TEST_P(Kernels, ARowWhoseScoresAreAllMinusInfinityIsEmptyWhateverVHolds) {
  // Kernels clean V of NaN only in tiles that some row does not see whole: under a mask all.
  for (const bool has_mask : {false, true}) {
    for (const int64_t len_k : {50, 400}) {
      Attention attention(2, 1, queries(), len_k, 64);
      if (has_mask) {
        attention.problem.causal = WH_CAUSAL_BOTTOM_RIGHT;
        attention.mask.assign(static_cast<size_t>(queries() * len_k), 0.0f);
      }
      std::fill(attention.q.begin(), attention.q.end(), 1.0f);
      std::fill(attention.k.begin(), attention.k.end(), -kInfinity);
      attention.v[3 * 64] = kNan;
      attention.v[4 * 64 + 1] = kInfinity;
      attention.run(GetParam());
      for (const float lse : attention.lse) ASSERT_EQ(lse, -kInfinity) << len_k << has_mask;
      for (const float value : attention.out) ASSERT_EQ(value, 0.0f) << len_k << has_mask;
    }
  }
}

TEST_P(Kernels, AKeyWhoseScoreIsMinusInfinityWeighsNothing) {
  Attention attention(2, 1, queries(), 100, 64), without(2, 1, queries(), 99, 64);
  for (float& value : attention.q) value = std::fabs(value) + 0x1p-6f;
  without.q = attention.q;
  without.k.assign(attention.k.begin(), attention.k.end() - 64);
  without.v.assign(attention.v.begin(), attention.v.end() - 64);
  std::fill(attention.k.end() - 64, attention.k.end(), -kInfinity);
  attention.run(GetParam());
  without.run(GetParam());
  expect_near(attention.out, without.out, bound());
  expect_near(attention.lse, without.lse, 1e-5f);
}

TEST_P(Kernels, NanInAVisibleKeyReachesExactlyTheRowsThatSeeIt) {
  Attention attention(1, 1, 4, 300, 64);
  attention.problem.causal = WH_CAUSAL_BOTTOM_RIGHT;
  attention.v[298 * 64 + 5] = kNan;  // queries 2 and 3 see key 298
  attention.run(GetParam());
  for (size_t row = 0; row < 4; ++row) {
    for (size_t d = 0; d < 64; ++d) {
      ASSERT_EQ(std::isnan(attention.out[row * 64 + d]), row >= 2 && d == 5) << row << " " << d;
    }
  }
}

// Every head of a group of 64 is a row of the same query, so whole panels of prefill see the same
// keys: an odd number of them, with a key in the tile that they do not see.
TEST_P(Kernels, NanInTheFirstKeyThatAQueryDoesNotSeeDoesNotReachIt) {
  const int64_t len_q = std::string(GetParam()) == "cpu_decode" ? 2 : 5;
  for (int64_t key = 38 - len_q; key < 38; ++key) {
    Attention attention(64, 1, len_q, 37, 40);
    attention.problem.causal = WH_CAUSAL_BOTTOM_RIGHT;
    if (key < 37) attention.v[static_cast<size_t>(key * 40 + 7)] = kNan;
    attention.run(GetParam());
    for (size_t i = 0; i < attention.out.size(); ++i) {
      const auto query = static_cast<int64_t>(i) / 40 % len_q;
      const bool sees_it = key < 37 && key <= query + 37 - len_q;
      ASSERT_EQ(std::isnan(attention.out[i]), sees_it && i % 40 == 7) << key << " " << i;
    }
  }
}

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

TEST_P(Kernels, TheHighestNumbersInKCountAsWhatTheyAre) {
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
TEST_P(Kernels, AFiniteBiasNeverHidesAKey) {
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
TEST_P(Kernels, ARowOfOneHugeBiasIsTheMeanOfV) {
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
TEST_P(Kernels, ARowOfTheLowestNumberOfF16StaysNearWhatItIsWithout) {
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
TEST_P(Kernels, EqualBiasesOfAnySizeAreTheMeanOfV) {
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
TEST_P(Kernels, TheLargerOfTwoHugeBiasesHidesTheOther) {
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
TEST_P(Kernels, EqualScoresOfAnySizeAreTheMeanOfV) {
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

TEST_P(Kernels, EightEqualScoresOf3e4SquaredAreTheMeanOfV) {
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
TEST_P(Kernels, ASinkOfAnySizeTakesItsShare) {
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

// Items follow the number of threads, and with them the keys that share a tile with a NaN.
TEST_P(KernelsOnThreads, AnyNumberOfThreadsGivesTheSameBitsAroundNanAndInfinity) {
  Attention attention(4, 2, 4 * queries(), 700, 40);
  attention.problem.causal = WH_CAUSAL_BOTTOM_RIGHT;
  if (std::string(GetParam()) == "cpu_decode") attention = Attention(4, 2, 4, 700, 40);
  std::mt19937 random(3);
  for (size_t i = 0; i < 40; ++i) {
    attention.v[random() % attention.v.size()] = i % 2 == 0 ? kNan : kInfinity;
  }
  attention.limits.threads = 1;
  attention.run(GetParam());
  const std::vector<float> out = attention.out, lse = attention.lse;
  for (const int32_t threads : {2, 3, 8, 64}) {
    attention.limits.threads = threads;
    attention.run(GetParam());
    EXPECT_TRUE(same_bits_but_nan(attention.out, out) && same_bits(attention.lse, lse))
        << threads << " threads";
  }
}

INSTANTIATE_TEST_SUITE_P(Every, Kernels, testing::ValuesIn(kernels_under_test()), kernel_name);
INSTANTIATE_TEST_SUITE_P(Every, KernelsOnThreads, testing::ValuesIn(kernels_under_test()),
                         kernel_name);

}  // namespace
}  // namespace wh
