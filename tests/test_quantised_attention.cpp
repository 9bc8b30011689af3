// Attention over a quantised cache has the bits of attention over the cache that was widened first:
// whatever the codes and scales are, and at every set of instructions.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "api/machine.h"
#include "core/kv_tensor.h"
#include "plan/planner.h"
#include "support/stored_formats.h"
#include "verify/execution.h"

namespace wh {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kHeadsKv = 2, kKeys = 130;
constexpr int32_t kLengths[] = {kKeys, 77};  // of two sequences

// Two sequences' keys, in a row each, one after the other, or in pages in an order of their own.
struct Layout {
  KeyLayout kind;
  int64_t page_size = 0;
};
constexpr Layout kLayouts[] = {{KeyLayout::kDense},
                               {KeyLayout::kPacked},
                               {KeyLayout::kPaged, 5},
                               {KeyLayout::kPaged, 16},
                               {KeyLayout::kPaged, 64}};

struct Asked {
  const char* kernel;
  int64_t len_q, dim;
  Layout layout;
  bool is_wild;
};

Problem problem_of(const Asked& asked, const StoredFormat& k, const StoredFormat& v) {
  Problem p;
  p.batch = std::size(kLengths);
  p.heads_q = 3 * kHeadsKv;
  p.heads_kv = kHeadsKv;
  p.len_q = asked.len_q;
  p.len_k = kKeys;
  p.dim_qk = p.dim_v = asked.dim;
  p.causal = Causal::kBottomRight;  // edges of tiles, where keys are hidden
  p.key_layout = asked.layout.kind;
  p.page_size = asked.layout.page_size;
  if (p.key_layout == KeyLayout::kPacked) p.total_k = kLengths[0] + kLengths[1];
  if (p.key_layout == KeyLayout::kPaged) p.pages = p.batch * p.pages_a_sequence();
  p.has_key_lengths = p.key_layout != KeyLayout::kPacked;
  p.quantised_k = k.format, p.scales_k = k.scales;
  p.quantised_v = v.format, p.scales_v = v.scales;
  set_dense(p);
  return p;
}

// Where the keys are: tokens past a length, and pages that nobody lists, are nobody's.
struct Places {
  std::vector<int32_t> key_offsets{0, kLengths[0], kLengths[0] + kLengths[1]};
  std::vector<int32_t> pages;

  explicit Places(const Problem& p) : pages(static_cast<size_t>(p.pages)) {
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(5));
  }
  void set(const Problem& p, Tensors& t) const {
    if (p.has_key_lengths) t.key_lengths = kLengths;
    if (p.key_layout == KeyLayout::kPacked) t.key_offsets = key_offsets.data();
    if (p.key_layout == KeyLayout::kPaged) t.page_table = pages.data();
  }
};

// Bytes at random: every code, -128, scales of f16 that are denormal, infinite and NaN. Scales of
// f32 are of every size, 0, denormal and NaN among them.
struct Cache {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<float> widened;

  Cache(std::mt19937& random, const Problem& p, const StoredFormat& stored, bool is_wild) {
    constexpr float kSizes[] = {0, 1e-42f, 1e-6f, 0.01f, 1, -0.5f, 448, 1e30f, 3e38f, kNan};
    const Storage storage = key_storage(p);
    const int64_t elements = storage.batch * kHeadsKv * storage.length * p.dim_qk;
    bytes.resize(static_cast<size_t>(stored_bytes(stored.format, Dtype::kF32, elements)));
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    const auto extents = scales_extents(p, stored.scales, p.dim_qk);
    scales.resize(static_cast<size_t>(extents[0] * extents[1] * extents[2] * extents[3]));
    for (float& scale : scales) scale = kSizes[is_wild ? random() % 10 : 2 + random() % 3];
    widened.assign(static_cast<size_t>(elements), kNan);
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

  // The keys that are there; scales of the others become NaN.
  void widen(const Problem& p, const Tensors& t, const KvTensor& tensor) {
    std::vector<float> present(scales.size(), kNan);
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence sequence = sequence_at(p, t, b);
      const KeyRows rows = key_rows(p, t, sequence);
      for (int64_t h = 0; h < kHeadsKv; ++h) {
        for (int64_t key = 0; key < kLengths[b]; ++key) {
          const KvPlace place = place_of(rows, sequence, h, key);
          for (int64_t d = 0; d < tensor.dim; ++d) {
            widened[static_cast<size_t>(tensor.offset(place) + d)] = tensor.element(place, d);
          }
          if (tensor.scales != Scales::kTokenHead) continue;
          const auto at = static_cast<size_t>(tensor.scale_offset(place));
          present[at] = scales[at];
        }
      }
    }
    if (tensor.scales == Scales::kTokenHead)
      std::copy(present.begin(), present.end(), scales.data());
  }
};

std::vector<float> run(const Problem& p, Tensors t, const char* kernel) {
  std::vector<float> out(static_cast<size_t>(p.batch * p.heads_q * p.len_q * p.dim_v), kNan);
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

std::vector<float> queries_of(const Problem& p, std::mt19937& random) {
  std::vector<float> q(static_cast<size_t>(p.batch * p.heads_q * p.len_q * p.dim_qk));
  for (float& x : q) x = std::normal_distribution<float>(0, 0.01f)(random);
  return q;
}

void expect_bits_of_widened(const Asked& asked, const StoredFormat& k, const StoredFormat& v) {
  std::mt19937 random(static_cast<uint32_t>(asked.dim * 7 + asked.len_q));
  Problem p = problem_of(asked, k, v);
  const Places places(p);
  Cache keys(random, p, k, asked.is_wild), values(random, p, v, asked.is_wild);
  const std::vector<float> q = queries_of(p, random);
  Tensors t;
  t.q = q.data();
  t.k = keys.bytes.data(), t.scales_k = k.scales == Scales::kNone ? nullptr : keys.scales.data();
  t.v = values.bytes.data();
  t.scales_v = v.scales == Scales::kNone ? nullptr : values.scales.data();
  places.set(p, t);
  keys.widen(p, t, keys_of(p, t));
  values.widen(p, t, values_of(p, t));
  const std::vector<float> have = run(p, t, asked.kernel);

  const std::string name = describe(p);
  p.quantised_k = p.quantised_v = Quantised::kNone;
  p.scales_k = p.scales_v = Scales::kNone;
  t.k = keys.widened.data(), t.v = values.widened.data();
  t.scales_k = t.scales_v = nullptr;
  const std::vector<float> want = run(p, t, asked.kernel);
  ASSERT_EQ(have.size(), want.size());
  int64_t numbers = 0;
  for (size_t i = 0; i < have.size(); ++i) {
    ASSERT_EQ(std::bit_cast<uint32_t>(have[i]), std::bit_cast<uint32_t>(want[i]))
        << asked.kernel << ", " << name << ", element " << i << ": " << have[i] << ", " << want[i];
    numbers += std::isfinite(have[i]) && have[i] != 0;
  }
  if (!asked.is_wild) {
    EXPECT_GT(numbers, static_cast<int64_t>(have.size() * 9 / 10)) << name;
  }
}

// Memory whose end is followed by what nobody may read.
class UpToTheEnd {
 public:
  explicit UpToTheEnd(int64_t bytes)
      : page_(sysconf(_SC_PAGESIZE)), size_((bytes + page_ - 1) / page_ * page_ + page_) {
    base_ = static_cast<uint8_t*>(mmap(nullptr, static_cast<size_t>(size_), PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT_NE(base_, MAP_FAILED);
    EXPECT_EQ(mprotect(base_ + size_ - page_, static_cast<size_t>(page_), PROT_NONE), 0);
    data_ = base_ + size_ - page_ - bytes;
  }
  ~UpToTheEnd() { munmap(base_, static_cast<size_t>(size_)); }
  UpToTheEnd(const UpToTheEnd&) = delete;
  UpToTheEnd& operator=(const UpToTheEnd&) = delete;

  uint8_t* data() { return data_; }

 private:
  const int64_t page_, size_;
  uint8_t *base_, *data_;
};

class QuantisedAttention : public testing::TestWithParam<const char*> {};

TEST_P(QuantisedAttention, HasTheBitsOfTheWidenedCache) {
  for (const int64_t len_q : {1, 2, 7, 40}) {
    for (const int64_t dim : {32, 64, 100, 160}) {
      for (const StoredFormat& stored : kStoredFormats) {
        if (dim % kBlockElements != 0 && is_block_format(stored.format)) continue;
        for (const bool is_wild : {false, true}) {
          expect_bits_of_widened({GetParam(), len_q, dim, {KeyLayout::kDense}, is_wild}, stored,
                                 stored);
        }
      }
    }
  }
}

TEST_P(QuantisedAttention, HasTheBitsOfTheWidenedCacheInEveryLayout) {
  for (const Layout& layout : kLayouts) {
    for (const int64_t len_q : {1, 3, 40}) {
      for (const int64_t dim : {64, 100}) {
        for (const StoredFormat& stored : kStoredFormats) {
          if (dim % kBlockElements != 0 && is_block_format(stored.format)) continue;
          expect_bits_of_widened({GetParam(), len_q, dim, layout, len_q == 3}, stored, stored);
        }
      }
    }
  }
}

TEST_P(QuantisedAttention, TakesKeysAndValuesOfDifferentFormats) {
  for (const StoredFormat& k : kStoredFormats) {
    for (const StoredFormat& v : kStoredFormats) {
      if (k.scales == Scales::kHead || v.scales == Scales::kTensor) continue;  // half will do
      expect_bits_of_widened({GetParam(), 3, 64, {KeyLayout::kPaged, 16}, false}, k, v);
    }
  }
}

// Codes and scales end with the last key that is there, in the middle of a page: whoever reads on
// ends the test.
TEST_P(QuantisedAttention, ReadsNothingOfAbsentKeys) {
  for (const Layout& layout : kLayouts) {
    for (const int64_t len_q : {1, 40}) {
      for (const StoredFormat& stored : kStoredFormats) {
        Problem p = problem_of({GetParam(), len_q, 64, layout, false}, stored, stored);
        p.batch = 1;
        if (p.key_layout == KeyLayout::kPaged) p.pages = p.pages_a_sequence();
        if (p.key_layout == KeyLayout::kPacked) p.total_k = kKeys;
        set_dense(p);
        // Token by token, so that what is absent lies behind all that is there.
        p.stride_k = p.stride_v = token_strides(kHeadsKv, key_storage(p).length, p.dim_qk);
        if (stored.scales == Scales::kTokenHead) {
          p.stride_scales_k = p.stride_scales_v = token_strides(kHeadsKv, key_storage(p).length, 1);
        }
        constexpr int32_t kLength = 77;
        const int64_t present = p.key_layout == KeyLayout::kPacked ? kKeys : kLength;
        UpToTheEnd codes(stored_bytes(stored.format, Dtype::kF32, present * kHeadsKv * p.dim_qk));
        const auto extents = scales_extents(p, stored.scales, p.dim_qk);
        const int64_t scales = stored.scales == Scales::kTokenHead
                                   ? present * kHeadsKv
                                   : extents[0] * extents[1] * extents[2] * extents[3];
        UpToTheEnd scale_bytes(scales * 4);
        std::fill_n(reinterpret_cast<float*>(scale_bytes.data()), scales, 0.5f);
        std::mt19937 random(3);
        const std::vector<float> q = queries_of(p, random);
        std::vector<int32_t> pages(static_cast<size_t>(p.pages));
        std::iota(pages.begin(), pages.end(), 0);
        constexpr int32_t kOffsets[] = {0, kKeys};
        Tensors t;
        t.q = q.data();
        t.k = t.v = codes.data();
        if (stored.scales != Scales::kNone) {
          t.scales_k = t.scales_v = reinterpret_cast<const float*>(scale_bytes.data());
        }
        if (p.has_key_lengths) t.key_lengths = &kLength;
        if (p.key_layout == KeyLayout::kPacked) t.key_offsets = kOffsets;
        if (p.key_layout == KeyLayout::kPaged) t.page_table = pages.data();
        for (const float value : run(p, t, GetParam())) EXPECT_EQ(value, 0) << describe(p);
      }
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
