// wh_append() on a GPU against the host's, which tests/test_append.cpp holds to its rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "core/element.h"
#include "core/names.h"
#include "core/quantised.h"
#include "support/gpu_attention.h"

namespace wh {
namespace {

constexpr int64_t kHeads = 3, kTokens = 40, kPages = 5, kPageSize = 16;

class GpuAppend : public testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "no GPU";
  }
};

// A pool of pages, K and V apart, tokens before heads or heads before tokens.
wh_problem pool(int32_t device, Dtype dtype, int64_t dim, bool heads_first) {
  wh_problem p;
  EXPECT_EQ(wh_problem_init(&p, sizeof(p)), WH_OK);
  p.device = device;
  p.dtype_q = p.dtype_kv = static_cast<int32_t>(dtype);
  p.heads_q = p.heads_kv = kHeads;
  p.dim_qk = p.dim_v = dim;
  p.len_k = kPages * kPageSize;
  p.key_layout = WH_KEYS_PAGED;
  p.uses = WH_USES_KEY_LENGTHS;
  p.page_size = kPageSize;
  p.pages = kPages;
  EXPECT_EQ(wh_problem_set_dense(&p), WH_OK);
  if (heads_first) std::swap(p.stride_k[1], p.stride_k[2]);
  if (heads_first) p.stride_k[1] = kPageSize * (p.stride_k[2] = dim);
  return p;
}

// Slots beyond the pool are skipped on the device; the host's call has them negative.
TEST_F(GpuAppend, WritesTheHostsBytes) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<int64_t> slots(kPages * kPageSize);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), random);
  slots.resize(kTokens);
  slots[3] = slots[17] = -1;
  std::vector<int64_t> wild = slots;
  wild[3] = kPages * kPageSize;
  wild[17] = int64_t{1} << 60;
  for (const Dtype to : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
    for (const Dtype from : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
      for (const int64_t dim : {1, 7, 64, 576}) {
        for (const bool heads_first : {false, true}) {
          SCOPED_TRACE(std::to_string(static_cast<int>(from)) + " to " +
                       std::to_string(static_cast<int>(to)) + " dim " + std::to_string(dim));
          std::vector<std::byte> rows(static_cast<size_t>(kTokens * kHeads * dim) *
                                      dtype_bytes(from));
          for (int64_t i = 0; i < kTokens * kHeads * dim; ++i) {
            store_element(rows.data(), from, i, normal(random));
          }
          std::vector<std::byte> k(
              static_cast<size_t>(kPages * kPageSize * kHeads * dim) * dtype_bytes(to),
              std::byte{0x5b});
          std::vector<std::byte> v = k;
          const DeviceBuffer device_rows(rows), device_k(k), device_v(v), device_slots(wild);
          wh_appended a;
          ASSERT_EQ(wh_appended_init(&a, sizeof(a)), WH_OK);
          a.tokens = kTokens;
          a.dtype = static_cast<int32_t>(from);
          const int64_t strides[] = {kHeads * dim, dim, 1};
          std::copy(std::begin(strides), std::end(strides), a.stride_new_k);
          std::copy(std::begin(strides), std::end(strides), a.stride_new_v);
          a.new_k = a.new_v = rows.data();
          a.slots = slots.data();
          a.k = k.data();
          a.v = v.data();
          const wh_problem on_host = pool(WH_CPU, to, dim, heads_first);
          ASSERT_EQ(wh_append(&on_host, &a, nullptr), WH_OK) << wh_last_error();
          a.new_k = a.new_v = device_rows.data();
          a.slots = static_cast<const int64_t*>(device_slots.data());
          a.k = device_k.data();
          a.v = device_v.data();
          const wh_problem on_device = pool(WH_CUDA, to, dim, heads_first);
          ASSERT_EQ(wh_append(&on_device, &a, nullptr), WH_OK) << wh_last_error();
          EXPECT_EQ(device_k.download<std::byte>(), k);
          EXPECT_EQ(device_v.download<std::byte>(), v);
        }
      }
    }
  }
}

// Codes and scales of every format, kind and type: K with scales of `kind`, V with other strides.
void expect_hosts_codes(Quantised format, Scales kind, Dtype from, int64_t dim,
                        std::mt19937& random) {
  constexpr int64_t kBatch = 2, kLength = 24, kNew = 17;
  const bool is_block = is_block_format(format);
  wh_problem p;
  ASSERT_EQ(wh_problem_init(&p, sizeof(p)), WH_OK);
  p.heads_q = p.heads_kv = kHeads;
  p.dim_qk = p.dim_v = dim;
  p.batch = kBatch;
  p.len_k = kLength;
  p.quantised_k = p.quantised_v = static_cast<int32_t>(format);
  p.scales_k = p.scales_v = static_cast<int32_t>(kind);
  ASSERT_EQ(wh_problem_set_dense(&p), WH_OK);
  if (!is_block) p.stride_v[3] = 2;  // V's columns lie apart
  for (int i = 0; i < 3 && !is_block; ++i) p.stride_v[i] *= 2;
  std::normal_distribution<float> normal;
  std::vector<std::byte> rows(static_cast<size_t>(kNew * kHeads * dim) * dtype_bytes(from));
  for (int64_t i = 0; i < kNew * kHeads * dim; ++i) {
    store_element(rows.data(), from, i, normal(random) * std::exp2(normal(random) * 4));
  }
  const float odd[] = {NAN, -NAN, INFINITY, -INFINITY, 0, -0.0f, 65504, -1e-7f};
  for (int64_t i = 0; i < 8; ++i) store_element(rows.data(), from, 3 * i * dim + i % dim, odd[i]);
  const auto elements = kBatch * kLength * kHeads * dim;
  const std::vector<std::byte> painted(
      static_cast<size_t>(2 * stored_bytes(format, Dtype::kF32, elements)), std::byte{0x5b});
  std::vector<float> scales(static_cast<size_t>(kBatch * kHeads * std::max(kLength, dim)));
  for (float& scale : scales) scale = std::exp2(normal(random));
  scales[1] = 0;
  std::vector<int64_t> slots(kBatch * kLength);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), random);
  slots.resize(kNew);
  slots[5] = -1;
  const auto appended = [&](const void* new_rows, const void* at, void* k, void* v, void* scales_k,
                            void* scales_v) {
    wh_appended a;
    EXPECT_EQ(wh_appended_init(&a, sizeof(a)), WH_OK);
    a.tokens = kNew;
    a.dtype = static_cast<int32_t>(from);
    const int64_t strides[] = {kHeads * dim, dim, 1};
    std::copy(std::begin(strides), std::end(strides), a.stride_new_k);
    std::copy(std::begin(strides), std::end(strides), a.stride_new_v);
    a.new_k = a.new_v = new_rows;
    a.slots = static_cast<const int64_t*>(at);
    a.k = k;
    a.v = v;
    a.scales_k = static_cast<float*>(scales_k);
    a.scales_v = static_cast<float*>(scales_v);
    return a;
  };
  const DeviceBuffer device_rows(rows), device_slots(slots), device_k(painted), device_v(painted),
      device_scales_k(scales), device_scales_v(scales);
  std::vector<std::byte> k = painted, v = painted;
  std::vector<float> scales_k = scales, scales_v = scales;
  wh_appended a =
      appended(rows.data(), slots.data(), k.data(), v.data(), scales_k.data(), scales_v.data());
  ASSERT_EQ(wh_append(&p, &a, nullptr), WH_OK) << wh_last_error();
  p.device = WH_CUDA;
  a = appended(device_rows.data(), device_slots.data(), device_k.data(), device_v.data(),
               device_scales_k.data(), device_scales_v.data());
  ASSERT_EQ(wh_append(&p, &a, nullptr), WH_OK) << wh_last_error();
  EXPECT_EQ(device_k.download<std::byte>(), k);
  EXPECT_EQ(device_v.download<std::byte>(), v);
  const auto bits = [](const std::vector<float>& of) {
    std::vector<uint32_t> all(of.size());
    std::memcpy(all.data(), of.data(), of.size() * sizeof(float));
    return all;
  };
  EXPECT_EQ(device_scales_k.download<uint32_t>(), bits(scales_k));
  EXPECT_EQ(device_scales_v.download<uint32_t>(), bits(scales_v));
}

TEST_F(GpuAppend, WritesTheHostsCodesAndScales) {
  std::mt19937 random(2);
  for (const Quantised format :
       {Quantised::kE4m3, Quantised::kInt8, Quantised::kQ8_0, Quantised::kQ4_0}) {
    for (const Scales kind :
         {Scales::kNone, Scales::kTensor, Scales::kHead, Scales::kTokenHead, Scales::kChannel}) {
      if (is_block_format(format) && kind != Scales::kNone) continue;
      for (const Dtype from : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
        for (const int64_t dim : {32, 96, 576}) {
          SCOPED_TRACE(std::string(kQuantiseds.name(format)) + " " + kScales.name(kind) + " " +
                       kDtypes.name(from) + " " + std::to_string(dim));
          expect_hosts_codes(format, kind, from, dim, random);
        }
      }
    }
  }
}

TEST_F(GpuAppend, RefusesMemoryOfTheHost) {
  wh_problem p = pool(WH_CUDA, Dtype::kF16, 32, false);
  const std::vector<uint16_t> host(kPages * kPageSize * kHeads * 32);
  const std::vector<int64_t> slots{0};
  const DeviceBuffer device(host), device_slots(slots);
  wh_appended a;
  ASSERT_EQ(wh_appended_init(&a, sizeof(a)), WH_OK);
  a.tokens = 1;
  a.dtype = WH_F16;
  a.stride_new_k[1] = a.stride_new_v[1] = 32;
  a.stride_new_k[2] = a.stride_new_v[2] = 1;
  a.slots = static_cast<const int64_t*>(device_slots.data());
  const DeviceBuffer rows(host);
  a.new_k = host.data();
  a.new_v = rows.data();
  a.k = device.data();
  const DeviceBuffer v(host);
  a.v = v.data();
  EXPECT_EQ(wh_append(&p, &a, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(wh_last_error()).rfind("new_k", 0), 0u) << wh_last_error();
  a.new_k = rows.data();
  EXPECT_EQ(wh_append(&p, &a, nullptr), WH_OK) << wh_last_error();
  p.quantised_k = WH_INT8;
  p.scales_k = WH_SCALES_TOKEN_HEAD;
  std::vector<float> scales(kPages * kPageSize * kHeads);
  EXPECT_EQ(wh_problem_set_dense(&p), WH_OK);
  a.scales_k = scales.data();
  EXPECT_EQ(wh_append(&p, &a, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_EQ(std::string(wh_last_error()).rfind("scales_k", 0), 0u) << wh_last_error();
}

}  // namespace
}  // namespace wh
