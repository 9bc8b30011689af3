// Attention over a quantised cache has the bits of attention over the cache that was widened first:
// whatever the codes and scales are, and at every set of instructions.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "api/machine.h"
#include "core/kv_tensor.h"
#include "plan/planner.h"
#include "verify/execution.h"

namespace wh {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kHeadsKv = 2, kKeys = 130;

struct Stored {
  Quantised format;
  Scales scales;
};
constexpr Stored kStored[] = {
    {Quantised::kE4m3, Scales::kNone},      {Quantised::kE4m3, Scales::kTensor},
    {Quantised::kE4m3, Scales::kHead},      {Quantised::kE4m3, Scales::kTokenHead},
    {Quantised::kE4m3, Scales::kChannel},   {Quantised::kInt8, Scales::kNone},
    {Quantised::kInt8, Scales::kTensor},    {Quantised::kInt8, Scales::kHead},
    {Quantised::kInt8, Scales::kTokenHead}, {Quantised::kInt8, Scales::kChannel},
    {Quantised::kQ8_0, Scales::kNone},      {Quantised::kQ4_0, Scales::kNone}};

// Bytes at random: every code, -128, scales of f16 that are denormal, infinite and NaN. Scales of
// f32 are of every size, 0, denormal and NaN among them.
struct Cache {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<float> widened;

  Cache(std::mt19937& random, const Stored& stored, int64_t dim, bool is_wild) {
    constexpr float kSizes[] = {0, 1e-42f, 1e-6f, 0.01f, 1, -0.5f, 448, 1e30f, 3e38f, kNan};
    bytes.resize(
        static_cast<size_t>(stored_bytes(stored.format, Dtype::kF32, kHeadsKv * kKeys * dim)));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    scales.resize(static_cast<size_t>(kHeadsKv * std::max(kKeys, dim)));
    for (float& scale : scales) scale = kSizes[is_wild ? random() % 10 : 2 + random() % 3];
    if (is_wild) return;
    // No NaN and infinity, so that there is something to compare.
    if (stored.format == Quantised::kE4m3) {
      for (uint8_t& byte : bytes) byte = (byte & 0x7f) == 0x7f ? byte ^ 1 : byte;
    }
    const auto tame = [&](size_t block) {
      for (size_t i = 1; i < bytes.size(); i += block) bytes[i] = 0x20 + bytes[i] % 16;
    };
    if (stored.format == Quantised::kQ8_0) tame(sizeof(Q8_0));
    if (stored.format == Quantised::kQ4_0) tame(sizeof(Q4_0));
  }

  void widen(const KvTensor& tensor) {
    widened.resize(static_cast<size_t>(kHeadsKv * kKeys * tensor.dim));
    for (int64_t h = 0; h < kHeadsKv; ++h) {
      for (int64_t key = 0; key < kKeys; ++key) {
        for (int64_t d = 0; d < tensor.dim; ++d) {
          widened[static_cast<size_t>((h * kKeys + key) * tensor.dim + d)] =
              tensor.element({0, h, key, 0}, d);
        }
      }
    }
  }
};

std::vector<float> run(const Problem& p, Tensors t, const char* kernel) {
  std::vector<float> out(static_cast<size_t>(p.heads_q * p.len_q * p.dim_v), kNan);
  t.out = out.data();
  Limits limits;
  limits.kernel = kernel;
  limits.threads = 2;
  Result<Execution> execution = Execution::prepare(p, limits, t);
  EXPECT_TRUE(execution.ok()) << describe(p) << execution.status().message();
  if (!execution.ok()) return {};
  EXPECT_TRUE(execution->run().ok());
  for (float& value : out) value = std::isnan(value) ? kNan : value;  // payloads are nobody's
  return out;
}

void expect_bits_of_widened(const char* kernel, int64_t len_q, int64_t dim, const Stored& k,
                            const Stored& v, bool is_wild) {
  std::mt19937 random(static_cast<uint32_t>(dim * 7 + len_q));
  Problem p;
  p.heads_q = 3 * kHeadsKv;
  p.heads_kv = kHeadsKv;
  p.len_q = len_q;
  p.len_k = kKeys;
  p.dim_qk = p.dim_v = dim;
  p.causal = Causal::kBottomRight;  // edges of tiles, where keys are hidden
  p.quantised_k = k.format, p.scales_k = k.scales;
  p.quantised_v = v.format, p.scales_v = v.scales;
  set_dense(p);
  Cache keys(random, k, dim, is_wild), values(random, v, dim, is_wild);
  std::vector<float> q(static_cast<size_t>(p.heads_q * len_q * dim));
  for (float& x : q) x = std::normal_distribution<float>(0, 0.01f)(random);
  Tensors t;
  t.q = q.data();
  t.k = keys.bytes.data(), t.scales_k = k.scales == Scales::kNone ? nullptr : keys.scales.data();
  t.v = values.bytes.data();
  t.scales_v = v.scales == Scales::kNone ? nullptr : values.scales.data();
  keys.widen(keys_of(p, t));
  values.widen(values_of(p, t));
  const std::vector<float> have = run(p, t, kernel);

  const std::string name = describe(p);
  p.quantised_k = p.quantised_v = Quantised::kNone;
  p.scales_k = p.scales_v = Scales::kNone;
  t.k = keys.widened.data(), t.v = values.widened.data();
  t.scales_k = t.scales_v = nullptr;
  const std::vector<float> want = run(p, t, kernel);
  ASSERT_EQ(have.size(), want.size());
  int64_t numbers = 0;
  for (size_t i = 0; i < have.size(); ++i) {
    ASSERT_EQ(std::bit_cast<uint32_t>(have[i]), std::bit_cast<uint32_t>(want[i]))
        << kernel << ", " << name << ", element " << i << ": " << have[i] << ", " << want[i];
    numbers += std::isfinite(have[i]) && have[i] != 0;
  }
  if (!is_wild) {
    EXPECT_GT(numbers, static_cast<int64_t>(have.size() * 9 / 10)) << name;
  }
}

class QuantisedAttention : public testing::TestWithParam<const char*> {};

TEST_P(QuantisedAttention, HasTheBitsOfTheWidenedCache) {
  for (const int64_t len_q : {1, 2, 7, 40}) {
    for (const int64_t dim : {32, 64, 100, 160}) {
      for (const Stored& stored : kStored) {
        if (dim % kBlockElements != 0 && is_block_format(stored.format)) continue;
        for (const bool is_wild : {false, true}) {
          expect_bits_of_widened(GetParam(), len_q, dim, stored, stored, is_wild);
        }
      }
    }
  }
}

TEST_P(QuantisedAttention, TakesKeysAndValuesOfDifferentFormats) {
  for (const Stored& k : kStored) {
    for (const Stored& v : kStored) {
      if (k.scales == Scales::kHead || v.scales == Scales::kTensor) continue;  // half will do
      expect_bits_of_widened(GetParam(), 3, 64, k, v, false);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, QuantisedAttention, testing::Values("cpu_decode", "cpu_prefill"),
                         [](const auto& test) { return std::string(test.param); });

// Codes are never taken for elements: who cannot read them says so.
TEST(QuantisedPlan, KernelsThatCannotReadCodesRefuseThem) {
  Problem p;
  p.heads_q = p.heads_kv = 2;
  p.len_q = p.len_k = p.dim_qk = p.dim_v = 64;
  p.dtype_q = p.dtype_kv = Dtype::kBf16;
  p.quantised_v = Quantised::kQ4_0;
  set_dense(p);
  for (const char* kernel : {"cpu_unfused", "cpu_prefill_bf16"}) {
    Limits limits;
    limits.kernel = kernel;
    const Result<Plan> plan = make_plan(p, limits, this_machine(Device::kCpu, 0));
    ASSERT_TRUE(plan.ok());
    EXPECT_EQ(plan->kernel, "");
    for (const Candidate& candidate : plan->candidates) {
      if (candidate.kernel != kernel) continue;
      EXPECT_EQ(candidate.verdict, Verdict::kRefused);
      EXPECT_NE(candidate.reason.find("these are q4_0"), std::string::npos) << candidate.reason;
    }
  }
}

}  // namespace
}  // namespace wh
