// The oracle against answers worked out by hand: everything else is compared with it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/key_range.h"
#include "core/sequence.h"
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

// Three sequences, packed and in pages of 2, and each of them alone and dense: the same numbers.
TEST(Reference, ReadsPackedAndPagedSequencesAsDenseOnes) {
  constexpr int64_t kDim = 3;
  const std::vector<int32_t> queries{0, 2, 2, 6}, lengths{3, 4, 5}, keys{0, 3, 7, 12};
  const std::vector<int32_t> table{6, 1, -7, 0, 3, -7, 5, 2, 4};
  std::vector<float> q(6 * kDim), k(12 * kDim), v(12 * kDim);
  for (size_t i = 0; i < q.size(); ++i) q[i] = std::sin(static_cast<float>(i));
  for (size_t i = 0; i < k.size(); ++i) k[i] = std::cos(static_cast<float>(3 * i));
  for (size_t i = 0; i < v.size(); ++i) v[i] = std::sin(static_cast<float>(7 * i));
  std::vector<float> pages_k(7 * 2 * kDim, kNan), pages_v(pages_k);
  for (int64_t b = 0; b < 3; ++b) {
    for (int64_t j = 0; j < lengths[b]; ++j) {
      const int64_t from = (keys[b] + j) * kDim, to = (table[b * 3 + j / 2] * 2 + j % 2) * kDim;
      std::copy_n(k.begin() + from, kDim, pages_k.begin() + to);
      std::copy_n(v.begin() + from, kDim, pages_v.begin() + to);
    }
  }
  const auto run = [&](Problem p, Tensors t, std::vector<float>& out, std::vector<float>& lse) {
    set_dense(p);
    out.assign(6 * kDim, kNan);
    lse.assign(6, kNan);
    t.out = out.data();
    t.log_sum_exp = lse.data();
    ASSERT_TRUE(validate(p).ok()) << validate(p).message();
    ASSERT_TRUE(validate(p, t).ok()) << validate(p, t).message();
    ASSERT_TRUE(validate_sequences(p, t).ok()) << validate_sequences(p, t).message();
    std::vector<double> scratch(cpu::reference_workspace_bytes(p) / sizeof(double));
    cpu::reference_rows(p, t, 0, query_rows(p, t), scratch.data());
  };
  Problem p;
  p.batch = 3;
  p.dim_qk = p.dim_v = kDim;
  p.len_q = 4;
  p.len_k = 5;
  p.causal = Causal::kBottomRight;
  p.window_left = 2;
  p.wants_log_sum_exp = true;
  p.query_layout = QueryLayout::kPacked;
  p.total_q = 6;
  Tensors t;
  t.q = q.data();
  t.query_offsets = queries.data();
  std::vector<float> packed, packed_lse, paged, paged_lse;
  {
    Problem of_packed = p;
    of_packed.key_layout = KeyLayout::kPacked;
    of_packed.total_k = 12;
    t.k = k.data();
    t.v = v.data();
    t.key_offsets = keys.data();
    run(of_packed, t, packed, packed_lse);
  }
  {
    Problem of_pages = p;
    of_pages.key_layout = KeyLayout::kPaged;
    of_pages.page_size = 2;
    of_pages.pages = 7;
    of_pages.has_key_lengths = true;
    t.k = pages_k.data();
    t.v = pages_v.data();
    t.key_offsets = nullptr;
    t.key_lengths = lengths.data();
    t.page_table = table.data();
    run(of_pages, t, paged, paged_lse);
  }
  for (int64_t b = 0; b < 3; ++b) {
    Problem one = p;
    one.batch = 1;
    one.query_layout = QueryLayout::kDense;
    one.total_q = 0;
    one.len_q = queries[b + 1] - queries[b];
    one.len_k = lengths[b];
    Tensors dense;
    dense.q = q.data() + queries[b] * kDim;
    dense.k = k.data() + keys[b] * kDim;
    dense.v = v.data() + keys[b] * kDim;
    std::vector<float> out, lse;
    run(one, dense, out, lse);
    for (int64_t i = 0; i < one.len_q; ++i) {
      const int64_t row = queries[b] + i;
      EXPECT_EQ(lse[i], packed_lse[row]);
      EXPECT_EQ(lse[i], paged_lse[row]);
      for (int64_t d = 0; d < kDim; ++d) {
        EXPECT_EQ(out[i * kDim + d], packed[row * kDim + d]) << b << i << d;
        EXPECT_EQ(out[i * kDim + d], paged[row * kDim + d]) << b << i << d;
      }
    }
  }
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
  EXPECT_EQ(visible_keys(p, KeyRange{3, 6}, 0).begin, 3);
  EXPECT_EQ(visible_keys(p, KeyRange{3, 6}, 0).end, 5);
  EXPECT_EQ(visible_keys(p, KeyRange{3, 6}, 1).end, 6);
}

}  // namespace
}  // namespace wh
