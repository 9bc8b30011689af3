// Tiles and blocks of cuda_portable_backward and sm90_backward, checked without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "api/machine.h"
#include "core/own_keys.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/portable/backward/config.h"
#include "cuda/portable/backward/kernel.h"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward_wide/config.h"
#include "plan/planner.h"
#include "support/cards.h"
#include "support/problems.h"

namespace wh::cuda {
namespace {

TEST(CudaBackward, TilesAreWholeProductsThatFit) {
  for (const Instance& instance : kBackwardInstances) {
    const auto bytes = static_cast<int>(dtype_bytes(instance.dtype));
    const int least_columns = bytes == 2 ? 16 : 8, least_sums = bytes == 2 ? 16 : 32;
    for (const Side side : {Side::kQueries, Side::kKeys}) {
      const HeadDims dims = instance.dims;
      const BackwardTile tile = backward_tile(dims, bytes, side, instance.memory);
      ASSERT_GT(tile.bytes, 0);
      EXPECT_LE(tile.bytes, static_cast<int>(instance.memory));
      // Eight warps of 16 rows, shared by groups of columns.
      EXPECT_EQ(tile.rows * tile.column_groups, 128);
      EXPECT_EQ(tile.columns % least_columns, 0);
      EXPECT_EQ(dims.dim_qk / tile.column_groups % least_sums, 0);
      EXPECT_EQ(dims.dim_v / tile.column_groups % least_sums, 0);
      // Every column's scores are computed by one group.
      EXPECT_EQ(tile.columns % (8 * tile.slice_tiles()), 0);
      EXPECT_GE(tile.slice_tiles() * tile.column_groups * 8, tile.columns);
      // Shared memory is read 16 bytes at a time.
      for (const int pitch : {tile.pitch_qk, tile.pitch_v, tile.pitch_p}) {
        EXPECT_EQ(pitch * bytes % 16, 0);
      }
      // A warp's sums and the scores beside them: 255 registers, of which others need 60.
      const int sums =
          (side == Side::kKeys ? dims.dim_qk + dims.dim_v : dims.dim_qk) / tile.column_groups / 2;
      EXPECT_LE(sums + 2 * 4 * tile.slice_tiles(), 195);
    }
  }
}

struct Masked {
  Causal causal;
  int64_t window_left, window_right;
};

// How often each query, or key, is a block's own, and what blocks meet of the other side.
struct Met {
  int64_t seen_pairs = 0, full_tiles = 0;
  int64_t mixed_tiles = 0;  // in which rows lie that the block must not sum
};

// TMA brings what a tensor has, of other sequences too. Of a tile that has such rows the block has
// to know; those of a full one all are to sum.
void expect_others_known(const Problem& p, const GradientArgs& args, const BackwardItem& item,
                         Side side, int columns, Met& met) {
  const bool is_queries = side == Side::kQueries;
  const Side other = is_queries ? Side::kKeys : Side::kQueries;
  const SideRows of = item.rows_of(args.attention, other);
  const int64_t stored = (is_queries ? key_storage(p) : query_storage(p)).length;
  const Keys present = is_queries ? item.sequence.present : Keys{0, item.sequence.len_q};
  for (int32_t tile = item.begin; tile < item.end; ++tile) {
    bool has_others = false;
    for (int32_t row = tile * columns; row < (tile + 1) * columns; ++row) {
      const bool is_summed = row >= present.begin && row < present.end;
      has_others |= of.first + row < stored && !is_summed;
    }
    met.mixed_tiles += has_others;
    const bool known =
        item.brings_others(args.attention, side, tile * columns, static_cast<int32_t>(columns));
    ASSERT_TRUE(known || !has_others) << tile;
    ASSERT_FALSE(known && item.is_full(tile)) << tile;
    // Dense rows end with their tensor.
    if (!of.is_packed) {
      ASSERT_EQ(known, has_others) << tile;
    }
  }
}

// Every pair that sees each other is in a block of each side, and what a block takes for full is.
void expect_all_met(const Problem& p, const Tensors& t, int rows, int columns, Met& met) {
  const GradientArgs args = gradient_args(p, t);
  const BackwardBlocks blocks(p, rows, rows);
  for (const Side side : {Side::kQueries, Side::kKeys}) {
    const bool is_queries = side == Side::kQueries;
    const int64_t heads = is_queries ? p.heads_q : p.heads_kv;
    const int64_t length = is_queries ? p.len_q : p.len_k;  // the most of one sequence
    const auto tiles = static_cast<int32_t>(is_queries ? blocks.query_tiles : blocks.key_tiles);
    std::vector<int> owners(static_cast<size_t>(p.batch * heads * length));
    for (int32_t index = 0; index < (is_queries ? blocks.queries : blocks.keys); ++index) {
      const BackwardItem item(args, side, tiles, index, rows, columns);
      const int64_t batch_idx = item.sequence.batch_idx;
      const wh::Sequence sequence = sequence_at(p, t, batch_idx);
      const int64_t keys = own_keys(sequences_of(p, t), batch_idx);
      EXPECT_EQ(item.keys, keys);
      expect_others_known(p, args, item, side, columns, met);
      for (int32_t own = item.first; own < item.first + item.rows; ++own) {
        ++owners[static_cast<size_t>((batch_idx * heads + item.head) * length + own)];
        const int64_t others = is_queries ? keys : sequence.len_q;
        for (int64_t other = 0; other < others; ++other) {
          const int64_t query = is_queries ? own : other, key = is_queries ? other : own;
          const KeyRange visible = visible_keys(p, sequence, query);
          const bool sees = key >= visible.begin && key < visible.end;
          const auto tile = static_cast<int32_t>(other / columns);
          if (sees) {
            ++met.seen_pairs;
            ASSERT_TRUE(tile >= item.begin && tile < item.end) << query << " sees " << key;
          }
          if (item.is_full(tile)) {
            ++met.full_tiles;
            ASSERT_TRUE(sees) << query << " does not see " << key << " of a full tile";
            if (is_queries) {
              ASSERT_LE((tile + 1) * columns, keys);
            }
          }
        }
      }
    }
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t owned =
          is_queries ? sequence_at(p, t, b).len_q : own_keys(sequences_of(p, t), b);
      for (int64_t i = 0; i < heads * length; ++i) {
        ASSERT_EQ(owners[static_cast<size_t>(b * heads * length + i)], i % length < owned);
      }
    }
  }
}

TEST(CudaBackward, BlocksMeetWhateverSeesEachOther) {
  std::mt19937 random(5);
  const auto between = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  constexpr Masked kMasks[] = {
      {Causal::kNone, kUnlimited, kUnlimited},    {Causal::kBottomRight, kUnlimited, kUnlimited},
      {Causal::kTopLeft, kUnlimited, kUnlimited}, {Causal::kNone, 10, 3},
      {Causal::kBottomRight, 40, kUnlimited},     {Causal::kNone, 0, kUnlimited},
      {Causal::kTopLeft, 7, kUnlimited}};
  Met dense, packed;
  for (int round = 0; round < 400; ++round) {
    const Masked& masked = kMasks[round % 7];
    Problem p;
    p.device = Device::kCuda;
    p.batch = 2;
    p.heads_q = 6;
    p.heads_kv = 2;
    p.len_q = between(1, 150);
    p.len_k = between(1, 150);
    p.dim_qk = p.dim_v = 16;
    p.causal = masked.causal;
    p.window_left = masked.window_left;
    p.window_right = masked.window_right;
    p.has_key_lengths = p.has_key_starts = round % 3 == 0;
    set_dense(p);
    std::vector<int32_t> lengths, starts, queries{0}, keys{0};
    for (int64_t b = 0; b < p.batch; ++b) {
      lengths.push_back(static_cast<int32_t>(between(0, p.len_k)));
      starts.push_back(static_cast<int32_t>(between(0, p.len_k)));
      queries.push_back(queries.back() + static_cast<int32_t>(between(0, p.len_q)));
      keys.push_back(keys.back() + static_cast<int32_t>(between(0, p.len_k)));
    }
    Tensors t;
    if (p.has_key_lengths) {
      t.key_lengths = lengths.data();
      t.key_starts = starts.data();
    }
    const int rows = 16 << between(0, 3), columns = 8 << between(0, 3);
    expect_all_met(p, t, rows, columns, dense);
    p.query_layout = QueryLayout::kPacked;
    p.key_layout = KeyLayout::kPacked;
    p.total_q = queries.back() + between(0, 20);
    p.total_k = keys.back() + between(0, 20);
    t.query_offsets = queries.data();
    t.key_offsets = keys.data();
    expect_all_met(p, t, rows, columns, packed);
  }
  EXPECT_GT(dense.seen_pairs, 1'000'000);
  EXPECT_GT(dense.full_tiles, 100'000);
  EXPECT_GT(packed.seen_pairs, 200'000);
  EXPECT_GT(packed.full_tiles, 20'000);
  EXPECT_GT(dense.mixed_tiles, 200);
  EXPECT_GT(packed.mixed_tiles, 2'000);
}

// Blocks of packed queries follow their tokens, not the longest sequence.
TEST(CudaBackward, BlocksOfPackedSequencesFollowTheirTokens) {
  Problem p = square_of_300(64, 64, Dtype::kBf16, Device::kCuda);
  p.batch = 100;
  p.len_q = p.len_k = 30'000;
  p.query_layout = QueryLayout::kPacked;
  p.key_layout = KeyLayout::kPacked;
  p.total_q = p.total_k = 40'000;
  const BackwardBlocks blocks(p, 128, 64);
  EXPECT_LE(blocks.queries, p.heads_q * (40'000 / 128 + p.batch));
  EXPECT_LE(blocks.keys, p.heads_kv * (40'000 / 64 + p.batch));
  // Tensor maps of no rows are none.
  p.total_k = 0;
  EXPECT_EQ(BackwardBlocks(p, 128, 64).keys, 0);
  EXPECT_GT(BackwardBlocks(p, 128, 64).queries, 0);
}

TEST(CudaBackward, HopperTilesFitRegistersAndSharedMemory) {
  for (const Instance& instance : kGradientInstances) {
    const HeadDims dims = instance.dims;
    for (const Side side : {Side::kQueries, Side::kKeys}) {
      const GradientTile tile = gradient_tile(dims, side);
      const GradientMemory memory(dims, side);
      EXPECT_LE(memory.bytes, most_shared_bytes());
      EXPECT_EQ(tile.columns % 16, 0);
      // Of a thread of a consumer: sums, scores, d_out v^T, and both as operands.
      int sums = dims.dim_qk / 2, halves = tile.columns / 4;
      if (side == Side::kKeys) {
        sums =
            tile.has_roles ? std::max(dims.dim_qk, dims.dim_v) / 2 : (dims.dim_qk + dims.dim_v) / 2;
        halves *= tile.has_roles ? 1 : 2;
      }
      EXPECT_LE(sums + tile.columns + halves, 208);
      // TMA's boxes and the swizzle's repetition.
      EXPECT_LE(std::max(tile.rows, tile.columns), 256);
      for (const int offset : {memory.own_v_offset, memory.qk_offset, memory.v_offset,
                               memory.qk_bytes, memory.v_bytes}) {
        EXPECT_EQ(offset % 1024, 0);
      }
    }
  }
}

TEST(CudaBackward, HoppersWideTilesFitSharedMemory) {
  for (const Instance& instance : kWideGradientInstances) {
    for (const Gradient of : {Gradient::kDq, Gradient::kDk, Gradient::kDv}) {
      const WideGradientMemory memory(instance.dims, of);
      EXPECT_LE(memory.bytes, most_shared_bytes());
      // No slot more would fit.
      EXPECT_GT(memory.bytes + kWideGradientSlotBytes, most_shared_bytes());
      EXPECT_EQ(memory.ring_offset % 1024, 0);
      EXPECT_EQ(memory.exchange_offset % 16, 0);
      EXPECT_EQ(memory.queries_offset % 16, 0);
      EXPECT_EQ(memory.barrier_offset % 8, 0);
      // A slot that is multiplied, one that waits for its release, and one on its way. The left
      // consumer of dv holds half of a tile's columns and the last scores' panel at once.
      EXPECT_GE(std::min(memory.left_slots, memory.right_slots), 3);
      if (of == Gradient::kDv) {
        EXPECT_GE(memory.left_slots, panels_of(instance.dims.dim_v) / 2 + 2);
      }
    }
  }
}

TEST(CudaBackward, HopperTakesNumbersForEveryRowAndAFlag) {
  const Config config;
  for (const int64_t dim : {128, 512}) {
    const Problem p = square_of_300(dim, dim, Dtype::kBf16, Device::kCuda);
    const Kernel& kernel = dim == 128 ? kSm90Backward : kSm90BackwardWide;
    const size_t portable = kPortableBackward.workspace_bytes(p, config);
    EXPECT_GT(kernel.workspace_bytes(p, config), portable);
    EXPECT_LE(kernel.workspace_bytes(p, config), portable + 128);
  }
}

class HoppersBackward : public testing::TestWithParam<const Kernel*> {};

TEST_P(HoppersBackward, RefusesWithWords) {
  const Limits limits;
  const auto reason = [&](const Problem& p, const CudaFacts& cuda) {
    return GetParam()->refusal({p, limits, cuda}).value_or("taken");
  };
  const int64_t widest = GetParam() == &kSm90Backward ? 256 : 512;
  Problem p = backward_of(square_of_300(widest + 8, 128, Dtype::kBf16, Device::kCuda));
  const std::string words = "up to " + std::to_string(widest) + " wide";
  EXPECT_NE(reason(p, h100()).find(words), std::string::npos) << reason(p, h100());
  p = backward_of(square_of_300(128, 128, Dtype::kBf16, Device::kCuda));
  EXPECT_EQ(reason(p, h100()), "taken");
  EXPECT_NE(reason(p, ampere()).find("compute capability 9.0"), std::string::npos);
  p.mask = MaskKind::kBoolean;
  EXPECT_NE(reason(p, h100()).find("array mask"), std::string::npos);
  p.mask = MaskKind::kNone;
  p.stride_d_out[2] = 0;
  EXPECT_EQ(reason(p, h100()), "taken");  // broadcast
  p.stride_d_out[2] = 132;
  EXPECT_NE(reason(p, h100()).find("d_out"), std::string::npos) << reason(p, h100());
}

INSTANTIATE_TEST_SUITE_P(Kernels, HoppersBackward,
                         testing::Values(&kSm90Backward, &kSm90BackwardWide),
                         [](const auto& of) { return std::string(of.param->name); });

// Medians of bench/results/: of cuda_portable_backward and of 192 those of
// nvidia-h200-2026-11-29-backward-sm90.json, of 512 those of ...-backward-wide.md, the rest those
// of ...-backward-before-and-after.md, in the middle of its rounds.
TEST(CudaBackward, EstimatesAreNearWhatAnH200Took) {
  constexpr struct {
    int64_t heads, dim_qk, dim_v, length;
    Causal causal;
    double sm90_ms, portable_ms;  // 0: not measured
  } kRows[] = {{32, 64, 64, 8192, Causal::kNone, 7.22, 20.43},
               {32, 64, 64, 8192, Causal::kTopLeft, 3.99, 11.31},
               {16, 128, 128, 8192, Causal::kNone, 5.56, 16.10},
               {16, 128, 128, 8192, Causal::kTopLeft, 3.02, 8.88},
               {16, 192, 128, 8192, Causal::kNone, 7.91, 26.08},
               {16, 192, 128, 8192, Causal::kTopLeft, 4.16, 13.82},
               {16, 192, 192, 8192, Causal::kNone, 8.90, 45.97},
               {16, 192, 192, 8192, Causal::kTopLeft, 4.92, 23.32},
               {16, 256, 256, 8192, Causal::kNone, 10.76, 47.62},
               {16, 256, 256, 8192, Causal::kTopLeft, 5.67, 0},
               {16, 512, 512, 4096, Causal::kNone, 7.95, 43.51},
               {16, 512, 512, 4096, Causal::kTopLeft, 4.22, 21.31},
               {16, 512, 512, 8192, Causal::kNone, 32.09, 0}};
  const Limits limits;
  const CudaFacts cuda = h200();
  for (const auto& row : kRows) {
    Problem p = square_of_300(row.dim_qk, row.dim_v, Dtype::kBf16, Device::kCuda);
    p.batch = 2;
    p.heads_q = p.heads_kv = row.heads;
    p.len_q = p.len_k = row.length;
    p.causal = row.causal;
    set_dense(p);
    p = backward_of(p);
    const Query query{p, limits, cuda};
    const auto estimate_ms = [&](const Kernel& kernel) {
      return kernel.estimate_us(query, kernel.configure(query)) / 1e3;
    };
    const bool is_wide = row.dim_qk > 256;
    EXPECT_NEAR(estimate_ms(is_wide ? kSm90BackwardWide : kSm90Backward) / row.sm90_ms, 1,
                is_wide ? 0.05 : 0.1)
        << describe(p);
    if (row.portable_ms > 0) {
      EXPECT_NEAR(estimate_ms(kPortableBackward) / row.portable_ms, 1, 0.4) << describe(p);
    }
  }
}

TEST(CudaBackward, PlansTakeHoppersKernelWhereItRuns) {
  const Limits limits;
  const auto chosen = [&](const Problem& p, const CudaFacts& cuda) {
    return make_plan(backward_of(p), limits, {cuda, kernels_of(Device::kCuda)})->kernel;
  };
  for (const int64_t dim : {32, 64, 80, 128, 136, 192, 256, 264, 320, 512}) {
    const std::string hoppers = dim <= 256 ? "sm90_backward" : "sm90_backward_wide";
    for (const int64_t length : {16, 300, 8192}) {
      Problem p = square_of_300(dim, dim, Dtype::kF16, Device::kCuda);
      p.len_q = p.len_k = length;
      set_dense(p);
      EXPECT_EQ(chosen(p, h200()), hoppers) << describe(p);
      EXPECT_EQ(chosen(p, ampere()), "cuda_portable_backward") << describe(p);
      p.mask = MaskKind::kBoolean;
      EXPECT_EQ(chosen(p, h200()), "cuda_portable_backward") << describe(p);
    }
  }
  EXPECT_EQ(chosen(square_of_300(128, 128, Dtype::kF32, Device::kCuda), h200()),
            "cuda_portable_backward");
  for (const int64_t dim : {128, 512}) {
    Problem packed = square_of_300(dim, dim, Dtype::kBf16, Device::kCuda);
    packed.batch = 4;
    packed.query_layout = QueryLayout::kPacked;
    packed.key_layout = KeyLayout::kPacked;
    packed.total_q = packed.total_k = 700;
    set_dense(packed);
    EXPECT_EQ(chosen(packed, h200()), dim == 128 ? "sm90_backward" : "sm90_backward_wide");
    EXPECT_EQ(chosen(packed, ampere()), "cuda_portable_backward");
  }
}

TEST(CudaBackward, QueriesThatSeeKeysAreThoseBetweenTheFirstAndTheLast) {
  Problem p = square_of_300(64, 64, Dtype::kBf16, Device::kCuda);
  p.causal = Causal::kBottomRight;
  p.window_left = 49;
  const GradientArgs args = gradient_args(p, {});
  const cuda::Sequence sequence = dense_sequence(args.attention, 0);
  // Keys 100 to 119 are on the diagonals of those queries and in the windows of the 49 behind.
  const Queries queries = queries_that_see(args.attention, sequence, {100, 120});
  EXPECT_EQ(queries.begin, 100);
  EXPECT_EQ(queries.end, 119 + 49 + 1);
  const Queries whole = queries_that_see_all(args.attention, sequence, {100, 120});
  EXPECT_EQ(whole.begin, 119);
  EXPECT_EQ(whole.end, 100 + 49 + 1);
}

TEST(CudaBackward, TakesNumbersForEveryRowFromTheWorkspace) {
  Problem p = square_of_300(64, 64, Dtype::kBf16, Device::kCuda);
  const Limits limits;
  const CudaFacts cuda = h100();
  const Query query{p, limits, cuda};
  const Config config = kPortableBackward.configure(query);
  const size_t rows = 8 * 300 * sizeof(float);
  EXPECT_LE(kPortableBackward.workspace_bytes(p, config), 3 * (rows + 64) + 64);
  p.has_sinks = true;
  EXPECT_GT(kPortableBackward.workspace_bytes(p, config), 4 * rows);
  EXPECT_GT(kPortableBackward.estimate_us(query, config), 0);
  // One row more, not a square of them more.
  p.len_q = p.len_k = 30'000;
  set_dense(p);
  EXPECT_LT(kPortableBackward.workspace_bytes(p, config), 4 * 100 * (rows + 64) + 64);
  // Of packed queries those that there are, not the most of each sequence.
  p.batch = 100;
  p.query_layout = QueryLayout::kPacked;
  p.total_q = 30'000;
  set_dense(p);
  EXPECT_LT(kPortableBackward.workspace_bytes(p, config), 4 * 100 * (rows + 64) + 64);
}

}  // namespace
}  // namespace wh::cuda
