// The C++ layer: views, plans and runs on numbers that can be worked out by hand.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "widehead/widehead.hpp"

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(Cpp, ShapesThatDisagreeAreErrors) {
  std::vector<float> data(1024);
  const auto view = [&](int64_t heads, int64_t length, int64_t dim) {
    return widehead::TensorView(data.data(), widehead::Dtype::kF32, {1, heads, length, dim});
  };
  try {
    widehead::problem(view(2, 4, 8), view(1, 6, 7), view(1, 6, 8), view(2, 4, 8));
    FAIL() << "no error";
  } catch (const widehead::Error& error) {
    EXPECT_EQ(error.status(), WH_INVALID_ARGUMENT);
    EXPECT_STREQ(error.what(), "k is [1, 1, 6, 7]; the others make it [1, 1, 6, 8]");
  }
}

TEST(Cpp, TypesThatDisagreeAreErrors) {
  std::vector<float> data(256);
  using widehead::Dtype;
  const auto words = [&](Dtype v, Dtype out) -> std::string {
    const auto view = [&](Dtype dtype) {
      return widehead::TensorView(data.data(), dtype, {1, 1, 4, 8});
    };
    try {
      widehead::problem(view(Dtype::kBf16), view(Dtype::kBf16), view(v), view(out));
      return "no error";
    } catch (const widehead::Error& error) {
      return error.what();
    }
  };
  EXPECT_EQ(words(Dtype::kF16, Dtype::kBf16), "v is f16; it must have the type of k, bf16");
  EXPECT_EQ(words(Dtype::kBf16, Dtype::kF16),
            "out is f16; it must have the type of q, bf16, or be f32");
  EXPECT_EQ(words(Dtype::kBf16, Dtype::kF32), "no error");
}

// One head, dim 1 and q = 1: a key's score is the key, so weights are 1, 3 and 9 of 13.
struct Line {
  std::vector<float> q{1, 1}, k{0, std::log(3.0f), std::log(9.0f)}, v{13, 26, 39};
  std::vector<float> out{kNan, kNan}, lse{kNan, kNan};

  static widehead::TensorView view(std::vector<float>& data) {
    return {data.data(), widehead::Dtype::kF32, {1, 1, static_cast<int64_t>(data.size()), 1}};
  }
};

TEST(Cpp, AttentionComputesFromViews) {
  Line line;
  widehead::attention(line.view(line.q), line.view(line.k), line.view(line.v), line.view(line.out),
                      {.log_sum_exp = line.lse.data()});
  EXPECT_NEAR(line.out[0], 34, 1e-4);
  EXPECT_NEAR(line.lse[1], std::log(13.0), 1e-6);
}

TEST(Cpp, APlanRunsFromViewsWithItsOwnWorkspaceOrTheCallers) {
  Line line;
  const float sink = std::log(13.0f);
  const widehead::Options options{
      .causal = widehead::Causal::kBottomRight, .sinks = &sink, .log_sum_exp = line.lse.data()};
  const auto q = line.view(line.q), k = line.view(line.k), v = line.view(line.v);
  const auto plan = widehead::plan(widehead::problem(q, k, v, line.view(line.out), options));
  const auto again = widehead::Plan::from_json(plan.json());
  alignas(64) static char workspace[8 << 20];
  ASSERT_LE(again.workspace_bytes(), sizeof(workspace));
  for (const bool has_workspace : {false, true}) {
    std::fill(line.out.begin(), line.out.end(), kNan);
    widehead::Extras extras{.sinks = &sink, .log_sum_exp = line.lse.data()};
    if (has_workspace) {
      extras.workspace = workspace;
      extras.workspace_bytes = sizeof(workspace);
    }
    again.run(q, k, v, line.view(line.out), extras);
    // The first query sees two keys, the sink is 13 more in the denominator.
    EXPECT_NEAR(line.out[0], (13 + 3 * 26) / 17.0, 1e-4);
    EXPECT_NEAR(line.out[1], (13 + 3 * 26 + 9 * 39) / 26.0, 1e-4);
    EXPECT_NEAR(line.lse[1], std::log(26.0), 1e-6);
  }
}

TEST(Cpp, ARunRefusesViewsOfAnotherProblem) {
  Line line;
  const auto q = line.view(line.q), k = line.view(line.k), v = line.view(line.v);
  const auto out = line.view(line.out);
  const auto plan = widehead::plan(widehead::problem(q, k, v, out));
  EXPECT_EQ(plan.problem().len_k, 3);
  const auto message = [&](const widehead::TensorView& other) -> std::string {
    try {
      plan.run(q, other, v, out);
    } catch (const widehead::Error& error) {
      return error.what();
    }
    return "";
  };
  auto other = k;
  other.shape[2] = 2;
  EXPECT_EQ(message(other), "k is [1, 1, 2, 1]; the plan was made for [1, 1, 3, 1]");
  other = k;
  other.strides[2] = 2;
  EXPECT_EQ(message(other), "k has strides [3, 3, 2, 1]; the plan was made for [3, 3, 1, 1]");
  other = k;
  other.dtype = widehead::Dtype::kF16;
  EXPECT_EQ(message(other), "k has another type than the plan was made for");
  EXPECT_EQ(message(k), "");
}

// The same line in codes: ln 3 is 3 steps of ln 3 / 3, and values are steps of 13.
struct CodedLine {
  Line line;
  int8_t k[3] = {0, 3, 6}, v[3] = {1, 2, 3};
  float scale_k = std::log(3.0f) / 3, scales_v[3] = {13, 13, 13};

  widehead::TensorView keys() const {
    return {k, widehead::Quantised::kInt8, {1, 1, 3, 1}, {&scale_k, widehead::Scales::kTensor, {}}};
  }
  widehead::TensorView values() const {
    return {v,
            widehead::Quantised::kInt8,
            {1, 1, 3, 1},
            {scales_v, widehead::Scales::kTokenHead, {3, 3, 1, 1}}};
  }
};

TEST(Cpp, ReadsCodesFromViews) {
  CodedLine coded;
  Line& line = coded.line;
  const auto q = line.view(line.q), out = line.view(line.out);
  widehead::attention(q, coded.keys(), coded.values(), out);
  EXPECT_NEAR(line.out[0], 34, 1e-4);
  line.out[0] = kNan;
  widehead::attention(q, line.view(line.k), coded.values(), out);  // one of them elements
  EXPECT_NEAR(line.out[0], 34, 1e-4);
  line.out[0] = kNan;
  widehead::plan(widehead::problem(q, coded.keys(), coded.values(), out))
      .run(q, coded.keys(), coded.values(), out);
  EXPECT_NEAR(line.out[0], 34, 1e-4);
}

TEST(Cpp, ARunRefusesCodesOfAnotherProblem) {
  CodedLine coded;
  Line& line = coded.line;
  const auto q = line.view(line.q), out = line.view(line.out);
  const auto plan = widehead::plan(widehead::problem(q, coded.keys(), coded.values(), out));
  const auto message = [&](const widehead::TensorView& k, const widehead::TensorView& v) {
    try {
      plan.run(q, k, v, out);
    } catch (const widehead::Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(message(coded.keys(), coded.values()), "");
  EXPECT_EQ(message(line.view(line.k), coded.values()),
            "k has another type than the plan was made for");
  auto other = coded.keys();
  other.quantised = widehead::Quantised::kE4m3;
  EXPECT_EQ(message(other, coded.values()), "k has another type than the plan was made for");
  other = coded.values();
  other.scales.kind = widehead::Scales::kHead;
  EXPECT_EQ(message(coded.keys(), other),
            "scales of v are of another kind than the plan was made for");
  other = coded.values();
  other.scales.strides[2] = 2;
  EXPECT_EQ(message(coded.keys(), other),
            "scales of v have strides [3, 3, 2, 1]; the plan was made for [3, 3, 1, 1]");
  EXPECT_THROW(widehead::problem(coded.keys(), coded.keys(), coded.values(), out), widehead::Error);
}

TEST(Cpp, PlansMoveAndExplain) {
  std::vector<float> q(64), k(64), v(64), out(64);
  const auto view = [](std::vector<float>& data) {
    return widehead::TensorView(data.data(), widehead::Dtype::kF32, {1, 1, 8, 8});
  };
  widehead::Plan plan =
      widehead::plan(widehead::problem(view(q), view(k), view(v), view(out)), {.threads = 1});
  widehead::Plan moved = std::move(plan);
  EXPECT_NE(moved.explain().find(moved.kernel()), std::string::npos);
  EXPECT_EQ(widehead::Plan::from_json(moved.json()).kernel(), moved.kernel());
  EXPECT_THROW(widehead::plan(widehead::problem(view(q), view(k), view(v), view(out)),
                              {.kernel = "nothing"}),
               widehead::Error);
}

// Two sequences of one and two keys, in pages of two, one query each: the first sees its value, the
// second the mean of weights 1 and 3.
struct TwoSequences {
  std::vector<float> q{1, 1}, out{kNan, kNan};
  std::vector<float> k{kNan, kNan, kNan, kNan, kNan, kNan}, v = k;  // three pages
  std::vector<int32_t> offsets{0, 1, 2}, lengths{1, 2}, table{2, 0};

  widehead::TensorView pool(std::vector<float>& data) {
    return widehead::paged(data.data(), widehead::Dtype::kF32, 3, 2, 1, 1);
  }
  static widehead::TensorView tokens(std::vector<float>& data) {
    return widehead::packed(data.data(), widehead::Dtype::kF32, static_cast<int64_t>(data.size()),
                            1, 1);
  }
  widehead::Options options() const {
    return {.key_lengths = lengths.data(),
            .sequences = {{.batch = 2,
                           .len_q = 1,
                           .len_k = 2,
                           .query_offsets = offsets.data(),
                           .page_table = table.data()}}};
  }
};

TEST(Cpp, KeysAreAppendedToPagesAndSequencesReadTheirOwn) {
  TwoSequences two;
  std::vector<float> new_k{5, 0, 7, std::log(3.0f)}, new_v{11, 20, kNan, 40};
  const std::vector<int64_t> slots{4, 0, -1, 1};
  widehead::append(two.tokens(new_k), two.tokens(new_v), slots, two.pool(two.k), two.pool(two.v));
  EXPECT_EQ(two.k[4], 5);
  EXPECT_TRUE(std::isnan(two.k[5]));
  const auto q = two.tokens(two.q), out = two.tokens(two.out);
  widehead::attention(q, two.pool(two.k), two.pool(two.v), out, two.options());
  EXPECT_NEAR(two.out[0], 11, 1e-5);
  EXPECT_NEAR(two.out[1], 35, 1e-4);
  // A plan runs from the views too, and fewer sequences than it was made for.
  const auto plan =
      widehead::plan(widehead::problem(q, two.pool(two.k), two.pool(two.v), out, two.options()));
  two.out = {kNan, kNan};
  plan.run(q, two.pool(two.k), two.pool(two.v), out,
           {.key_lengths = two.lengths.data(), .sequences = *two.options().sequences});
  EXPECT_NEAR(two.out[1], 35, 1e-4);
  two.out = {kNan, kNan};
  auto tensors = widehead::tensors(q, two.pool(two.k), two.pool(two.v), out, two.options());
  tensors.batch = 1;
  std::vector<char> workspace(plan.workspace_bytes() + 64);
  tensors.workspace_bytes = plan.workspace_bytes();
  tensors.workspace = workspace.data() + 64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64;
  plan.run(tensors);
  EXPECT_NEAR(two.out[0], 11, 1e-5);
  EXPECT_TRUE(std::isnan(two.out[1]));
}

TEST(Cpp, PackedKeysAndListsOfPagesAreReadToo) {
  TwoSequences two;
  std::vector<float> k{5, 0, std::log(3.0f)}, v{11, 20, 40};
  std::vector<int32_t> key_offsets{0, 1, 3}, page_offsets{0, 1, 2};
  widehead::Options options = two.options();
  options.key_lengths = nullptr;
  options.sequences->page_table = nullptr;
  options.sequences->key_offsets = key_offsets.data();
  const auto q = two.tokens(two.q), out = two.tokens(two.out);
  widehead::attention(q, two.tokens(k), two.tokens(v), out, options);
  EXPECT_NEAR(two.out[1], 35, 1e-4);
  const std::vector<int64_t> slots{4, 0, 1};
  widehead::append(two.tokens(k), two.tokens(v), slots, two.pool(two.k), two.pool(two.v));
  options = two.options();
  options.sequences->page_offsets = page_offsets.data();
  options.sequences->page_entries = 2;
  two.out = {kNan, kNan};
  widehead::attention(q, two.pool(two.k), two.pool(two.v), out, options);
  EXPECT_NEAR(two.out[0], 11, 1e-5);
  EXPECT_NEAR(two.out[1], 35, 1e-4);
}

TEST(Cpp, SequencesThatDisagreeWithTheViewsAreErrors) {
  TwoSequences two;
  const auto q = two.tokens(two.q), out = two.tokens(two.out);
  widehead::Options options = two.options();
  options.sequences->query_offsets = nullptr;  // dense: a batch of two
  try {
    widehead::problem(q, two.pool(two.k), two.pool(two.v), out, options);
    FAIL() << "no error";
  } catch (const widehead::Error& error) {
    EXPECT_STREQ(error.what(), "q is [1, 1, 2, 1]; the others make it [2, 1, 1, 1]");
  }
  const std::vector<int64_t> slots{0};
  EXPECT_THROW(widehead::append(two.tokens(two.q), two.tokens(two.q), slots, two.pool(two.k),
                                two.pool(two.v)),
               widehead::Error);
  widehead::TensorView codes = two.tokens(two.k);
  codes.quantised = widehead::Quantised::kInt8;
  try {
    widehead::append(codes, two.tokens(two.v), slots, two.pool(two.k), two.pool(two.v));
    FAIL() << "no error";
  } catch (const widehead::Error& error) {
    EXPECT_NE(std::string(error.what()).find("of codes"), std::string::npos) << error.what();
  }
  widehead::TensorView fewer = two.pool(two.v);
  --fewer.shape[0];
  try {
    widehead::append(two.tokens(two.k), two.tokens(two.v), std::vector<int64_t>(6, -1),
                     two.pool(two.k), fewer);
    FAIL() << "no error";
  } catch (const widehead::Error& error) {
    EXPECT_NE(std::string(error.what()).find("v is ["), std::string::npos) << error.what();
  }
}

TEST(Cpp, CodesAreAppendedWithTheirScalesAndReadAgain) {
  // A dense cache of two tokens of one head: int8 keys with a scale each, e4m3 values with a scale
  // that is given.
  std::vector<int8_t> k(2 * 4, 99);
  std::vector<uint8_t> v(2 * 4, 99);
  std::vector<float> scales_k(2, kNan), scale_v{0.5f};
  const widehead::TensorView keys(
      k.data(), widehead::Quantised::kInt8, {1, 1, 2, 4},
      {scales_k.data(), widehead::Scales::kTokenHead, widehead::dense_strides({1, 1, 2, 1})});
  const widehead::TensorView values(v.data(), widehead::Quantised::kE4m3, {1, 1, 2, 4},
                                    {scale_v.data(), widehead::Scales::kTensor, {}});
  std::vector<float> new_k{0, 254, -127, 1}, new_v{1, 2, -3, 0};
  const auto tokens = [](std::vector<float>& data) {
    return widehead::packed(data.data(), widehead::Dtype::kF32, 1, 1, 4);
  };
  widehead::append(tokens(new_k), tokens(new_v), std::vector<int64_t>{1}, keys, values);
  EXPECT_EQ(scales_k[1], 2);
  EXPECT_TRUE(std::isnan(scales_k[0]));
  EXPECT_EQ(k, (std::vector<int8_t>{99, 99, 99, 99, 0, 127, -64, 0}));  // ties to even
  EXPECT_EQ(v, (std::vector<uint8_t>{99, 99, 99, 99, 0x40, 0x48, 0xcc, 0}));
  std::vector<float> q(4, 0), out(4, kNan);
  const std::vector<int32_t> starts{1};
  const auto view = [](std::vector<float>& data) {
    return widehead::TensorView(data.data(), widehead::Dtype::kF32, {1, 1, 1, 4});
  };
  widehead::attention(view(q), keys, values, view(out), {.key_starts = starts.data()});
  EXPECT_EQ(out, new_v);
}

}  // namespace
