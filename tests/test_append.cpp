// wh_append() against the rows that it was given, over every layout, type, format and kind of
// scales.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/kv_tensor.h"
#include "core/names.h"
#include "widehead/widehead.h"

namespace wh {
namespace {

constexpr int64_t kHeads = 3;
constexpr size_t kGuardBytes = 256;
constexpr std::byte kPaint{0x5b};

// Bytes between guards, all of them painted.
struct Guarded {
  explicit Guarded(size_t bytes) : data(bytes + 2 * kGuardBytes, kPaint) {}
  std::byte* begin() { return data.data() + kGuardBytes; }
  std::vector<std::byte> data;
};

// How a cache of two batch entries (or pages) of 12 tokens lies.
enum class Lies { kDense, kPacked, kTokensFirst, kHeadsFirst, kInterleaved, kColumnsApart };
constexpr Lies kAllLies[] = {Lies::kDense,      Lies::kPacked,      Lies::kTokensFirst,
                             Lies::kHeadsFirst, Lies::kInterleaved, Lies::kColumnsApart};

struct Cache {
  wh_problem problem;
  Problem core;
  Guarded k, v, scales_k, scales_v;

  static constexpr int64_t kTokens = 24;

  Cache(Lies lies, Dtype dtype, Quantised format, Scales scales, int64_t dim)
      : k(0), v(0), scales_k(0), scales_v(0) {
    EXPECT_EQ(wh_problem_init(&problem, sizeof(problem)), WH_OK);
    problem.heads_q = problem.heads_kv = kHeads;
    problem.dim_qk = dim;
    problem.dim_v = format == Quantised::kQ8_0 || format == Quantised::kQ4_0 ? dim : dim + 2;
    problem.batch = 2;
    problem.len_k = 12;
    problem.dtype_kv = static_cast<int32_t>(dtype);
    problem.quantised_k = problem.quantised_v = static_cast<int32_t>(format);
    problem.scales_k = problem.scales_v = static_cast<int32_t>(scales);
    if (lies == Lies::kPacked) {
      problem.key_layout = WH_KEYS_PACKED;
      problem.total_k = kTokens;
    } else if (lies != Lies::kDense) {
      problem.key_layout = WH_KEYS_PAGED;
      problem.uses = WH_USES_KEY_LENGTHS;
      problem.page_size = 4;
      problem.pages = 6;
    }
    EXPECT_EQ(wh_problem_set_dense(&problem), WH_OK) << wh_last_error();
    const auto set = [](int64_t(&to)[4], int64_t outer, int64_t head, int64_t token,
                        int64_t column) {
      const int64_t strides[] = {outer, head, token, column};
      std::copy(std::begin(strides), std::end(strides), to);
    };
    const int64_t row = std::max(problem.dim_qk, problem.dim_v);
    const int64_t size = problem.page_size;
    switch (lies) {
      case Lies::kDense:
      case Lies::kPacked:
      case Lies::kTokensFirst:
        break;
      case Lies::kHeadsFirst:
        set(problem.stride_k, kHeads * size * dim, size * dim, dim, 1);
        break;
      case Lies::kInterleaved:  // K's and V's rows of a token by turns
        set(problem.stride_k, 2 * size * kHeads * row, row, 2 * kHeads * row, 1);
        set(problem.stride_v, 2 * size * kHeads * row, row, 2 * kHeads * row, 1);
        break;
      case Lies::kColumnsApart:
        set(problem.stride_k, kHeads * dim * size, dim * size, 1, size);
        break;
    }
    if (problem.key_layout != WH_KEYS_DENSE && scales != Scales::kTokenHead) {
      problem.stride_scales_k[0] = problem.stride_scales_v[0] = 0;
    }
    EXPECT_TRUE(read_core().ok()) << read_core().message();
    is_interleaved = lies == Lies::kInterleaved;
    const TensorBytes bytes = tensor_bytes(core);
    v_offset = stored_bytes(format, dtype, kHeads * row);
    k = Guarded(static_cast<size_t>(is_interleaved ? v_offset + bytes.v + bytes.k : bytes.k));
    v = Guarded(static_cast<size_t>(bytes.v));
    scales_k = Guarded(static_cast<size_t>(bytes.scales_k));
    scales_v = Guarded(static_cast<size_t>(bytes.scales_v));
    if (scales == Scales::kTokenHead) return;
    // Given ones differ and are no powers of two.
    for (Guarded* guarded : {&scales_k, &scales_v}) {
      auto* values = reinterpret_cast<float*>(guarded->begin());
      for (size_t i = 0; i < (guarded->data.size() - 2 * kGuardBytes) / 4; ++i) {
        values[i] = 0.01f + 0.003f * static_cast<float>(i % 17);
      }
    }
  }
  Status read_core();
  std::byte* v_begin() { return is_interleaved ? k.begin() + v_offset : v.begin(); }
  wh_appended appended() {
    wh_appended a;
    EXPECT_EQ(wh_appended_init(&a, sizeof(a)), WH_OK);
    a.k = k.begin();
    a.v = v_begin();
    a.scales_k = reinterpret_cast<float*>(scales_k.begin());
    a.scales_v = reinterpret_cast<float*>(scales_v.begin());
    return a;
  }
  KvTensor keys() {
    const Tensors t{.k = k.begin(), .scales_k = scales_data(scales_k)};
    return keys_of(core, t);
  }
  KvTensor values() {
    const Tensors t{.v = v_begin(), .scales_v = scales_data(scales_v)};
    return values_of(core, t);
  }
  const float* scales_data(Guarded& guarded) {
    return core.scales_k == Scales::kNone ? nullptr
                                          : reinterpret_cast<const float*>(guarded.begin());
  }

  bool is_interleaved = false;
  int64_t v_offset = 0;
};

// The fields that the core reads of the caller's problem.
Status Cache::read_core() {
  core.dtype_q = core.dtype_kv = static_cast<Dtype>(problem.dtype_kv);
  core.heads_q = core.heads_kv = problem.heads_kv;
  core.batch = problem.batch;
  core.len_k = problem.len_k;
  core.dim_qk = problem.dim_qk;
  core.dim_v = problem.dim_v;
  core.key_layout = static_cast<KeyLayout>(problem.key_layout);
  core.total_k = problem.total_k;
  core.page_size = problem.page_size;
  core.pages = problem.pages;
  core.stride_page_table = problem.stride_page_table;
  core.has_key_lengths = core.key_layout == KeyLayout::kPaged;
  core.quantised_k = core.quantised_v = static_cast<Quantised>(problem.quantised_k);
  core.scales_k = core.scales_v = static_cast<Scales>(problem.scales_k);
  const auto copy = [](const int64_t(&from)[4], Strides& to) {
    std::copy(std::begin(from), std::end(from), to.begin());
  };
  copy(problem.stride_k, core.stride_k);
  copy(problem.stride_v, core.stride_v);
  copy(problem.stride_scales_k, core.stride_scales_k);
  copy(problem.stride_scales_v, core.stride_scales_v);
  return validate(core);
}

// New rows, columns or tokens outermost.
struct Rows {
  Dtype dtype;
  int64_t stride[3];
  std::vector<std::byte> data;

  Rows(Dtype type, int64_t tokens, int64_t dim, bool columns_first, std::mt19937& random)
      : dtype(type), data(static_cast<size_t>(tokens * kHeads * dim) * dtype_bytes(type)) {
    stride[0] = columns_first ? 1 : kHeads * dim;
    stride[1] = columns_first ? tokens : dim;
    stride[2] = columns_first ? tokens * kHeads : 1;
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < tokens * kHeads * dim; ++i) {
      store_element(data.data(), dtype, i, 3 * normal(random));
    }
  }
  float get(int64_t token, int64_t head, int64_t d) const {
    return load_element(data.data(), dtype, token * stride[0] + head * stride[1] + d * stride[2]);
  }
  std::vector<float> row(int64_t token, int64_t head, int64_t dim) const {
    std::vector<float> values(static_cast<size_t>(dim));
    for (int64_t d = 0; d < dim; ++d) values[static_cast<size_t>(d)] = get(token, head, d);
    return values;
  }
};

KvPlace place_of_slot(const Cache& cache, int64_t slot, int64_t head) {
  const int64_t length = key_storage(cache.core).length;
  return {slot / length, head, slot % length, slot / length};
}

// The nearest code's value, the even one of two, found by looking at all of them.
float nearest(float value, float scale, Quantised format) {
  float best = 0, distance = std::numeric_limits<float>::infinity();
  for (int code = 0; code < 256; ++code) {
    const float at = format == Quantised::kE4m3
                         ? to_float(E4m3{static_cast<uint8_t>(code)})
                         : to_float(Int8{static_cast<int8_t>(std::max(-127, code - 128))});
    const float apart = std::fabs(value / scale - at);
    const bool is_nearer = apart < distance || (apart == distance && code % 2 == 0);
    if (!is_nearer) continue;  // NaN never is
    distance = apart;
    best = at;
  }
  return best * scale;
}

void expect_row(const KvTensor& stored, const KvPlace& at, const std::vector<float>& row) {
  const auto dim = static_cast<int64_t>(row.size());
  if (stored.scales == Scales::kTokenHead) {
    ASSERT_EQ(stored.scale(at, 0), scale_of_row(row.data(), dim, stored.format));
  }
  std::vector<Q8_0> blocks(static_cast<size_t>(dim));  // room enough for either
  if (is_block_format(stored.format)) {
    quantise_row(row.data(), dim, stored.format, nullptr, 0, blocks.data());
    ASSERT_EQ(
        std::memcmp(blocks.data(),
                    static_cast<const std::byte*>(stored.data) + stored.bytes(stored.offset(at)),
                    static_cast<size_t>(stored.bytes(dim))),
        0);
    return;
  }
  for (int64_t d = 0; d < dim; ++d) {
    const float value = row[static_cast<size_t>(d)], have = stored.element(at, d);
    if (stored.format == Quantised::kNone) {
      float rounded = 0;
      store_element(&rounded, stored.dtype, 0, value);
      ASSERT_EQ(have, load_element(&rounded, stored.dtype, 0));
    } else {
      const float scale = stored.scale(at, d);
      ASSERT_NEAR(have, nearest(value, scale, stored.format), 1e-6f * std::fabs(value)) << d;
    }
  }
}

// Every byte that no row of `slots` is stored in, as it was.
void expect_untouched(Cache& cache, const std::vector<int64_t>& slots) {
  const auto erase = [&](Guarded& guarded, std::byte* from, const KvTensor& stored) {
    for (const int64_t slot : slots) {
      if (slot < 0) continue;
      for (int64_t head = 0; head < kHeads; ++head) {
        const int64_t first = stored.offset(place_of_slot(cache, slot, head));
        const int64_t piece = is_block_format(stored.format) ? kBlockElements : 1;
        for (int64_t d = 0; d < stored.dim; d += piece) {
          const int64_t at = stored.bytes(first + d * stored.stride[3]);
          std::fill_n(from + at, stored.bytes(piece), kPaint);
        }
      }
    }
    for (const std::byte byte : guarded.data) ASSERT_EQ(byte, kPaint);
  };
  if (cache.is_interleaved) {
    Guarded ignored(0);
    erase(ignored, cache.v_begin(), cache.values());
  } else {
    erase(cache.v, cache.v_begin(), cache.values());
  }
  erase(cache.k, cache.k.begin(), cache.keys());
  if (cache.core.scales_k != Scales::kTokenHead) return;
  for (auto* guarded : {&cache.scales_k, &cache.scales_v}) {
    const KvTensor stored = guarded == &cache.scales_k ? cache.keys() : cache.values();
    for (const int64_t slot : slots) {
      if (slot < 0) continue;
      for (int64_t head = 0; head < kHeads; ++head) {
        std::fill_n(guarded->begin() + 4 * stored.scale_offset(place_of_slot(cache, slot, head)), 4,
                    kPaint);
      }
    }
    for (const std::byte byte : guarded->data) ASSERT_EQ(byte, kPaint);
  }
}

struct Call {
  std::vector<int64_t> slots;
  Rows k, v;

  Call(const Cache& cache, Dtype dtype, std::vector<int64_t> where, std::mt19937& random)
      : slots(std::move(where)),
        k(dtype, tokens(), cache.problem.dim_qk, random() % 2 == 0, random),
        v(dtype, tokens(), cache.problem.dim_v, random() % 2 == 0, random) {}
  int64_t tokens() const { return static_cast<int64_t>(slots.size()); }
  wh_appended on(Cache& cache) const {
    wh_appended a = cache.appended();
    a.tokens = tokens();
    a.slots = slots.data();
    a.new_k = k.data.data();
    a.new_v = v.data.data();
    a.dtype = static_cast<int32_t>(k.dtype);
    std::copy(std::begin(k.stride), std::end(k.stride), a.stride_new_k);
    std::copy(std::begin(v.stride), std::end(v.stride), a.stride_new_v);
    return a;
  }
};

void expect_appended(Cache& cache, Dtype dtype, std::mt19937& random) {
  std::vector<int64_t> slots(Cache::kTokens);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(i);
  std::shuffle(slots.begin(), slots.end(), random);
  slots.resize(9);
  slots[2] = slots[7] = -1;
  const Call call(cache, dtype, slots, random);
  const wh_appended appended = call.on(cache);
  ASSERT_EQ(wh_append(&cache.problem, &appended, nullptr), WH_OK) << wh_last_error();
  for (int64_t token = 0; token < call.tokens(); ++token) {
    const int64_t slot = slots[static_cast<size_t>(token)];
    if (slot < 0) continue;
    for (int64_t head = 0; head < kHeads; ++head) {
      const KvPlace at = place_of_slot(cache, slot, head);
      expect_row(cache.keys(), at, call.k.row(token, head, cache.problem.dim_qk));
      expect_row(cache.values(), at, call.v.row(token, head, cache.problem.dim_v));
    }
  }
  expect_untouched(cache, slots);
}

TEST(Append, PutsElementsIntoEveryLayoutAndWritesNothingElse) {
  std::mt19937 random(1);
  for (const Lies lies : kAllLies) {
    for (const Dtype to : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
      for (const Dtype from : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
        for (const int64_t dim : {1, 7, 64}) {
          SCOPED_TRACE(std::to_string(static_cast<int>(lies)) + " " + kDtypes.name(from) + " to " +
                       kDtypes.name(to) + " dim " + std::to_string(dim));
          Cache cache(lies, to, Quantised::kNone, Scales::kNone, dim);
          expect_appended(cache, from, random);
        }
      }
    }
  }
}

TEST(Append, QuantisesByGivenScalesAndByTheRowsOwn) {
  std::mt19937 random(2);
  for (const Lies lies : kAllLies) {
    for (const Quantised format : {Quantised::kE4m3, Quantised::kInt8}) {
      for (const Scales scales :
           {Scales::kNone, Scales::kTensor, Scales::kHead, Scales::kTokenHead, Scales::kChannel}) {
        for (const Dtype from : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
          SCOPED_TRACE(std::to_string(static_cast<int>(lies)) + " " + kQuantiseds.name(format) +
                       " " + kScales.name(scales));
          Cache cache(lies, Dtype::kF32, format, scales, 34);
          expect_appended(cache, from, random);
        }
      }
    }
  }
}

TEST(Append, MakesBlocks) {
  std::mt19937 random(3);
  for (const Lies lies : kAllLies) {
    if (lies == Lies::kColumnsApart) continue;  // blocks are of one row
    for (const Quantised format : {Quantised::kQ8_0, Quantised::kQ4_0}) {
      Cache cache(lies, Dtype::kF32, format, Scales::kNone, 96);
      expect_appended(cache, Dtype::kBf16, random);
    }
  }
}

TEST(Append, KeepsTheBitsOfWhatHasTheCachesType) {
  std::mt19937 random(4);
  Cache cache(Lies::kTokensFirst, Dtype::kF16, Quantised::kNone, Scales::kNone, 8);
  Call call(cache, Dtype::kF16, {5}, random);
  const uint16_t signalling = 0x7c01;  // a NaN that arithmetic would make quiet
  std::memcpy(call.k.data.data(), &signalling, sizeof(signalling));
  const wh_appended appended = call.on(cache);
  ASSERT_EQ(wh_append(&cache.problem, &appended, nullptr), WH_OK) << wh_last_error();
  const KvTensor keys = cache.keys();
  uint16_t have = 0;
  std::memcpy(&have, cache.k.begin() + 2 * keys.offset(place_of_slot(cache, 5, 0)), sizeof(have));
  EXPECT_EQ(have, signalling);
}

TEST(Append, WritesKeysAloneWhereValuesLieInThem) {
  std::mt19937 random(5);
  Cache cache(Lies::kTokensFirst, Dtype::kF32, Quantised::kNone, Scales::kNone, 8);
  cache.problem.dim_v = 6;
  cache.problem.uses |= WH_USES_VALUES_IN_KEYS;
  ASSERT_EQ(wh_problem_set_dense(&cache.problem), WH_OK);
  const Call call(cache, Dtype::kF32, {0, 23}, random);
  wh_appended appended = call.on(cache);
  appended.new_v = appended.v = nullptr;
  ASSERT_EQ(wh_append(&cache.problem, &appended, nullptr), WH_OK) << wh_last_error();
  expect_row(cache.keys(), place_of_slot(cache, 23, 2), call.k.row(1, 2, 8));
}

TEST(Append, IsTheSameOnAnyNumberOfThreads) {
  std::mt19937 random(6);
  wh_problem problem;
  ASSERT_EQ(wh_problem_init(&problem, sizeof(problem)), WH_OK);
  problem.heads_q = problem.heads_kv = kHeads;
  problem.dim_qk = problem.dim_v = 128;
  problem.len_k = 4000;
  ASSERT_EQ(wh_problem_set_dense(&problem), WH_OK);
  std::vector<int64_t> slots(3000);
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = static_cast<int64_t>(3999 - i);
  const Rows rows(Dtype::kBf16, 3000, 128, false, random);
  const wh_executor serial{[](void*, int32_t count, void (*task)(void*, int32_t), void* argument) {
                             for (int32_t i = count; i-- > 0;) task(argument, i);
                           },
                           nullptr};
  wh_run_options options;
  ASSERT_EQ(wh_run_options_init(&options, sizeof(options)), WH_OK);
  options.executor = &serial;
  const size_t floats = static_cast<size_t>(kHeads * 4000 * 128);
  std::vector<float> k(floats), v(floats), again_k(floats), again_v(floats);
  wh_appended appended;
  ASSERT_EQ(wh_appended_init(&appended, sizeof(appended)), WH_OK);
  appended.tokens = 3000;
  appended.slots = slots.data();
  appended.new_k = appended.new_v = rows.data.data();
  appended.dtype = WH_BF16;
  std::copy(std::begin(rows.stride), std::end(rows.stride), appended.stride_new_k);
  std::copy(std::begin(rows.stride), std::end(rows.stride), appended.stride_new_v);
  appended.k = k.data();
  appended.v = v.data();
  ASSERT_EQ(wh_append(&problem, &appended, nullptr), WH_OK) << wh_last_error();
  appended.k = again_k.data();
  appended.v = again_v.data();
  ASSERT_EQ(wh_append(&problem, &appended, &options), WH_OK) << wh_last_error();
  EXPECT_EQ(k, again_k);
  EXPECT_EQ(v, again_v);
  EXPECT_EQ(k, v);
  EXPECT_EQ(k[(2 * 4000 + 3999) * 128 + 5], rows.get(0, 2, 5));
}

// What is wrong with a call, by what it answers.
class BadAppend : public testing::Test {
 protected:
  std::string message() {
    const wh_status status = wh_append(&cache.problem, &appended, nullptr);
    return status == WH_INVALID_ARGUMENT ? wh_last_error() : "status " + std::to_string(status);
  }

  std::mt19937 random{7};
  Cache cache{Lies::kTokensFirst, Dtype::kF16, Quantised::kNone, Scales::kNone, 8};
  Call call{cache, Dtype::kF16, {3, -1, 23}, random};
  wh_appended appended = call.on(cache);
};

TEST_F(BadAppend, NamesTheArgumentTheValueAndTheRange) {
  EXPECT_EQ(message(), "status 0");
  call.slots[2] = 24;
  EXPECT_EQ(message(),
            "slots[2] is 24; it must be between 0 and 23, or negative for a token to skip");
  call.slots[2] = 3;
  EXPECT_EQ(message(), "slots[2] is 3, as is slots[0]; tokens must have slots of their own");
  call.slots[2] = 23;
  appended.dtype = 3;
  EXPECT_EQ(message(), "dtype is 3; it must be between 0 and 2");
  appended.dtype = WH_F16;
  appended.tokens = -1;
  EXPECT_EQ(message(), "tokens is -1; it must be between 0 and 2147483647");
  appended.tokens = 3;
  appended.stride_new_v[1] = -8;
  EXPECT_EQ(message(), "stride_new_v[1] is -8; strides are in elements and must not be negative");
  appended = call.on(cache);
  appended.new_k = nullptr;
  EXPECT_EQ(message().rfind("new_k is null", 0), 0u) << message();
  appended = call.on(cache);
  appended.v = static_cast<std::byte*>(appended.v) + 1;
  EXPECT_NE(message().find("it must be aligned to its elements of 2 bytes"), std::string::npos)
      << message();
  appended = call.on(cache);
  appended.new_v = appended.k;
  EXPECT_EQ(message().rfind("k overlaps new_v", 0), 0u) << message();
  appended = call.on(cache);
  cache.problem.stride_k[2] = 4;
  EXPECT_EQ(message(), "stride_k[2] is 4; elements of k would overlap, it must be at least 8");
}

TEST_F(BadAppend, DoesNotGuessWhoseScaleAPagesTokenTakes) {
  Cache paged(Lies::kHeadsFirst, Dtype::kF32, Quantised::kInt8, Scales::kHead, 32);
  paged.problem.stride_scales_v[0] = kHeads;
  const Call to_pages(paged, Dtype::kF32, {1}, random);
  const wh_appended bad = to_pages.on(paged);
  EXPECT_EQ(wh_append(&paged.problem, &bad, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_STREQ(wh_last_error(),
               "stride_scales_v[0] is 3; it must be 0 where keys are paged, as a slot does not say "
               "whose it is");
}

TEST_F(BadAppend, OfNothingTouchesNothing) {
  wh_appended nothing;
  ASSERT_EQ(wh_appended_init(&nothing, sizeof(nothing)), WH_OK);
  EXPECT_EQ(wh_append(&cache.problem, &nothing, nullptr), WH_OK) << wh_last_error();
  EXPECT_EQ(wh_append(nullptr, &nothing, nullptr), WH_INVALID_ARGUMENT);
  EXPECT_EQ(wh_append(&cache.problem, nullptr, nullptr), WH_INVALID_ARGUMENT);
}

}  // namespace
}  // namespace wh
