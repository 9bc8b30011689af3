// wh_merge() on a GPU against the host's, which tests/test_merge.cpp compares with float64.
#include <algorithm>
#include <limits>

#include "core/element.h"
#include "support/gpu_attention.h"

namespace wh {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kBatch = 2, kHeads = 3, kQueries = 17;
constexpr int64_t kRows = kBatch * kHeads * kQueries;

class GpuMerge : public testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "no GPU";
  }
};

// An output on both sides. Rows are packed, or lie apart with the columns outermost.
struct Output {
  Output(Dtype type, int64_t dim, bool is_packed, std::mt19937& random)
      : dtype(type), host(static_cast<size_t>(kRows * dim) * dtype_bytes(type)), lse(kRows) {
    std::normal_distribution<float> normal;
    const int64_t row = is_packed ? dim : 1;
    const int64_t strides[] = {row * kHeads * kQueries, row, row * kHeads, is_packed ? 1 : kRows};
    std::copy(std::begin(strides), std::end(strides), part.stride_out);
    const int64_t steps[] = {kHeads * kQueries, kQueries, 1};
    std::copy(std::begin(steps), std::end(steps), part.stride_log_sum_exp);
    for (float& value : lse) value = random() % 4 == 0 ? -kInf : 3 * normal(random);
    for (int64_t i = 0; i < kRows * dim; ++i) {
      store_element(host.data(), dtype, i, normal(random));
    }
    // What saw nothing may hold anything.
    for (int64_t b = 0, i = 0; b < kBatch; ++b) {
      for (int64_t h = 0; h < kHeads; ++h) {
        for (int64_t q = 0; q < kQueries; ++q, ++i) {
          if (lse[static_cast<size_t>(i)] != -kInf) continue;
          for (int64_t d = 0; d < dim; ++d) {
            const int64_t at = b * strides[0] + h * strides[1] + q * strides[2] + d * strides[3];
            store_element(host.data(), dtype, at, std::numeric_limits<float>::quiet_NaN());
          }
        }
      }
    }
    device = std::make_unique<DeviceBuffer>(host);
    device_lse = std::make_unique<DeviceBuffer>(lse);
    part.dtype = static_cast<int32_t>(type);
  }
  wh_partial on(int32_t where) const {
    wh_partial made = part;
    made.out = where == WH_CUDA ? device->data() : static_cast<const void*>(host.data());
    made.log_sum_exp =
        where == WH_CUDA ? static_cast<const float*>(device_lse->data()) : lse.data();
    return made;
  }
  std::vector<float> floats(const std::vector<std::byte>& from) const {
    std::vector<float> values(from.size() / dtype_bytes(dtype));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = load_element(from.data(), dtype, static_cast<int64_t>(i));
    }
    return values;
  }

  Dtype dtype;
  std::vector<std::byte> host;
  std::vector<float> lse;
  wh_partial part{};
  std::unique_ptr<DeviceBuffer> device, device_lse;
};

wh_status merge_on(int32_t where, const Output& to, const std::vector<Output>& parts, int64_t dim,
                   const float* sinks) {
  wh_merged merged;
  EXPECT_EQ(wh_merged_init(&merged, sizeof(merged)), WH_OK);
  merged.device = where;
  merged.dtype = to.part.dtype;
  merged.batch = kBatch;
  merged.heads_q = kHeads;
  merged.len_q = kQueries;
  merged.dim_v = dim;
  const wh_partial target = to.on(where);
  merged.out = const_cast<void*>(target.out);
  merged.log_sum_exp = const_cast<float*>(target.log_sum_exp);
  std::copy(std::begin(target.stride_out), std::end(target.stride_out), merged.stride_out);
  std::copy(std::begin(target.stride_log_sum_exp), std::end(target.stride_log_sum_exp),
            merged.stride_log_sum_exp);
  merged.sinks = sinks;
  std::vector<wh_partial> c_parts;
  for (const Output& part : parts) c_parts.push_back(part.on(where));
  return wh_merge(&merged, c_parts.data(), c_parts.size(), nullptr);
}

// Within the rounding of out's type and of f32 exponentials, empty rows exactly.
void expect_as_host(const Output& out) {
  const auto have = out.floats(out.device->download<std::byte>()), want = out.floats(out.host);
  Errors errors;
  for (size_t i = 0; i < want.size(); ++i) errors.add(have[i], want[i]);
  EXPECT_LE(errors.relative_rms(), tolerance_of(out.dtype));
  const auto have_lse = out.device_lse->download<float>();
  for (size_t i = 0; i < have_lse.size(); ++i) {
    if (out.lse[i] == -kInf) {
      EXPECT_EQ(have_lse[i], -kInf);
    } else {
      EXPECT_NEAR(have_lse[i], out.lse[i], 4e-6 + 1e-6 * std::abs(out.lse[i]));
    }
  }
}

TEST_F(GpuMerge, IsAsTheHosts) {
  std::mt19937 random(1);
  const std::vector<float> sinks = {0.5f, -2, 3};
  const DeviceBuffer device_sinks(sinks);
  for (const Dtype to : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
    for (const int64_t dim : {1, 7, 64, 192, 512, 1024}) {
      for (const int count : {0, 1, 2, 9, 32, 33, 100}) {  // more than 32 are merged in rounds
        SCOPED_TRACE(std::to_string(dim) + " x " + std::to_string(count));
        std::vector<Output> parts;
        for (int i = 0; i < count; ++i) {
          parts.emplace_back(static_cast<Dtype>(random() % 3), dim, random() % 3 != 0, random);
        }
        Output out(to, dim, count % 2 == 0, random);
        const bool has_sinks = random() % 2 == 0;
        ASSERT_EQ(merge_on(WH_CPU, out, parts, dim, has_sinks ? sinks.data() : nullptr), WH_OK)
            << wh_last_error();
        const auto* on_device = static_cast<const float*>(device_sinks.data());
        ASSERT_EQ(merge_on(WH_CUDA, out, parts, dim, has_sinks ? on_device : nullptr), WH_OK)
            << wh_last_error();
        expect_as_host(out);
      }
    }
  }
}

TEST_F(GpuMerge, IsTheSameInPlace) {
  std::mt19937 random(2);
  std::vector<Output> parts;
  for (int i = 0; i < 3; ++i) parts.emplace_back(Dtype::kBf16, 96, true, random);
  const Output out(Dtype::kBf16, 96, true, random);
  ASSERT_EQ(merge_on(WH_CUDA, out, parts, 96, nullptr), WH_OK) << wh_last_error();
  ASSERT_EQ(merge_on(WH_CUDA, parts[1], parts, 96, nullptr), WH_OK) << wh_last_error();
  EXPECT_EQ(parts[1].device->download<std::byte>(), out.device->download<std::byte>());
  const auto have = parts[1].device_lse->download<float>();
  EXPECT_EQ(have, out.device_lse->download<float>());
}

TEST_F(GpuMerge, NamesHostMemory) {
  std::mt19937 random(3);
  std::vector<Output> parts;
  for (int i = 0; i < 2; ++i) parts.emplace_back(Dtype::kF32, 8, true, random);
  const Output out(Dtype::kF32, 8, true, random);
  const float sinks[kHeads] = {};
  EXPECT_EQ(merge_on(WH_CUDA, out, parts, 8, sinks), WH_INVALID_ARGUMENT);
  EXPECT_NE(std::string(wh_last_error()).find("sinks is host memory"), std::string::npos)
      << wh_last_error();
}

}  // namespace
}  // namespace wh
