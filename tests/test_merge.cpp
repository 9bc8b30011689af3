// wh_merge() against float64, on its own and on runs over parts of the keys.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/element.h"
#include "verify/errors.h"
#include "widehead/widehead.hpp"

namespace wh {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A tensor of heads between guards, dim outermost or innermost in memory, with room between rows.
struct Output {
  Dtype dtype;
  std::vector<std::byte> data;
  std::vector<float> lse;
  wh_partial part{};

  Output(Dtype type, const wh_merged& m, bool dim_is_last)
      : dtype(type),
        data(static_cast<size_t>(m.batch * m.heads_q * m.len_q * (m.dim_v + 3)) * 4),
        lse(static_cast<size_t>(m.batch * m.heads_q * m.len_q * 2), kNan) {
    const int64_t rows = m.batch * m.heads_q * m.len_q;
    const int64_t row = dim_is_last ? m.dim_v + 3 : 1;
    const int64_t strides[] = {row * m.heads_q * m.len_q, row, row * m.heads_q,
                               dim_is_last ? 1 : rows};
    std::copy(std::begin(strides), std::end(strides), part.stride_out);
    const int64_t steps[] = {2 * m.heads_q * m.len_q, 2 * m.len_q, 2};
    std::copy(std::begin(steps), std::end(steps), part.stride_log_sum_exp);
    part.out = data.data();
    part.log_sum_exp = lse.data();
    part.dtype = static_cast<int32_t>(type);
  }
  int64_t at(int64_t b, int64_t h, int64_t i, int64_t d) const {
    const auto& s = part.stride_out;
    return b * s[0] + h * s[1] + i * s[2] + d * s[3];
  }
  float& lse_at(int64_t b, int64_t h, int64_t i) {
    const auto& s = part.stride_log_sum_exp;
    return lse[static_cast<size_t>(b * s[0] + h * s[1] + i * s[2])];
  }
  float get(int64_t b, int64_t h, int64_t i, int64_t d) const {
    return load_element(data.data(), dtype, at(b, h, i, d));
  }
  void set(int64_t b, int64_t h, int64_t i, int64_t d, float value) {
    store_element(data.data(), dtype, at(b, h, i, d), value);
  }
};

struct Merge {
  wh_merged merged{};
  std::vector<Output> parts;
  std::vector<float> sinks;

  Merge(int64_t batch, int64_t heads, int64_t length, int64_t dim) {
    EXPECT_EQ(wh_merged_init(&merged, sizeof(merged)), WH_OK);
    merged.batch = batch;
    merged.heads_q = heads;
    merged.len_q = length;
    merged.dim_v = dim;
  }
  template <typename Visit>
  void each_row(const Visit& visit) const {
    for (int64_t b = 0; b < merged.batch; ++b) {
      for (int64_t h = 0; h < merged.heads_q; ++h) {
        for (int64_t i = 0; i < merged.len_q; ++i) visit(b, h, i);
      }
    }
  }
  void add_part(Dtype dtype, std::mt19937& random, double lse_spread) {
    std::normal_distribution<double> normal;
    parts.emplace_back(dtype, merged, parts.size() % 2 == 0);
    Output& part = parts.back();
    each_row([&](int64_t b, int64_t h, int64_t i) {
      const bool sees_nothing = random() % 4 == 0;
      part.lse_at(b, h, i) = sees_nothing ? -kInf : static_cast<float>(normal(random) * lse_spread);
      for (int64_t d = 0; d < merged.dim_v; ++d) {
        part.set(b, h, i, d, sees_nothing ? kNan : static_cast<float>(normal(random)));
      }
    });
  }
  void into(Output& out) {
    merged.out = out.data.data();
    merged.dtype = static_cast<int32_t>(out.dtype);
    merged.log_sum_exp = out.lse.data();
    std::copy(std::begin(out.part.stride_out), std::end(out.part.stride_out), merged.stride_out);
    std::copy(std::begin(out.part.stride_log_sum_exp), std::end(out.part.stride_log_sum_exp),
              merged.stride_log_sum_exp);
    merged.sinks = sinks.empty() ? nullptr : sinks.data();
  }
  wh_status run(const wh_run_options* options = nullptr) const {
    std::vector<wh_partial> c_parts;
    for (const Output& part : parts) c_parts.push_back(part.part);
    return wh_merge(&merged, c_parts.data(), c_parts.size(), options);
  }
  // The row by its definition, with everything in float64 but what the parts hold.
  double reference(int64_t b, int64_t h, int64_t i, std::vector<double>& row) {
    row.assign(static_cast<size_t>(merged.dim_v), 0);
    double top = sinks.empty() ? -kInf : sinks[static_cast<size_t>(h)];
    for (Output& part : parts) top = std::max<double>(top, part.lse_at(b, h, i));
    if (top == -kInf) return -kInf;
    double sum = sinks.empty() ? 0 : std::exp(double{sinks[static_cast<size_t>(h)]} - top);
    for (Output& part : parts) sum += std::exp(double{part.lse_at(b, h, i)} - top);
    for (Output& part : parts) {
      const double share = std::exp(double{part.lse_at(b, h, i)} - top) / sum;
      if (part.lse_at(b, h, i) == -kInf) continue;
      for (int64_t d = 0; d < merged.dim_v; ++d) {
        row[static_cast<size_t>(d)] += share * part.get(b, h, i, d);
      }
    }
    return top + std::log(sum);
  }
  // Relative RMS of out, and every log-sum-exp within the rounding of f32.
  void expect_reference(Output& out) {
    double squares = 0, errors = 0;
    std::vector<double> row;
    each_row([&](int64_t b, int64_t h, int64_t i) {
      const double lse = reference(b, h, i, row);
      const float have = out.lse_at(b, h, i);
      if (lse == -kInf) {
        EXPECT_EQ(have, -kInf);
      } else {
        EXPECT_NEAR(have, lse, 4e-7 * std::max(1.0, std::abs(lse)));
      }
      for (int64_t d = 0; d < merged.dim_v; ++d) {
        const double want = row[static_cast<size_t>(d)];
        errors += std::pow(out.get(b, h, i, d) - want, 2);
        squares += want * want;
      }
    });
    EXPECT_LE(std::sqrt(errors), tolerance_of(out.dtype) * std::sqrt(squares));
  }
};

TEST(Merge, IsWithinRoundingOfFloat64) {
  std::mt19937 random(1);
  for (const Dtype to : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
    for (const int64_t dim : {1, 7, 64, 192, 1024}) {
      for (const int count : {1, 2, 3, 9}) {
        for (const bool has_sinks : {false, true}) {
          SCOPED_TRACE(std::to_string(dim) + " x " + std::to_string(count));
          Merge merge(2, 3, 5, dim);
          if (has_sinks) merge.sinks = {0.5f, -2, 3};
          for (int i = 0; i < count; ++i) {
            merge.add_part(static_cast<Dtype>(random() % 3), random, 4);
          }
          Output out(to, merge.merged, count % 2 == 0);
          merge.into(out);
          ASSERT_EQ(merge.run(), WH_OK) << wh_last_error();
          merge.expect_reference(out);
        }
      }
    }
  }
}

TEST(Merge, OfNothingIsAnEmptyRowOrTheSink) {
  Merge merge(1, 2, 1, 4);
  Output out(Dtype::kF32, merge.merged, true);
  merge.into(out);
  ASSERT_EQ(merge.run(), WH_OK) << wh_last_error();
  merge.expect_reference(out);
  EXPECT_EQ(out.lse_at(0, 1, 0), -kInf);
  merge.sinks = {1.5f, -kInf};
  merge.into(out);
  ASSERT_EQ(merge.run(), WH_OK) << wh_last_error();
  EXPECT_EQ(out.lse_at(0, 0, 0), 1.5f);
  EXPECT_EQ(out.lse_at(0, 1, 0), -kInf);
  for (int64_t d = 0; d < 4; ++d) EXPECT_EQ(out.get(0, 0, 0, d), 0);
}

// Weights are of differences: neither large log-sum-exps nor large outputs overflow.
TEST(Merge, KeepsExtremes) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  for (const float level : {-3e38f, -1e30f, -1e5f, -200.0f, 0.0f, 200.0f, 1e5f, 1e30f, 3e38f}) {
    SCOPED_TRACE(level);
    Merge merge(1, 1, 2, 3);
    std::mt19937 random(2);
    for (int i = 0; i < 3; ++i) merge.add_part(Dtype::kF32, random, 1);
    for (Output& part : merge.parts) {
      for (int64_t i = 0; i < 2; ++i) part.lse_at(0, 0, i) = level;
      for (int64_t d = 0; d < 3; ++d) {
        part.set(0, 0, 0, d, d == 1 ? -kLargest : kLargest);
        part.set(0, 0, 1, d, 1);
      }
    }
    Output out(Dtype::kF32, merge.merged, true);
    merge.into(out);
    ASSERT_EQ(merge.run(), WH_OK) << wh_last_error();
    EXPECT_NEAR(out.get(0, 0, 0, 0) / kLargest, 1, 1e-6);
    EXPECT_NEAR(out.get(0, 0, 0, 1) / kLargest, -1, 1e-6);
    EXPECT_NEAR(out.get(0, 0, 1, 0), 1, 1e-6);
    EXPECT_NEAR(out.lse_at(0, 0, 0), level + std::log(3.0), 1e-6 * std::abs(double{level}) + 1e-6);
  }
}

TEST(Merge, HandsNanOnWhereItIsSeen) {
  Merge merge(1, 1, 2, 2);
  std::mt19937 random(3);
  for (int i = 0; i < 2; ++i) merge.add_part(Dtype::kF32, random, 1);
  for (Output& part : merge.parts) {
    for (int64_t i = 0; i < 2; ++i) {
      part.lse_at(0, 0, i) = 1;
      for (int64_t d = 0; d < 2; ++d) part.set(0, 0, i, d, 1);
    }
  }
  merge.parts[1].lse_at(0, 0, 0) = kNan;
  merge.parts[1].set(0, 0, 1, 0, kNan);
  Output out(Dtype::kF32, merge.merged, true);
  merge.into(out);
  ASSERT_EQ(merge.run(), WH_OK) << wh_last_error();
  EXPECT_TRUE(std::isnan(out.lse_at(0, 0, 0)));
  EXPECT_TRUE(std::isnan(out.get(0, 0, 0, 1)));
  EXPECT_TRUE(std::isnan(out.get(0, 0, 1, 0)));
  EXPECT_FLOAT_EQ(out.get(0, 0, 1, 1), 1);
}

// The same bits in place, on one thread and on many.
TEST(Merge, IsTheSameInPlaceAndOnAnyThreads) {
  Merge merge(2, 4, 300, 96);
  std::mt19937 random(4);
  for (int i = 0; i < 3; ++i) merge.add_part(Dtype::kBf16, random, 3);
  merge.sinks = {1, 2, 3, 4};
  Output out(Dtype::kBf16, merge.merged, false);
  merge.into(out);
  ASSERT_EQ(merge.run(), WH_OK) << wh_last_error();
  const wh_executor backwards{
      [](void*, int32_t count, void (*task)(void*, int32_t), void* argument) {
        while (count > 0) task(argument, --count);
      },
      nullptr};
  wh_run_options options;
  ASSERT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
  options.executor = &backwards;
  merge.into(merge.parts[1]);
  ASSERT_EQ(merge.run(&options), WH_OK) << wh_last_error();
  merge.each_row([&](int64_t b, int64_t h, int64_t i) {
    ASSERT_EQ(merge.parts[1].lse_at(b, h, i), out.lse_at(b, h, i));
    for (int64_t d = 0; d < 96; ++d) {
      ASSERT_EQ(merge.parts[1].get(b, h, i, d), out.get(b, h, i, d));
    }
  });
}

// Three runs over parts of the keys, merged with the sinks, are the run over all of them.
TEST(Merge, OfPartsOfTheKeysIsTheWhole) {
  constexpr int64_t kHeads = 4, kQueries = 33, kKeys = 100, kDim = 40;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto values = [&](int64_t count) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& value : made) value = normal(random);
    return made;
  };
  const auto q = values(kHeads * kQueries * kDim), k = values(2 * kKeys * kDim),
             v = values(2 * kKeys * kDim), sinks = values(kHeads);
  const widehead::Extents of_q{1, kHeads, kQueries, kDim}, of_k{1, 2, kKeys, kDim};
  const widehead::Dtype f32 = widehead::Dtype::kF32;
  const auto attend = [&](int64_t begin, int64_t end, const float* with_sinks, float* out,
                          float* lse) {
    const widehead::Extents part{1, 2, end - begin, kDim}, strides = widehead::dense_strides(of_k);
    widehead::attention({q.data(), f32, of_q}, {k.data() + begin * kDim, f32, part, strides},
                        {v.data() + begin * kDim, f32, part, strides}, {out, f32, of_q},
                        {.sinks = with_sinks, .log_sum_exp = lse});
  };
  std::vector<float> whole(q.size()), whole_lse(kHeads * kQueries);
  attend(0, kKeys, sinks.data(), whole.data(), whole_lse.data());
  constexpr int64_t kCuts[] = {0, 1, 64, kKeys};
  std::vector<float> outs[3], lses[3];
  std::vector<widehead::Partial> parts;
  for (size_t i = 0; i < 3; ++i) {
    outs[i].resize(whole.size());
    lses[i].resize(whole_lse.size());
    attend(kCuts[i], kCuts[i + 1], nullptr, outs[i].data(), lses[i].data());
    parts.push_back({{outs[i].data(), f32, of_q}, lses[i].data()});
  }
  widehead::merge(parts[0], parts, sinks.data());
  for (size_t i = 0; i < whole.size(); ++i) EXPECT_NEAR(outs[0][i], whole[i], 3e-6);
  for (size_t i = 0; i < whole_lse.size(); ++i) EXPECT_NEAR(lses[0][i], whole_lse[i], 3e-6);
}

TEST(Merge, NamesWhatIsWrong) {
  const auto expect = [](const std::string& message, const auto& spoil) {
    Merge merge(2, 3, 4, 5);
    std::mt19937 random(6);
    for (int i = 0; i < 2; ++i) merge.add_part(Dtype::kF32, random, 1);
    Output out(Dtype::kF32, merge.merged, true);
    merge.into(out);
    spoil(merge, out);
    EXPECT_EQ(merge.run(), WH_INVALID_ARGUMENT);
    EXPECT_NE(std::string(wh_last_error()).find(message), std::string::npos) << wh_last_error();
  };
  expect("merged.dtype is 3; it must be between 0 and 2",
         [](Merge& m, Output&) { m.merged.dtype = 3; });
  expect("merged.device is 2; it must be between 0 and 1",
         [](Merge& m, Output&) { m.merged.device = 2; });
  expect("heads_q is 0; it must be between 1 and", [](Merge& m, Output&) { m.merged.heads_q = 0; });
  expect("dim_v is 1025; it must be between 1 and 1024",
         [](Merge& m, Output&) { m.merged.dim_v = 1025; });
  expect("out is null", [](Merge& m, Output&) { m.merged.out = nullptr; });
  expect("stride_out[1] is -6; strides are in elements and must not be negative",
         [](Merge& m, Output&) { m.merged.stride_out[1] = -6; });
  expect("elements of out would overlap", [](Merge& m, Output&) { m.merged.stride_out[2] = 0; });
  expect("elements of log_sum_exp would overlap",
         [](Merge& m, Output&) { m.merged.stride_log_sum_exp[1] = 0; });
  expect("parts[1].dtype is -1", [](Merge& m, Output&) { m.parts[1].part.dtype = -1; });
  expect("parts[1].out is null", [](Merge& m, Output&) { m.parts[1].part.out = nullptr; });
  expect("parts[0].log_sum_exp is null",
         [](Merge& m, Output&) { m.parts[0].part.log_sum_exp = nullptr; });
  expect("parts[1].stride_log_sum_exp[0] is -2",
         [](Merge& m, Output&) { m.parts[1].part.stride_log_sum_exp[0] = -2; });
  expect("parts[0].out is at", [](Merge& m, Output&) {
    m.parts[0].part.out = static_cast<const char*>(m.parts[0].part.out) + 1;
  });
  expect("out overlaps parts[0].out",
         [](Merge& m, Output& out) { m.parts[0].part.out = &out.data[4]; });
  expect("out overlaps parts[0].log_sum_exp", [](Merge& m, Output& out) {
    m.parts[0].part.log_sum_exp = reinterpret_cast<float*>(out.data.data());
  });
  expect("out overlaps parts[1].out", [](Merge& m, Output& out) {  // its own, but of another type
    m.parts[1].part.out = out.data.data();
    m.parts[1].part.dtype = WH_BF16;
  });
  expect("log_sum_exp overlaps sinks",
         [](Merge& m, Output& out) { m.merged.sinks = out.lse.data(); });
  expect("merged.size is 0", [](Merge& m, Output&) { m.merged.size = 0; });
  wh_merged merged;
  ASSERT_EQ(wh_merged_init(&merged, sizeof(merged)), WH_OK);
  merged.dim_v = merged.heads_q = 1;
  EXPECT_EQ(wh_merge(&merged, nullptr, 2, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_STREQ(wh_last_error(), "parts is null; count says that there are 2");
  EXPECT_EQ(wh_merge(&merged, nullptr, 0, nullptr), WH_OK) << wh_last_error();  // without rows
}

}  // namespace
}  // namespace wh
