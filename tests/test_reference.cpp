// The oracle against answers worked out by hand: everything else is compared with it.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "core/key_range.h"
#include "cpu/reference/reference.h"

namespace wh {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// One head, dim 1, q = 1 everywhere: the score of a key is the key itself.
struct Line {
  std::vector<float> k, v;
  int64_t len_q = 1;
  Problem problem{};
  std::vector<float> out{}, lse{};

  void run(const float* sinks = nullptr, const int32_t* lengths = nullptr,
           const int32_t* starts = nullptr, const uint8_t* mask = nullptr) {
    Problem& p = problem;
    p.len_q = len_q;
    p.len_k = static_cast<int64_t>(k.size());
    p.dim_qk = p.dim_v = 1;
    p.scale = 1;
    p.stride_q = p.stride_out = dense_strides(1, p.len_q, 1);
    p.stride_k = p.stride_v = dense_strides(1, p.len_k, 1);
    p.stride_mask = {0, 0, p.len_k, 1};
    p.has_sinks = sinks != nullptr;
    p.has_key_lengths = lengths != nullptr;
    p.has_key_starts = starts != nullptr;
    if (mask != nullptr) p.mask = MaskKind::kBoolean;
    p.wants_log_sum_exp = true;
    const std::vector<float> q(len_q, 1.0f);
    out.assign(len_q, kNan);
    lse.assign(len_q, kNan);
    Tensors t{q.data(), k.data(), v.data(), out.data()};
    t.mask = mask;
    t.sinks = sinks;
    t.key_lengths = lengths;
    t.key_starts = starts;
    t.log_sum_exp = lse.data();
    ASSERT_TRUE(validate(p).ok()) << validate(p).message();
    ASSERT_TRUE(validate(p, t).ok()) << validate(p, t).message();
    std::vector<double> scratch(cpu::reference_workspace_bytes(p) / sizeof(double));
    cpu::reference_rows(p, t, 0, len_q, scratch.data());
  }
};

TEST(Reference, WeighsByExponent) {
  Line line{.k = {0, std::log(3.0f)}, .v = {1, 5}};
  line.run();
  EXPECT_NEAR(line.out[0], 4.0, 1e-6);
  EXPECT_NEAR(line.lse[0], std::log(4.0), 1e-6);
}

TEST(Reference, SinkJoinsTheDenominatorOnly) {
  Line line{.k = {0}, .v = {8}};
  const float sink = std::log(3.0f);
  line.run(&sink);
  EXPECT_NEAR(line.out[0], 2.0, 1e-6);
  EXPECT_NEAR(line.lse[0], std::log(4.0), 1e-6);
}

TEST(Reference, CausalIsAlignedBottomRightOrTopLeft) {
  Line line{.k = {0, 0, 0}, .v = {1, 2, 6}, .len_q = 2};
  line.problem.causal = Causal::kBottomRight;
  line.run();
  EXPECT_NEAR(line.out[0], 1.5, 1e-6);
  EXPECT_NEAR(line.out[1], 3.0, 1e-6);
  line.problem.causal = Causal::kTopLeft;
  line.run();
  EXPECT_NEAR(line.out[0], 1.0, 1e-6);
  EXPECT_NEAR(line.out[1], 1.5, 1e-6);
}

TEST(Reference, WindowFollowsTheDiagonal) {
  Line line{.k = {0, 0, 0, 0}, .v = {1, 2, 4, 8}, .len_q = 4};
  line.problem.window_left = 1;
  line.problem.window_right = 0;
  line.run();
  EXPECT_NEAR(line.out[0], 1.0, 1e-6);
  EXPECT_NEAR(line.out[3], 6.0, 1e-6);
}

TEST(Reference, RowsThatSeeNothingAreZero) {
  Line line{.k = {0, 0}, .v = {1, 2}, .len_q = 4};
  line.problem.causal = Causal::kBottomRight;
  line.run();
  EXPECT_EQ(line.out[0], 0.0f);
  EXPECT_EQ(line.out[1], 0.0f);
  EXPECT_EQ(line.lse[0], -kInf);
  EXPECT_NEAR(line.out[2], 1.0, 1e-6);
}

TEST(Reference, AbsentAndMaskedKeysNeverLeak) {
  Line line{.k = {kNan, 0, kInf, 0, kNan}, .v = {kNan, 3, kNan, 5, kInf}};
  const int32_t length = 4, start = 1;
  const uint8_t mask[] = {1, 1, 0, 1, 1};
  line.run(nullptr, &length, &start, mask);
  EXPECT_NEAR(line.out[0], 4.0, 1e-6);
}

TEST(Reference, VisibleNanPropagates) {
  Line line{.k = {0, kNan}, .v = {1, 2}};
  line.run();
  EXPECT_TRUE(std::isnan(line.out[0]));
  EXPECT_TRUE(std::isnan(line.lse[0]));
}

TEST(KeyRange, DiagonalFollowsTheKeyLengthAndIgnoresTheStart) {
  Problem p;
  p.len_q = 2;
  p.len_k = 10;
  p.causal = Causal::kBottomRight;
  EXPECT_EQ(visible_keys(p, {3, 6}, 0).begin, 3);
  EXPECT_EQ(visible_keys(p, {3, 6}, 0).end, 5);
  EXPECT_EQ(visible_keys(p, {3, 6}, 1).end, 6);
}

}  // namespace
}  // namespace wh
