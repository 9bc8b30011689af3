// Which keys tiles of queries work on, and in which order tiles run: the CUDA kernels' arithmetic,
// checked without a GPU.
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <tuple>

#include "core/key_range.h"
#include "cuda/common/key_range.h"
#include "cuda/common/tile_order.h"
#include "cuda/instances.h"
#include "cuda/sm90/prefill/tiles.h"
#include "cuda/sm90/prefill_wide/tiles.h"

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
      for (const Instance& instance : kWideInstances) {
        const HeadDims dims = instance.dims;
        const WideTile tile = wide_tile(dims, scores, layouts);
        EXPECT_LE(WideMemory(dims, tile).bytes, kSharedBytes) << dims.dim_qk;
        EXPECT_LE(tile.producer_registers + tile.left_registers + tile.right_registers, 3 * 168);
      }
    }
  }
}

}  // namespace
}  // namespace wh::cuda
