// wh_append() on a GPU against the host's, which tests/test_append.cpp holds to its rows.
#include <algorithm>
#include <string>
#include <vector>

#include "core/element.h"
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

TEST_F(GpuAppend, RefusesMemoryOfTheHostAndCodes) {
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
  p.quantised_k = p.quantised_v = WH_INT8;
  EXPECT_EQ(wh_append(&p, &a, nullptr), WH_REFUSED);
}

}  // namespace
}  // namespace wh
