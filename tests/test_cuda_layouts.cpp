// How blocks and tiles of the CUDA kernels find their sequence, its rows and its keys where queries
// are packed and keys packed or paged, checked without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "core/key_rows.h"
#include "cuda/combine/combine.h"
#include "cuda/common/packed_rows.h"
#include "cuda/common/tile_order.h"
#include "cuda/sm90/query_tiles.h"
#include "plan/kernel.h"

namespace wh::cuda {
namespace {

constexpr int64_t kTileQ = 16, kTileK = 8;

// A problem of packed queries over keys of some layout, with its offsets, lengths and tables.
struct Drawn {
  Problem p;
  std::vector<int32_t> query_offsets, key_offsets, key_lengths, page_table, page_offsets;

  Tensors tensors() const {
    Tensors t;
    if (p.query_layout == QueryLayout::kPacked) t.query_offsets = query_offsets.data();
    if (p.key_layout == KeyLayout::kPacked) t.key_offsets = key_offsets.data();
    if (p.has_key_lengths) t.key_lengths = key_lengths.data();
    if (p.key_layout == KeyLayout::kPaged) t.page_table = page_table.data();
    if (p.has_page_offsets) t.page_offsets = page_offsets.data();
    return t;
  }
  AttentionArgs args() const { return attention_args(p, tensors()); }
};

class Draw {
 public:
  explicit Draw(uint64_t seed) : random_(seed) {}

  int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  Drawn problem() {
    Drawn d;
    Problem& p = d.p;
    p.device = Device::kCuda;
    p.dtype_q = p.dtype_kv = Dtype::kBf16;
    p.batch = between(1, 9);
    p.heads_kv = between(1, 3);
    p.heads_q = p.heads_kv * between(1, 5);
    p.len_q = between(1, 60);
    p.len_k = between(0, 90);
    p.dim_qk = p.dim_v = 8;
    p.causal = static_cast<Causal>(between(0, 2));
    if (between(0, 3) > 0) p.query_layout = QueryLayout::kPacked;
    p.key_layout = static_cast<KeyLayout>(between(0, 2));
    p.has_key_lengths = p.key_layout == KeyLayout::kPaged || between(0, 1) == 0;
    d.query_offsets = offsets(p.batch, p.len_q);
    d.key_offsets = offsets(p.batch, p.len_k);
    const bool is_paged = p.key_layout == KeyLayout::kPaged;
    if (p.query_layout == QueryLayout::kPacked) p.total_q = d.query_offsets.back() + between(0, 5);
    if (p.key_layout == KeyLayout::kPacked) p.total_k = d.key_offsets.back() + between(0, 5);
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t most =
          p.key_layout == KeyLayout::kPacked
              ? d.key_offsets[static_cast<size_t>(b) + 1] - d.key_offsets[static_cast<size_t>(b)]
              : p.len_k;
      d.key_lengths.push_back(static_cast<int32_t>(between(0, most)));
    }
    if (is_paged) pages(d);
    set_dense(p);
    return d;
  }

 private:
  std::vector<int32_t> offsets(int64_t batch, int64_t most) {
    std::vector<int32_t> all{0};
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t length = between(0, 2) == 0 ? 0 : between(0, 3) == 0 ? most : between(0, 2);
      all.push_back(all.back() + static_cast<int32_t>(std::min(length, most)));
    }
    return all;
  }
  void pages(Drawn& d) {
    Problem& p = d.p;
    p.page_size = between(1, 20);
    p.pages = between(1, 40);
    p.has_page_offsets = between(0, 1) == 0;
    d.page_offsets = {0};
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t i = 0; i < p.pages_a_sequence(); ++i) {
        d.page_table.push_back(static_cast<int32_t>(between(0, p.pages - 1)));
      }
      d.page_offsets.push_back(static_cast<int32_t>(d.page_table.size()));
    }
    p.page_entries = p.has_page_offsets ? static_cast<int64_t>(d.page_table.size()) : 0;
  }

  std::mt19937_64 random_;
};

PackedItem item_at(const AttentionArgs& args, const PackedRows& packed, int64_t index) {
  return {args, packed, static_cast<int32_t>(index), kTileQ, kTileK};
}

TEST(CudaLayouts, BlocksTakeEveryRowOnceAndItsKeysOnce) {
  Draw draw(1);
  int with_slots = 0;
  for (int round = 0; round < 500; ++round) {
    const Drawn d = draw.problem();
    const AttentionArgs args = d.args();
    Config config;
    config.tile_q = kTileQ;
    config.splits = static_cast<int32_t>(draw.between(1, 3));
    const PackedShape shape(d.p, config);
    with_slots += shape.has_slots ? 1 : 0;
    const PackedRows packed(d.p, shape);
    std::map<std::pair<int64_t, int32_t>, int> rows;  // and split
    std::map<int64_t, int32_t> tiles_of_row;
    for (int64_t i = 0; i < shape.blocks; ++i) {
      const PackedItem item = item_at(args, packed, i);
      for (int32_t r = 0; r < item.rows; ++r) {
        const PackedRow at(args, packed, item, r);
        ++rows[{at.index(args, item), item.split}];
        tiles_of_row[at.index(args, item)] += item.tile_end - item.tile_begin;
      }
    }
    size_t want_rows = 0;
    const Tensors t = d.tensors();
    for (int64_t b = 0; b < d.p.batch; ++b) {
      const wh::Sequence sequence = wh::sequence_at(d.p, t, b);
      for (int64_t head = 0; head < d.p.heads_q; ++head) {
        for (int64_t query = 0; query < sequence.len_q; ++query) {
          const int64_t row = row_index(d.p.query_layout, d.p.heads_q, d.p.len_q,
                                        sequence.query_batch, head, sequence.first_query + query);
          for (int32_t split = 0; split < config.splits; ++split) {
            ASSERT_EQ((rows[{row, split}]), 1) << describe(d.p) << ", row " << row;
            ++want_rows;
          }
          const int64_t keys = visible_keys(d.p, sequence, query).size();
          ASSERT_GE(tiles_of_row[row] * kTileK, keys) << describe(d.p);
        }
      }
    }
    ASSERT_EQ(rows.size(), want_rows) << "rows that are no sequence's: " << describe(d.p);
  }
  EXPECT_GT(with_slots, 50);
}

TEST(CudaLayouts, AnItemKnowsItsSequenceAsTheContractDoes) {
  Draw draw(2);
  for (int round = 0; round < 500; ++round) {
    const Drawn d = draw.problem();
    const AttentionArgs args = d.args();
    Config config;
    config.tile_q = kTileQ;
    const PackedShape shape(d.p, config);
    const PackedRows packed(d.p, shape);
    const Tensors t = d.tensors();
    for (int64_t i = 0; i < shape.blocks; ++i) {
      const PackedItem item = item_at(args, packed, i);
      if (item.rows <= 0) continue;
      const wh::Sequence want = wh::sequence_at(d.p, t, item.sequence.batch_idx);
      ASSERT_EQ(item.sequence.len_q, want.len_q);
      ASSERT_EQ(item.sequence.present.begin, want.present.begin);
      ASSERT_EQ(item.sequence.present.end, want.present.end);
      const wh::KeyRows rows = key_rows(d.p, t, want);
      const KeyRows have = item.key_rows(args);
      for (int64_t key = want.present.begin; key < want.present.end; ++key) {
        const auto k = static_cast<int32_t>(key);
        ASSERT_EQ(have.offset(d.p.stride_k[0], d.p.stride_k[2], k),
                  rows.offset(d.p.stride_k[0], d.p.stride_k[2], key))
            << describe(d.p) << ", key " << key;
        ASSERT_EQ(have.run(k, item.sequence.present.end), rows.run(key, want.present.end));
      }
      const PackedRow at(args, packed, item, item.rows - 1);
      const int64_t query = want.first_query + at.query;
      ASSERT_EQ(at.offset(d.p.stride_out.data(), item), want.query_batch * d.p.stride_out[0] +
                                                            at.head * d.p.stride_out[1] +
                                                            query * d.p.stride_out[2]);
    }
  }
}

// Nobody has looked at them: what they say must not lead outside of out, of log_sum_exp and of the
// partial rows.
TEST(CudaLayouts, BadOffsetsStayWithinTheMaxima) {
  Draw draw(3);
  for (int round = 0; round < 500; ++round) {
    Drawn d = draw.problem();
    if (d.p.query_layout != QueryLayout::kPacked) continue;
    for (int32_t& offset : d.query_offsets) {
      if (draw.between(0, 2) > 0) continue;
      offset =
          static_cast<int32_t>(draw.between(0, 1) == 0 ? draw.between(-100, 200)
                                                       : draw.between(-kMaxLength, kMaxLength));
    }
    const AttentionArgs args = d.args();
    Config config;
    config.tile_q = kTileQ;
    config.splits = 2;
    const PackedShape shape(d.p, config);
    const PackedRows packed(d.p, shape);
    const Partials partials = Partials::at(nullptr, d.p, config.splits);
    for (int64_t i = 0; i < shape.blocks; ++i) {
      const PackedItem item = item_at(args, packed, i);
      ASSERT_LE(item.rows, kTileQ);
      for (int32_t r = 0; r < item.rows; ++r) {
        const PackedRow at(args, packed, item, r);
        ASSERT_GE(at.index(args, item), 0);
        ASSERT_LT(at.index(args, item), partials.rows);
        const int64_t token = item.sequence.first_query + at.query;
        ASSERT_GE(token, 0);
        ASSERT_LT(token, d.p.total_q);
        ASSERT_LT(at.head, d.p.heads_q);
      }
    }
  }
}

TEST(CudaLayouts, SlotsHoldEveryTileOfEveryHeadOnce) {
  Draw draw(4);
  int with_slots = 0;
  for (int round = 0; round < 500; ++round) {
    const Drawn d = draw.problem();
    const AttentionArgs args = d.args();
    const TileOrder order = tile_order(d.p, kTileQ, 1);
    with_slots += order.has_slots ? 1 : 0;
    std::set<std::tuple<int32_t, int32_t, int32_t>> seen;
    for (int32_t i = 0; i < order.tiles; ++i) {
      const QueryTile tile = query_tile(order, args, i);
      ASSERT_LT(tile.batch_idx, d.p.batch);
      if (tile.first_query >= sequence_at(args, tile.batch_idx).len_q) continue;
      ASSERT_TRUE(seen.insert({tile.batch_idx, tile.first_head, tile.first_query}).second);
    }
    size_t want = 0;
    for (int32_t b = 0; b < d.p.batch; ++b) {
      const int32_t len_q = sequence_at(args, b).len_q;
      const int32_t tiles = (len_q + order.tile_queries - 1) / order.tile_queries;
      want += static_cast<size_t>(tiles * d.p.heads_q / order.packed_heads);
    }
    ASSERT_EQ(seen.size(), want) << describe(d.p);
  }
  EXPECT_GT(with_slots, 50);
}

// One prompt among single tokens.
TEST(CudaLayouts, AMixedBatchHasAsManyBlocksAsItsTilesAndOneMoreASequence) {
  Problem p;
  p.batch = 64;
  p.heads_q = 32;
  p.heads_kv = 8;
  p.len_q = 2048;
  p.query_layout = QueryLayout::kPacked;
  p.total_q = 2048 + 63;
  Config config;
  config.tile_q = 128;
  EXPECT_EQ(PackedShape(p, config).items, 8 * (2111 * 4 / 128 + 64));
  // One token each: a tile a sequence.
  p.len_q = 1;
  p.total_q = 64;
  EXPECT_EQ(PackedShape(p, config).items, 8 * 64);
}

}  // namespace
}  // namespace wh::cuda
