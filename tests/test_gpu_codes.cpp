// Attention over quantised caches on a GPU against the float64 answer over the widened values:
// every format and kind of scales, in every layout, with codes of NaN that some rows see. What
// belongs to nobody is NaN too.
#include <algorithm>
#include <numeric>

#include "core/quantised.h"
#include "support/attention.h"
#include "support/gpu_attention.h"
#include "support/stored_formats.h"

namespace wh {
namespace {

constexpr int64_t kHeadsKv = 2, kGroup = 3, kKeys = 130;
const std::vector<int32_t> kLengths{kKeys, 77};  // of two sequences
const std::vector<int32_t> kOffsets{0, kKeys, kKeys + 77};

// Every format, and elements behind them.
const std::vector<StoredFormat> kStored = [] {
  std::vector<StoredFormat> all(std::begin(kStoredFormats), std::end(kStoredFormats));
  all.push_back({Quantised::kNone, Scales::kNone});
  return all;
}();
constexpr size_t kAligned = 64;  // workspace
constexpr size_t kFormats = std::size(kStoredFormats);

struct Layout {
  int32_t kind;
  int64_t page_size = 0;
};
constexpr Layout kLayouts[] = {{WH_KEYS_DENSE},
                               {WH_KEYS_PACKED},
                               {WH_KEYS_PAGED, 5},
                               {WH_KEYS_PAGED, 16},
                               {WH_KEYS_PAGED, 64}};

wh_problem problem_over(const StoredFormat& k, const StoredFormat& v, const Layout& layout,
                        int32_t dtype, int64_t len_q, int64_t dim) {
  wh_problem p = problem_of(2, kHeadsKv * kGroup, kHeadsKv, len_q, kKeys, dim);
  p.dtype_q = p.dtype_kv = dtype;
  p.causal = WH_CAUSAL_BOTTOM_RIGHT;
  p.key_layout = layout.kind;
  p.page_size = layout.page_size;
  if (layout.kind == WH_KEYS_PACKED) p.total_k = kOffsets.back();
  if (layout.kind != WH_KEYS_PACKED) p.uses = WH_USES_KEY_LENGTHS;
  if (layout.kind == WH_KEYS_PAGED) p.pages = 2 * ((kKeys + p.page_size - 1) / p.page_size) + 1;
  p.quantised_k = static_cast<int32_t>(k.format);
  p.quantised_v = static_cast<int32_t>(v.format);
  p.scales_k = static_cast<int32_t>(k.scales);
  p.scales_v = static_cast<int32_t>(v.scales);
  EXPECT_EQ(wh_problem_set_dense(&p), WH_OK);
  return p;
}

// K or V, all bytes 0xff but what is there.
class Cache {
 public:
  Cache(const wh_problem& p, const StoredFormat& stored, const int64_t* stride,
        const int64_t* stride_scales, const std::vector<int32_t>& table, std::mt19937& random)
      : stored_(stored), dim_(p.dim_qk), dtype_(static_cast<Dtype>(p.dtype_kv)) {
    const int64_t rows = p.key_layout == WH_KEYS_PAGED    ? p.pages * p.page_size
                         : p.key_layout == WH_KEYS_PACKED ? p.total_k
                                                          : 2 * kKeys;
    codes.assign(static_cast<size_t>(stored_bytes(stored.format, dtype_, rows * kHeadsKv * dim_)),
                 std::byte{0xff});
    scales.assign(static_cast<size_t>(2 * kHeadsKv * (rows + dim_)), std::nanf(""));
    const int64_t entries = static_cast<int64_t>(table.size()) / 2;
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t h = 0; h < kHeadsKv; ++h) {
        for (int64_t key = 0; key < kLengths[static_cast<size_t>(b)]; ++key) {
          int64_t batch_idx = b, key_idx = key;
          if (p.key_layout == WH_KEYS_PACKED) {
            batch_idx = 0, key_idx += kOffsets[static_cast<size_t>(b)];
          } else if (p.key_layout == WH_KEYS_PAGED) {
            batch_idx = table[static_cast<size_t>(b * entries + key / p.page_size)];
            key_idx = key % p.page_size;
          }
          const int64_t first = batch_idx * stride[0] + h * stride[1] + key_idx * stride[2];
          write_row(first, random);
          if (b == 0 && h == 1) firsts_.push_back(first);
          const bool is_token = stored.scales == Scales::kTokenHead;
          const int64_t scale = (is_token ? batch_idx : b) * stride_scales[0] +
                                h * stride_scales[1] + (is_token ? key_idx * stride_scales[2] : 0);
          const int64_t count = stored.scales == Scales::kChannel ? dim_ : 1;
          constexpr float kSizes[] = {0.5f, 1, -1, 1.37f};
          for (int64_t i = 0; i < count && stored.scales != Scales::kNone; ++i) {
            scales[static_cast<size_t>(scale + i * stride_scales[3])] =
                kSizes[random() % 4] * (stored.format == Quantised::kInt8 ? 1.0f / 64 : 1);
          }
        }
      }
    }
  }

  // Of the first sequence's second head.
  void spoil(int64_t key, int64_t column) {
    if (stored_.format != Quantised::kE4m3) return;
    codes[static_cast<size_t>(firsts_[static_cast<size_t>(key)] + column)] = std::byte{0x7f};
  }

  std::vector<std::byte> codes;
  std::vector<float> scales;

 private:
  // Elements of about 1.
  void write_row(int64_t first, std::mt19937& random) {
    std::byte* const at = codes.data() + stored_bytes(stored_.format, dtype_, first);
    const int64_t bytes = stored_bytes(stored_.format, dtype_, dim_);
    for (int64_t i = 0; i < bytes; ++i) at[i] = static_cast<std::byte>(random());
    const auto scale_blocks = [&](int64_t block_bytes, uint16_t least) {
      for (int64_t i = 0; i < bytes; i += block_bytes) {
        const auto scale = static_cast<uint16_t>(least + random() % 1024);
        std::memcpy(at + i, &scale, sizeof(scale));
      }
    };
    switch (stored_.format) {
      case Quantised::kNone:
        for (int64_t d = 0; d < dim_; ++d) {
          put(codes.data(), dtype_, first + d, std::normal_distribution<float>()(random));
        }
        return;
      case Quantised::kE4m3:  // below 2
        for (int64_t i = 0; i < bytes; ++i) at[i] &= std::byte{0xbf};
        return;
      case Quantised::kInt8:
        return;
      case Quantised::kQ8_0:
        return scale_blocks(sizeof(Q8_0), 0x2000);
      case Quantised::kQ4_0:
        return scale_blocks(sizeof(Q4_0), 0x3000);
    }
  }

  StoredFormat stored_;
  int64_t dim_;
  Dtype dtype_;
  std::vector<int64_t> firsts_;
};

template <typename T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  const auto* from = reinterpret_cast<const std::byte*>(values.data());
  return {from, from + values.size() * sizeof(T)};
}

class GpuCodes : public testing::Test {
 protected:
  void SetUp() override {
    if (device_count() == 0) GTEST_SKIP() << "no GPU";
  }

  static std::vector<float> run(wh_problem p, const std::string& kernel,
                                const std::vector<std::vector<std::byte>>& inputs) {
    p.device = is_cuda(kernel) ? WH_CUDA : WH_CPU;
    PlanHandle plan;
    const wh_status planned = make_plan(p, no_limits(), kernel, plan);
    EXPECT_EQ(planned, WH_OK) << wh_last_error();
    if (planned != WH_OK) return {};
    const auto workspace_bytes = wh_plan_workspace_bytes(plan.get());
    const auto out_bytes =
        static_cast<size_t>(p.batch * p.heads_q * p.len_q * p.dim_v) * element_bytes(p.dtype_q);
    std::vector<std::vector<std::byte>> host = inputs;
    host.emplace_back(out_bytes, std::byte{0xff});
    host.emplace_back(workspace_bytes + kAligned, std::byte{0xff});
    std::vector<std::unique_ptr<Placed>> placed;
    std::vector<void*> at;
    for (std::vector<std::byte>& bytes : host) {
      if (p.device == WH_CUDA) placed.push_back(std::make_unique<Placed>(bytes));
      at.push_back(p.device == WH_CUDA ? placed.back()->data() : bytes.data());
    }
    wh_tensors t;
    EXPECT_EQ(wh_tensors_init(&t, sizeof(t)), WH_OK);
    t.q = at[0];
    t.k = at[1];
    t.v = at[2];
    t.scales_k = static_cast<const float*>(at[3]);
    t.scales_v = static_cast<const float*>(at[4]);
    if (p.uses & WH_USES_KEY_LENGTHS) t.key_lengths = static_cast<const int32_t*>(at[5]);
    if (p.key_layout == WH_KEYS_PACKED) t.key_offsets = static_cast<const int32_t*>(at[6]);
    if (p.key_layout == WH_KEYS_PAGED) t.page_table = static_cast<const int32_t*>(at[7]);
    t.out = at[8];
    size_t room = workspace_bytes + kAligned;
    t.workspace = std::align(kAligned, workspace_bytes, at[9], room);
    t.workspace_bytes = workspace_bytes;
    wh_run_options options;
    EXPECT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
    EXPECT_EQ(wh_plan_run(plan.get(), &t, &options), WH_OK) << wh_last_error();
    return floats_of(p.device == WH_CUDA ? placed[8]->fetch() : host[8], p.dtype_q);
  }

  static void expect_right(const StoredFormat& k, const StoredFormat& v, const Layout& layout,
                           int32_t dtype, int64_t len_q, int64_t dim) {
    const wh_problem p = problem_over(k, v, layout, dtype, len_q, dim);
    std::vector<int32_t> table(static_cast<size_t>(std::max<int64_t>(2, p.pages - 1)));
    std::iota(table.begin(), table.end(), 1);
    std::mt19937 random(5);
    std::shuffle(table.begin(), table.end(), random);
    Cache keys(p, k, p.stride_k, p.stride_scales_k, table, random);
    Cache values(p, v, p.stride_v, p.stride_scales_v, table, random);
    values.spoil(40, 5);
    values.spoil(kKeys - 3, 9);  // as the next one, not for the first queries of many
    keys.spoil(kKeys - 2, 3);
    const auto q = elements_of(normal_values(p.batch * p.heads_q * len_q * dim, random), dtype);
    const std::vector<std::vector<std::byte>> inputs{q,
                                                     keys.codes,
                                                     values.codes,
                                                     bytes_of(keys.scales),
                                                     bytes_of(values.scales),
                                                     bytes_of(kLengths),
                                                     bytes_of(kOffsets),
                                                     bytes_of(table)};
    const std::vector<float> want = run(p, "cpu_reference", inputs);
    const std::vector<float> have = run(p, "cuda_portable", inputs);
    ASSERT_EQ(have.size(), want.size());
    ASSERT_FALSE(want.empty());
    Errors errors;
    for (size_t i = 0; i < want.size(); ++i) errors.add(have[i], want[i]);
    // Both are rounded to q's type.
    EXPECT_LE(errors.relative_rms(), tolerance_of(static_cast<Dtype>(dtype)) * 8 / 7);
    const auto nans = static_cast<size_t>(
        std::count_if(want.begin(), want.end(), [](float x) { return std::isnan(x); }));
    EXPECT_EQ(nans > 0, k.format == Quantised::kE4m3 || v.format == Quantised::kE4m3);
    EXPECT_LT(nans, want.size() / 2);
  }
};

TEST_F(GpuCodes, HaveTheAnswerOverWhatTheyStandFor) {
  for (size_t i = 0; i < kFormats; ++i) {
    for (const Layout& layout : kLayouts) {
      for (const int32_t dtype : {WH_F32, WH_F16, WH_BF16}) {
        for (const int64_t len_q : {1, 23}) {
          constexpr int64_t kDims[] = {64, 96, 128, 256};
          const int64_t dim = kDims[(i + static_cast<size_t>(layout.page_size)) % 4];
          SCOPED_TRACE("format " + std::to_string(i) + ", layout " + std::to_string(layout.kind) +
                       ", pages of " + std::to_string(layout.page_size) + ", dtype " +
                       std::to_string(dtype) + ", " + std::to_string(len_q) + " queries, dim " +
                       std::to_string(dim));
          expect_right(kStored[i], kStored[i], layout, dtype, len_q, dim);
          const StoredFormat& other = kStored[(i + 5) % kStored.size()];
          expect_right(kStored[i], other, layout, dtype, len_q, dim);
        }
      }
    }
  }
}

}  // namespace
}  // namespace wh
