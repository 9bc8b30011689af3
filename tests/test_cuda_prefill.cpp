// Which keys tiles of queries work on, and in which order tiles run: the CUDA kernels' arithmetic,
// checked without a GPU.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <tuple>

#include "cases.h"
#include "core/key_range.h"
#include "cuda/common/key_range.h"
#include "cuda/common/tile_order.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/portable/config.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/prefill/tiles.h"
#include "cuda/sm90/prefill_wide/config.h"
#include "cuda/sm90/prefill_wide/tiles.h"
#include "support/cards.h"
#include "support/code_refusals.h"

namespace wh::cuda {
namespace {

struct Drawn {
  Problem problem;
  int32_t key_length, key_start;
  AttentionArgs args;  // points at the two above
};

class Draw {
 public:
  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  void problem(Drawn& d) {
    Problem& p = d.problem;
    p.len_q = between(1, 70);
    p.len_k = between(0, 90);
    p.causal = static_cast<Causal>(between(0, 2));
    p.window_left = between(0, 2) == 0 ? between(0, 100) : kUnlimited;
    p.window_right = between(0, 2) == 0 ? between(0, 100) : kUnlimited;
    d.key_length = static_cast<int32_t>(between(0, p.len_k));
    d.key_start = static_cast<int32_t>(between(0, p.len_k + 2));
    d.args = AttentionArgs{};
    d.args.len_q = static_cast<int32_t>(p.len_q);
    d.args.len_k = static_cast<int32_t>(p.len_k);
    d.args.zeros_from = between(0, 1) == 0 ? d.args.len_k : -1;
    d.args.causal = p.causal;
    d.args.window_left = static_cast<int32_t>(p.window_left);
    d.args.window_right = p.causal != Causal::kNone ? 0 : static_cast<int32_t>(p.window_right);
    if (between(0, 1) == 0) d.args.key_lengths = &d.key_length;
    if (between(0, 1) == 0) d.args.key_starts = &d.key_start;
  }

  Tensors tensors(const Drawn& d) {
    Tensors t;
    t.key_lengths = d.args.key_lengths;
    t.key_starts = d.args.key_starts;
    return t;
  }

 private:
  std::mt19937_64 random_{7};
};

TEST(CudaKeyRange, AgreesWithTheContract) {
  Draw draw;
  for (int i = 0; i < 20000; ++i) {
    Drawn d;
    draw.problem(d);
    const auto query = draw.between(0, d.problem.len_q - 1);
    const KeyRange want =
        wh::visible_keys(d.problem, wh::present_keys(d.problem, draw.tensors(d), 0), query);
    const Keys have = visible_keys(d.args, sequence_at(d.args, 0), static_cast<int32_t>(query));
    if (want.empty()) {
      EXPECT_LE(have.end, have.begin);
    } else {
      EXPECT_EQ(have.begin, want.begin);
      EXPECT_EQ(have.end, want.end);
    }
  }
}

TEST(CudaKeyRange, TilesAreSkippedUnmaskedAndUncleanedOnlyWhereTheyMay) {
  Draw draw;
  for (int i = 0; i < 20000; ++i) {
    Drawn d;
    draw.problem(d);
    const Sequence sequence = sequence_at(d.args, 0);
    const auto first = static_cast<int32_t>(draw.between(0, d.args.len_q - 1));
    const auto last = static_cast<int32_t>(draw.between(first, d.args.len_q - 1));
    constexpr int32_t kTileK = 16;
    const KeyTiles tiles = key_tiles(d.args, sequence, first, last, kTileK);
    for (int32_t tile = 0; tile * kTileK < d.args.len_k; ++tile) {
      const bool is_worked_on = tile >= tiles.begin && tile < tiles.end;
      for (int32_t key = tile * kTileK; key < (tile + 1) * kTileK; ++key) {
        for (int32_t query = first; query <= last; ++query) {
          const Keys seen = visible_keys(d.args, sequence, query);
          const bool is_visible = key >= seen.begin && key < seen.end;
          if (!is_worked_on) {
            ASSERT_FALSE(is_visible) << "tile " << tile << " is skipped";
            continue;
          }
          if (tiles.is_full(tile)) {
            ASSERT_TRUE(is_visible) << "tile " << tile << " is not masked";
          }
          if (tiles.is_clean(tile) && (key < d.args.len_k || d.args.zeros_from < 0)) {
            ASSERT_TRUE(is_visible) << "tile " << tile << " is not cleaned";
          }
        }
      }
    }
  }
}

TEST(CudaTileOrder, EveryTileComesOnceAndTheLastQueriesOfASectionFirst) {
  for (const int32_t section : {1, 3, 4, 12}) {
    TileOrder order{};
    order.packed_heads = 2;
    order.tile_queries = 64;
    order.query_tiles = 5;
    order.head_sets = 12;  // 2 batch entries of 12 heads
    order.section_sets = section;
    order.tiles = 60;
    std::set<std::tuple<int32_t, int32_t, int32_t>> seen;
    int32_t before = 0;
    for (int32_t i = 0; i < order.tiles; ++i) {
      const QueryTile tile = query_tile(order, 12, i);
      EXPECT_LT(tile.batch_idx, 2);
      EXPECT_EQ(tile.first_head % 2, 0);
      EXPECT_LT(tile.first_head, 12);
      EXPECT_LT(tile.first_query, 5 * 64);
      if (i % (section * order.query_tiles) != 0) {
        EXPECT_LE(tile.first_query, before);
      }
      before = tile.first_query;
      EXPECT_TRUE(seen.insert({tile.batch_idx, tile.first_head, tile.first_query}).second);
    }
    EXPECT_EQ(seen.size(), 60u);
  }
}

// What a block of compute capability 9.0 may opt in to, and its registers when 384 or 512 threads
// start with 168 or 128 each.
TEST(CudaTiles, FitSharedMemoryAndRegisters) {
  constexpr int kSharedBytes = 232448;
  for (const Layouts layouts : {Layouts::kDense, Layouts::kAll}) {
    for (const Scores scores : {Scores::kPlain, Scores::kTransformed, Scores::kMasked}) {
      for (const Instance& instance : kPrefillInstances) {
        const HeadDims dims = instance.dims;
        const PrefillTile tile = prefill_tile(dims, scores, layouts);
        EXPECT_LE(PrefillMemory(dims, tile).bytes, kSharedBytes) << dims.dim_qk;
        EXPECT_EQ(tile.tile_k % 16, 0);
        EXPECT_LE(tile.producer_registers + tile.warpgroups * tile.consumer_registers,
                  tile.warpgroups == 2 ? 3 * 168 : 4 * 128);
      }
      for (const Instance& instance : kPrefillCodeInstances) {
        const HeadDims dims = instance.dims;
        const PrefillTile tile = prefill_code_tile(dims, scores, layouts);
        EXPECT_LE(PrefillMemory(dims, tile).bytes, kSharedBytes) << dims.dim_qk;
        EXPECT_EQ(tile.tile_k % 16, 0);
        EXPECT_GE(tile.load_slots, 2) << dims.dim_qk;
        // More would run ahead of the consumers by more tiles than there are slots of scales.
        EXPECT_GE(tile.stages, 3);
        EXPECT_LE(tile.stages, kCodeScaleSlots);
        EXPECT_LE(tile.producer_registers + tile.warpgroups * tile.consumer_registers,
                  tile.warpgroups == 2 ? 3 * 168 : 4 * 128);
      }
      for (const Instance& instance : kWideInstances) {
        const HeadDims dims = instance.dims;
        const WideTile tile = wide_tile(dims, scores, layouts);
        EXPECT_LE(WideMemory(dims, tile).bytes, kSharedBytes) << dims.dim_qk;
        EXPECT_LE(tile.producer_registers + tile.left_registers + tile.right_registers, 3 * 168);
      }
      for (const Instance& instance : kWideCodeInstances) {
        const HeadDims dims = instance.dims;
        const WideTile tile = wide_code_tile(dims, scores, layouts);
        EXPECT_LE(WideMemory(dims, tile).bytes, kSharedBytes) << dims.dim_qk;
        EXPECT_GE(tile.load_slots, 2) << dims.dim_qk;
        // K and a slot of V: with more, those who widen would ask for scales of keys while the slot
        // that these take might still be read.
        EXPECT_LE(tile.left_slots, 2 * tile.tile_k * dims.dim_qk / kWideSlotBytes + 1);
        EXPECT_LE(tile.supply_warpgroups * tile.producer_registers + tile.left_registers +
                      tile.right_registers,
                  4 * 128);
      }
    }
  }
}

Problem code_problem(int64_t dim, Quantised format, Scales scales) {
  Problem p;
  p.device = Device::kCuda;
  p.dtype_q = p.dtype_kv = Dtype::kBf16;
  p.heads_q = 16;
  p.heads_kv = 4;
  p.len_q = 2048;
  p.len_k = 32768;
  p.dim_qk = p.dim_v = dim;
  p.causal = Causal::kBottomRight;
  p.quantised_k = p.quantised_v = format;
  p.scales_k = p.scales_v = scales;
  set_dense(p);
  return p;
}

Problem over_elements(Problem p) {
  p.quantised_k = p.quantised_v = Quantised::kNone;
  p.scales_k = p.scales_v = Scales::kNone;
  return p;
}

// Over codes the kernel reads them, in an instance of its own, in no more workspace than over
// elements and in more time, but less than cuda_portable.
template <typename VariantOf>
void expect_widens(const Kernel& kernel, const Problem& p, const std::string& dims,
                   VariantOf variant_of) {
  const CudaFacts cuda = h200();
  const Limits limits;
  const Query query{p, limits, cuda};
  ASSERT_EQ(kernel.refusal(query).value_or(""), "");
  const Config config = kernel.configure(query);
  EXPECT_TRUE(variant_of(config).reads_codes);
  EXPECT_EQ(kernel.variant(query, config),
            fmt::format("bf16 wgmma, {}, codes widened in shared memory", dims));
  const Problem elements = over_elements(p);
  const Query other{elements, limits, cuda};
  const Config of_elements = kernel.configure(other);
  EXPECT_FALSE(variant_of(of_elements).reads_codes);
  EXPECT_LE(kernel.workspace_bytes(p, config), kernel.workspace_bytes(elements, of_elements));
  EXPECT_GT(kernel.estimate_us(query, config), kernel.estimate_us(other, of_elements));
  ASSERT_EQ(kPortable.refusal(query).value_or(""), "");
  EXPECT_LT(kernel.estimate_us(query, config),
            kPortable.estimate_us(query, kPortable.configure(query)));
}

TEST(Sm90Prefill, WidensCodesOfAByte) {
  for (const auto& [dim, text] : {std::pair<int64_t, const char*>{64, "64/64"},
                                  {112, "128/128"},
                                  {128, "128/128"},
                                  {192, "256/256"},
                                  {256, "256/256"}}) {
    for (const Quantised format : {Quantised::kE4m3, Quantised::kInt8}) {
      for (const Scales scales :
           {Scales::kNone, Scales::kTensor, Scales::kHead, Scales::kTokenHead}) {
        SCOPED_TRACE(
            fmt::format("{} {} {}", dim, static_cast<int>(format), static_cast<int>(scales)));
        const Problem p = code_problem(dim, format, scales);
        expect_widens(kSm90Prefill, p, text, prefill_variant);
      }
    }
  }
}

TEST(Sm90Prefill, SaysWhichCodesItDoesNotRead) {
  const CudaFacts cuda = h200();
  const Limits limits;
  const auto refusal = [&](auto change) {
    Problem p = code_problem(256, Quantised::kE4m3, Scales::kTokenHead);
    change(p);
    return kSm90Prefill.refusal({p, limits, cuda}).value_or("");
  };
  expect_code_refusals(refusal);
  EXPECT_EQ(refusal([](Problem& p) { p.dim_qk = 320; }),
            "holds heads up to 256 wide in registers, not 320/256");
}

TEST(Sm90PrefillWide, WidensCodesOfAByte) {
  for (const int64_t dim : {264, 320, 512}) {
    for (const Quantised format : {Quantised::kE4m3, Quantised::kInt8}) {
      for (const Scales scales :
           {Scales::kNone, Scales::kTensor, Scales::kHead, Scales::kTokenHead}) {
        SCOPED_TRACE(
            fmt::format("{} {} {}", dim, static_cast<int>(format), static_cast<int>(scales)));
        Problem p = code_problem(dim, format, scales);
        for (Strides* stride : {&p.stride_k, &p.stride_v}) {
          // In rows of a multiple of 16.
          for (size_t i = 0; i < 3; ++i) (*stride)[i] = (*stride)[i] / dim * 512;
        }
        expect_widens(kSm90PrefillWide, p, "512/512", wide_variant);
        // A block is a worker, not a cluster.
        const auto workers = [](const Problem& of) {
          const CudaFacts cuda = h200();
          const Limits limits;
          return kSm90PrefillWide.configure({of, limits, cuda}).workers;
        };
        EXPECT_EQ(workers(p), 2 * workers(over_elements(p)));
      }
    }
  }
}

TEST(Sm90PrefillWide, SaysWhichCodesItDoesNotRead) {
  const CudaFacts cuda = h200();
  const Limits limits;
  const auto refusal = [&](auto change) {
    Problem p = code_problem(512, Quantised::kE4m3, Scales::kTokenHead);
    change(p);
    return kSm90PrefillWide.refusal({p, limits, cuda}).value_or("");
  };
  expect_code_refusals(refusal);
  EXPECT_EQ(refusal([](Problem& p) { p.dim_qk = 576; }),
            "widens codes of heads up to 512 wide, not 576/512");
  EXPECT_EQ(refusal([](Problem& p) {
              p.mask = MaskKind::kBoolean;
              p.stride_mask = {0, 0, p.len_k, 1};
            }),
            "takes no array masks over codes: their addresses need registers that widening has");
}

}  // namespace
}  // namespace wh::cuda
