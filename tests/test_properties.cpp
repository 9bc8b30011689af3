// What must hold whatever the numbers: relations between runs, and bits that must not move.
#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cmath>

#include "attention.h"
#include "kernel_test.h"

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
  static float bound() { return is_bf16_kernel(GetParam()) ? 0x1p-6f : 3e-6f; }
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

TEST_P(Kernels, AnyNumberOfThreadsGivesTheSameBits) {
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

TEST_P(Kernels, ASerialExecutorGivesTheSameBits) {
  Attention attention(4, 2, queries(), 9000, 64);
  attention.limits.threads = 4;
  attention.run(GetParam());
  const std::vector<float> out = attention.out;
  const Executor serial{[](void*, int32_t count, Executor::Task task, void* argument) {
                          for (int32_t i = count - 1; i >= 0; --i) task(argument, i);
                        },
                        nullptr};
  attention.run(GetParam(), serial);
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
  Attention attention(2, 1, queries(), 50, 64);
  std::fill(attention.q.begin(), attention.q.end(), 1.0f);
  std::fill(attention.k.begin(), attention.k.end(), -kInfinity);
  attention.v[3 * 64] = kNan;
  attention.run(GetParam());
  for (const float lse : attention.lse) ASSERT_EQ(lse, -kInfinity);
  for (const float value : attention.out) ASSERT_EQ(value, 0.0f);
}

TEST_P(Kernels, NanInAVisibleKeyReachesExactlyTheRowsThatSeeIt) {
  Attention attention(1, 1, 4, 300, 64);
  attention.problem.causal = Causal::kBottomRight;
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
    attention.problem.causal = Causal::kBottomRight;
    if (key < 37) attention.v[static_cast<size_t>(key * 40 + 7)] = kNan;
    attention.run(GetParam());
    for (size_t i = 0; i < attention.out.size(); ++i) {
      const auto query = static_cast<int64_t>(i) / 40 % len_q;
      const bool sees_it = key < 37 && key <= query + 37 - len_q;
      ASSERT_EQ(std::isnan(attention.out[i]), sees_it && i % 40 == 7) << key << " " << i;
    }
  }
}

// Programs mask with the lowest number of a type. It is finite: a row that has nothing else is the
// mean of V, with no 0 and no NaN, in every kernel as in the reference.
TEST_P(Kernels, AFiniteBiasNeverHidesAKey) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  constexpr float kLowestBf16 = -0x1.fep127f;
  constexpr size_t kKeys = 45;
  struct Row {
    float even, odd;           // biases of even and odd keys
    bool sees_even, sees_odd;  // what is left to sum
  };
  const Row rows[] = {{kLowest, kLowest, true, true},
                      {kLowestBf16, kLowestBf16, true, true},
                      {kLowest, kLowestBf16, true, true},
                      {-3e38f, -1e38f, true, true},
                      {kLowest, -kInfinity, true, false},
                      {0, kLowest, true, false},
                      {-kLowest, 0, true, false},
                      {-kLowest, -kLowest, true, true},
                      {-kInfinity, -kInfinity, false, false}};
  for (const Row& row : rows) {
    for (const MaskKind kind : {MaskKind::kAdditiveF32, MaskKind::kAdditiveQ}) {
      for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
        if (is_bf16_kernel(GetParam()) && dtype == Dtype::kF32) continue;
        // narrow() would round f32's lowest number to minus infinity.
        if (kind == MaskKind::kAdditiveQ && dtype == Dtype::kBf16 &&
            (std::fabs(row.even) > -kLowestBf16 || std::fabs(row.odd) > -kLowestBf16)) {
          continue;
        }
        SCOPED_TRACE(row.even);
        Attention attention(32, 1, queries() / 2, kKeys, 64);
        attention.dtype = dtype;
        attention.problem.mask = kind;
        std::fill(attention.q.begin(), attention.q.end(), 0.0f);  // every key weighs the same
        for (size_t i = 0; i < static_cast<size_t>(queries() / 2) * kKeys; ++i) {
          attention.mask.push_back(i % kKeys % 2 == 0 ? row.even : row.odd);
        }
        attention.run(GetParam());
        const float bound = attention.dtype == Dtype::kBf16 ? 0x1p-6f : 3e-6f;
        for (size_t d = 0; d < 64; ++d) {
          double sum = 0, count = 0;
          for (size_t j = 0; j < kKeys; ++j) {
            if (!(j % 2 == 0 ? row.sees_even : row.sees_odd)) continue;
            sum += attention.v[j * 64 + d];
            ++count;
          }
          const double mean = count == 0 ? 0 : sum / count;
          for (size_t i = d; i < attention.out.size(); i += 64) {
            ASSERT_NEAR(attention.out[i], mean, bound) << i;
          }
        }
        for (const float lse : attention.lse) {
          ASSERT_EQ(std::isfinite(lse), row.sees_even) << lse;
        }
      }
    }
  }
}

// Items follow the number of threads, and with them the keys that share a tile with a NaN.
TEST_P(Kernels, AnyNumberOfThreadsGivesTheSameBitsAroundNanAndInfinity) {
  Attention attention(4, 2, 4 * queries(), 700, 40);
  attention.problem.causal = Causal::kBottomRight;
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

INSTANTIATE_TEST_SUITE_P(Cpu, Kernels, testing::ValuesIn(kCpuKernels), kernel_name);

TEST(PrefillBf16, AnswersWithAnErrorWhereItHasNoCode) {
  const int64_t before = hwy::SupportedTargets();
  // None at all would mean every target.
  hwy::SetSupportedTargetsForTest((before & ~((int64_t{HWY_AVX3} << 1) - 1)) | HWY_STATIC_TARGET);
  const Problem p;
  const Tensors t;
  Progress progress;
  const Status status = find_kernel(kernels_of(Device::kCpu), "cpu_prefill_bf16")
                            ->run({p, {}, t, default_executor(), progress});
  hwy::SetSupportedTargetsForTest(before);
  EXPECT_EQ(status.code(), Code::kInternal);
  EXPECT_NE(status.message().find("has no code for "), std::string::npos) << status.message();
}

}  // namespace
}  // namespace wh
