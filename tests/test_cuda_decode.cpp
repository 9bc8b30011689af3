// How sm90_decode cuts a problem into blocks, checked without a GPU.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "cases.h"
#include "cuda/combine/combine.h"
#include "cuda/common/divisor.h"
#include "cuda/common/packed_rows.h"
#include "cuda/cuda_facts.h"
#include "cuda/portable/config.h"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/refusal.h"
#include "support/cards.h"
#include "support/code_refusals.h"

namespace wh::cuda {
namespace {

Problem decode_problem(int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t len_q,
                       int64_t len_k, int64_t dim) {
  Problem p;
  p.device = Device::kCuda;
  p.dtype_q = p.dtype_kv = Dtype::kBf16;
  p.batch = batch;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.len_q = len_q;
  p.len_k = len_k;
  p.dim_qk = p.dim_v = dim;
  set_dense(p);
  return p;
}

struct Planned {
  Limits limits;
  CudaFacts cuda = h100();

  Query query(const Problem& p) const { return {p, limits, cuda}; }
  int64_t splits(const Problem& p) const {
    return PackedShape(p, kSm90Decode.configure(query(p))).splits;
  }
  std::string refusal(const Problem& p) const { return kSm90Decode.refusal(query(p)).value_or(""); }
};

TEST(Divisor, IsExactBelowTwoToThe31) {
  std::mt19937_64 random(1);
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  for (int i = 0; i < 200'000; ++i) {
    const int64_t value = 1 + static_cast<int64_t>(random() % (i % 2 == 0 ? 300 : kMost));
    const int64_t edge = static_cast<int64_t>(random() % 5) * value - 1 + i % 3;
    const int64_t dividend =
        i % 4 < 2 ? static_cast<int64_t>(random() % kMost) : std::clamp<int64_t>(edge, 0, kMost);
    const Divisor divisor(value);
    const auto n = static_cast<int32_t>(dividend);
    ASSERT_EQ(divisor.quotient(n), dividend / value) << dividend << " / " << value;
    ASSERT_EQ(divisor.remainder(n, divisor.quotient(n)), dividend % value);
  }
}

TEST(CudaDecode, FillsTheCardWithOneLongContext) {
  const Planned planned;
  for (const int64_t keys : {16384, 65536, 262144}) {
    const Problem p = decode_problem(1, 64, 2, 1, keys, 256);
    const int64_t blocks = planned.splits(p) * p.heads_kv;
    EXPECT_LE(blocks, 132) << keys;
    EXPECT_GE(blocks, 120) << keys;
  }
}

TEST(CudaDecode, NeverSplitsFinerThanTiles) {
  const Planned planned;
  for (const int64_t keys : {0, 1, 63, 64, 65, 1000, 4096}) {
    const Problem p = decode_problem(1, 32, 1, 1, keys, 128);
    EXPECT_LE(planned.splits(p), std::max<int64_t>(1, (keys + 63) / 64)) << keys;
    EXPECT_GE(planned.splits(p), 1) << keys;
  }
}

TEST(CudaDecode, DoesNotSplitWhatABatchAlreadySpreads) {
  EXPECT_EQ(Planned().splits(decode_problem(32, 32, 8, 1, 8192, 128)), 1);
  EXPECT_EQ(Planned().splits(decode_problem(16, 32, 8, 1, 8192, 256)), 1);  // one block an SM
}

TEST(CudaDecode, BatchInvariantSharesDoNotDependOnTheBatch) {
  Planned planned;
  planned.limits.batch_invariant = true;
  const int64_t alone = planned.splits(decode_problem(1, 32, 8, 1, 8192, 128));
  EXPECT_GT(alone, 1);
  for (const int64_t batch : {2, 16, 300}) {
    Problem p = decode_problem(batch, 32, 8, 1, 8192, 128);
    EXPECT_EQ(planned.splits(p), alone) << batch;
    p.query_layout = QueryLayout::kPacked;
    p.total_q = batch;
    set_dense(p);
    EXPECT_EQ(planned.splits(p), alone) << batch << " packed";
  }
}

TEST(CudaDecode, WorkspaceHoldsTheSharesOfEveryRow) {
  const Planned planned;
  const Problem p = decode_problem(1, 64, 2, 3, 65536, 256);
  const Config config = kSm90Decode.configure(planned.query(p));
  const auto splits = static_cast<size_t>(PackedShape(p, config).splits);
  ASSERT_GT(splits, 1u);
  EXPECT_EQ(kSm90Decode.workspace_bytes(p, config), splits * 64 * 3 * (256 + 2) * sizeof(float));
  const Problem spread = decode_problem(32, 32, 8, 1, 8192, 128);
  EXPECT_EQ(kSm90Decode.workspace_bytes(spread, kSm90Decode.configure(planned.query(spread))), 0u);
}

TEST(CudaDecode, ABoxOfPagesNeverCrossesOne) {
  const Planned planned;
  Problem p = decode_problem(3, 32, 8, 1, 4096, 128);
  EXPECT_EQ(box_keys(p, 64), 64);
  p.key_layout = KeyLayout::kPaged;
  p.has_key_lengths = true;
  p.pages = 2000;
  for (const auto& [page_size, box] :
       {std::pair{8, 8}, {16, 16}, {48, 16}, {64, 64}, {528, 16}, {544, 32}, {1024, 64}}) {
    p.page_size = page_size;
    set_dense(p);
    EXPECT_EQ(planned.refusal(p), "") << page_size;
    EXPECT_EQ(box_keys(p, 64), box) << page_size;
  }
  for (const int64_t page_size : {1, 2, 4, 12}) {
    p.page_size = page_size;
    set_dense(p);
    EXPECT_NE(planned.refusal(p).find("a multiple of 8 keys, these are of"), std::string::npos);
  }
}

Problem paged_problem(int64_t batch, int64_t len_k) {
  Problem p = decode_problem(batch, 64, 2, 1, len_k, 256);
  p.query_layout = QueryLayout::kPacked;
  p.key_layout = KeyLayout::kPaged;
  p.has_key_lengths = true;
  p.page_size = 64;
  p.pages = batch * len_k / 64;
  p.total_q = batch;
  set_dense(p);
  return p;
}

TEST(CudaDecode, SharesOfPackedQueriesFollowTheirTotal) {
  Planned planned;
  planned.limits.batch_invariant = true;
  Problem p = decode_problem(8, 64, 2, 1, 65536, 256);
  const int64_t splits = planned.splits(p);
  p = paged_problem(8, 65536);
  EXPECT_EQ(planned.splits(p), splits);
  const Config config = kSm90Decode.configure(planned.query(p));
  EXPECT_EQ(share_rule(p, config).wave_shares, 0);
  EXPECT_EQ(kSm90Decode.workspace_bytes(p, config),
            static_cast<size_t>(splits) * 8 * 64 * (256 + 2) * sizeof(float));
}

TEST(CudaDecode, LengthsOfTheirOwnAreSharedByTotalKeys) {
  const Planned planned;
  const Problem p = paged_problem(64, 65536);
  const Config config = kSm90Decode.configure(planned.query(p));
  const ShareRule rule = share_rule(p, config);
  ASSERT_EQ(rule.wave_shares, 66);
  EXPECT_EQ(rule.even_splits, planned.splits(decode_problem(64, 64, 2, 1, 65536, 256)));
  const auto tiles = static_cast<int32_t>(p.len_k / config.tile_k);
  EXPECT_EQ(rule.share_tiles(64, 64 * tiles, tiles), 0) << "equal lengths";
  std::mt19937 random(1);
  for (int round = 0; round < 1000; ++round) {
    const int32_t batch = 2 + static_cast<int32_t>(random() % 63);
    const double spread = std::log(tiles) * static_cast<double>(random() % 101) / 100;
    std::vector<int32_t> lengths(batch);
    int32_t sum = 0, most = 0;
    for (int32_t& length : lengths) {
      const double share = static_cast<double>(random() % 1001) / 1000;
      length = random() % 16 == 0 ? 0 : static_cast<int32_t>(std::exp(spread * share));
      sum += length;
      most = std::max(most, length);
    }
    const int32_t share = rule.share_tiles(batch, sum, most);
    int32_t shares = 0;
    for (const int32_t length : lengths) {
      const int32_t splits = rule.splits(share, length);
      ASSERT_GE(splits, 1);
      ASSERT_LE(splits, config.splits);
      shares += splits;
    }
    ASSERT_LE(shares, rule.most_shares(batch));
    if (share == 0) continue;
    // Nobody works long after the others: a fourth of what each place does, where that is enough
    // for a block and no sequence has most of the keys.
    const int32_t fair = std::max(sum / (4 * rule.wave_shares), most / config.splits) + 1;
    ASSERT_LE(share, std::max(rule.least_tiles, fair));
  }
}

TEST(CudaDecode, ARaggedBatchIsEstimatedByItsTotalKeys) {
  Planned planned;
  planned.cuda = h200();
  const auto us = [&](const Kernel& kernel, const Problem& p) {
    const Query query = planned.query(p);
    return kernel.estimate_us(query, kernel.configure(query));
  };
  const Problem all = paged_problem(64, 65536);
  Problem ragged = all;
  ragged.pages = all.pages / 8;
  EXPECT_LT(us(kSm90Decode, ragged), us(kSm90Decode, all) / 5);
  EXPECT_LT(us(kSm90Decode, ragged), us(kPortable, ragged));
  EXPECT_LT(us(kSm90Decode, ragged), us(kSm90Prefill, ragged));
  planned.limits.batch_invariant = true;
  EXPECT_LT(us(kSm90Decode, ragged), us(kSm90Decode, all) / 2);
}

TEST(CudaDecode, SmallPagesAreEstimatedByTheirBoxes) {
  Planned planned;
  planned.cuda = h200();
  const auto us = [&](int64_t page_size) {
    Problem p = paged_problem(4, 65536);
    p.page_size = page_size;
    p.pages = 4 * 65536 / page_size;
    set_dense(p);
    const Query query = planned.query(p);
    return kSm90Decode.estimate_us(query, kSm90Decode.configure(query));
  };
  const double dense_us = us(64);
  EXPECT_EQ(us(256), dense_us);
  EXPECT_NEAR(us(16) / dense_us, 1, 0.08);  // on an H200 148 us to 151
  EXPECT_GT(us(8), dense_us * 1.3);         // not measured
}

// What the case table has of such batches is cut into unequal numbers of shares.
TEST(CudaDecode, RaggedCasesAreCutUnevenly) {
  Planned planned;
  planned.cuda = h200();
  for (const Case& c : make_cases(CaseSet::kRagged, Device::kCuda, 1)) {
    const Problem& p = c.problem;
    const Config config = kSm90Decode.configure(planned.query(p));
    const ShareRule rule = share_rule(p, config);
    ASSERT_GT(rule.wave_shares, 0) << c.name;
    std::vector<int32_t> tiles;
    for (int64_t b = 0; b < p.batch; ++b) {
      const auto i = static_cast<size_t>(b);
      const int32_t length =
          p.has_key_lengths ? c.key_lengths[i] : c.key_offsets[i + 1] - c.key_offsets[i];
      tiles.push_back((length + config.tile_k - 1) / config.tile_k);
    }
    const auto [least, most] = std::minmax_element(tiles.begin(), tiles.end());
    const int32_t share = rule.share_tiles(static_cast<int32_t>(p.batch),
                                           std::accumulate(tiles.begin(), tiles.end(), 0), *most);
    ASSERT_GT(share, 0) << c.name;
    EXPECT_EQ(rule.splits(share, *least), 1) << c.name;
    EXPECT_GE(rule.splits(share, *most), 4) << c.name;
  }
}

TEST(CudaDecode, ShortCachesOneSequenceAndBitsOfTheirOwnAreCutAlike) {
  Planned planned;
  const auto workers = [&](const Problem& p) {
    return kSm90Decode.configure(planned.query(p)).workers;
  };
  EXPECT_GT(workers(paged_problem(2, 4096)), 0);
  EXPECT_EQ(workers(paged_problem(1, 4096)), 0);
  EXPECT_EQ(workers(paged_problem(2, 512)), 0);
  EXPECT_EQ(workers(decode_problem(2, 64, 2, 1, 4096, 256)), 0);
  planned.limits.batch_invariant = true;
  EXPECT_EQ(workers(paged_problem(2, 4096)), 0);
}

TEST(CudaDecode, TakesTheNarrowestVariant) {
  const Planned planned;
  const auto variant = [&](int64_t dim_qk, int64_t dim_v) {
    Problem p = decode_problem(1, 8, 1, 1, 128, 64);
    p.dim_qk = dim_qk;
    p.dim_v = dim_v;
    set_dense(p);
    if (!planned.refusal(p).empty()) return std::pair<int64_t, int64_t>{};
    const HeadDims found = decode_variant(kSm90Decode.configure(planned.query(p))).instance.dims;
    return std::pair<int64_t, int64_t>{found.dim_qk, found.dim_v};
  };
  EXPECT_EQ(variant(8, 8), std::pair(int64_t{64}, int64_t{64}));
  EXPECT_EQ(variant(192, 128), std::pair(int64_t{192}, int64_t{128}));
  EXPECT_EQ(variant(192, 256), std::pair(int64_t{256}, int64_t{256}));
  EXPECT_EQ(variant(320, 256), std::pair(int64_t{512}, int64_t{512}));
  EXPECT_EQ(variant(576, 512), std::pair(int64_t{576}, int64_t{512}));
  EXPECT_EQ(variant(584, 512), std::pair(int64_t{0}, int64_t{0}));
}

TEST(CudaDecode, RefusesWithTheReason) {
  Planned planned;
  Problem p = decode_problem(1, 8, 1, 1, 128, 64);
  EXPECT_EQ(planned.refusal(p), "");
  p.dtype_q = p.dtype_kv = Dtype::kF32;
  EXPECT_NE(planned.refusal(p).find("16-bit"), std::string::npos);
  p = decode_problem(1, 8, 1, 1, 128, 100);
  EXPECT_NE(planned.refusal(p).find("multiple of 8"), std::string::npos);
  p = decode_problem(1, 8, 1, 1, 128, 640);
  EXPECT_NE(planned.refusal(p).find("576/512"), std::string::npos);
  p = decode_problem(1, 8, 1, 1, 128, 64);
  p.stride_k[2] = 67;
  EXPECT_NE(planned.refusal(p).find("k has a length stride"), std::string::npos);
  planned.limits.precision = Precision::kHigh;
  EXPECT_NE(planned.refusal(decode_problem(1, 8, 1, 1, 128, 64)).find("precision"),
            std::string::npos);
  planned = Planned();
  planned.cuda.compute_capability = 120;
  EXPECT_NE(planned.refusal(decode_problem(1, 8, 1, 1, 128, 64)).find("9.0"), std::string::npos);
}

// Latent attention after absorption: K alone is read.
TEST(CudaDecode, CountsKeysAloneWhereValuesLieInThem) {
  const Planned planned;
  Problem p = decode_problem(8, 64, 1, 1, 65536, 576);
  p.dim_v = 512;
  p.stride_v = p.stride_k;
  p.stride_out = dense_strides(64, 1, 512);
  const auto us = [&] {
    return kSm90Decode.estimate_us(planned.query(p), kSm90Decode.configure(planned.query(p)));
  };
  const double own = us();
  p.values_in_keys = true;
  const double in_keys = us();
  EXPECT_LT(in_keys, 0.8 * own);
  EXPECT_GT(in_keys, 0.5 * own);
}

TEST(CudaDecode, TakesKeysThatHeadsOrBatchesShare) {
  Problem p = decode_problem(4, 8, 2, 1, 128, 64);
  p.stride_k[0] = p.stride_v[0] = 0;
  p.stride_k[1] = p.stride_v[1] = 0;
  EXPECT_EQ(Planned().refusal(p), "");
}

Problem code_problem(int64_t dim, Quantised format, Scales scales) {
  Problem p = decode_problem(1, 16, 1, 1, 65536, dim);
  p.quantised_k = p.quantised_v = format;
  p.scales_k = p.scales_v = scales;
  return p;
}

TEST(Sm90Decode, WidensCodesOfAByte) {
  const Planned planned;
  for (const auto& [dim, text] : {std::pair<int64_t, const char*>{96, "128/128"},
                                  {128, "128/128"},
                                  {256, "256/256"},
                                  {512, "512/512"}}) {
    for (const Quantised format : {Quantised::kE4m3, Quantised::kInt8}) {
      for (const Scales scales :
           {Scales::kNone, Scales::kTensor, Scales::kHead, Scales::kTokenHead}) {
        const Problem p = code_problem(dim, format, scales);
        ASSERT_EQ(planned.refusal(p), "");
        const Query query = planned.query(p);
        const Config config = kSm90Decode.configure(query);
        const DecodeVariant& variant = decode_variant(config);
        EXPECT_TRUE(variant.reads_codes);
        EXPECT_LE(variant.shared_bytes, 227 * 1024 / variant.blocks_per_sm);
        EXPECT_EQ(kSm90Decode.variant(query, config),
                  fmt::format("bf16 wgmma, {}, codes widened in shared memory", text));
      }
    }
  }
}

TEST(Sm90Decode, ExpectsOfCodesWhatAnH200Took) {
  struct Row {
    int64_t batch, group, heads_kv, keys, dim;
    double us;
  };
  const CudaFacts facts = h200();
  for (const Row row : {Row{1, 4, 8, 65536, 128, 57.5}, Row{32, 4, 8, 8192, 128, 205},
                        Row{1, 32, 2, 65536, 256, 36.4}, Row{32, 32, 2, 8192, 256, 135},
                        Row{1, 16, 1, 65536, 512, 40.6}, Row{32, 16, 1, 8192, 512, 138}}) {
    Problem p =
        decode_problem(row.batch, row.group * row.heads_kv, row.heads_kv, 1, row.keys, row.dim);
    p.quantised_k = p.quantised_v = Quantised::kE4m3;
    p.scales_k = p.scales_v = Scales::kTokenHead;
    const Query query{p, {}, facts};
    EXPECT_NEAR(kSm90Decode.estimate_us(query, kSm90Decode.configure(query)) / row.us, 1, 0.12)
        << row.dim << ", batch " << row.batch;
  }
}

TEST(Sm90Decode, SaysWhichCodesItDoesNotRead) {
  const Planned planned;
  const Problem p = code_problem(256, Quantised::kE4m3, Scales::kTokenHead);
  const auto refusal = [&](auto change) {
    Problem changed = p;
    change(changed);
    return planned.refusal(changed);
  };
  expect_code_refusals(refusal);
  EXPECT_EQ(refusal([](Problem& p) { p.dim_qk = 576; }),
            "takes heads of up to 512/512 over codes, these are 576/256");
}

}  // namespace
}  // namespace wh::cuda
