// What must hold whatever the numbers: relations between runs, and bits that must not move.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "support/attention.h"

namespace wh {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

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
