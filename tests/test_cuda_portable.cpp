// Tiles, variants and splits of cuda_portable, checked without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "cuda/common/packed_rows.h"
#include "cuda/cuda_facts.h"
#include "cuda/instances.h"
#include "cuda/portable/config.h"
#include "cuda/portable/kernel.h"
#include "cuda/portable/load.h"
#include "cuda/portable/whole_rows.h"
#include "support/cards.h"

namespace wh::cuda {
namespace {

struct Planned {
  Limits limits;
  CudaFacts cuda;

  Query query(const Problem& p) const { return {p, limits, cuda}; }
};
const Planned kAmpere{{}, ampere()}, kAda{{}, ada()}, kHopper{{}, card(90, 232448)};

Problem problem(int64_t len_q, int64_t len_k, int64_t dim_qk, int64_t dim_v,
                Dtype dtype = Dtype::kBf16) {
  Problem p;
  p.device = Device::kCuda;
  p.dtype_q = p.dtype_kv = dtype;
  p.batch = 1;
  p.heads_q = 8;
  p.heads_kv = 2;
  p.len_q = len_q;
  p.len_k = len_k;
  p.dim_qk = dim_qk;
  p.dim_v = dim_v;
  set_dense(p);
  return p;
}

TEST(CudaPortable, HasATileForEveryDimensionTypeAndCard) {
  for (const Planned* planned : {&kAmpere, &kAda, &kHopper}) {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
      for (int64_t dim_qk = 1; dim_qk <= 1024; dim_qk += dim_qk < 8 ? 1 : 37) {
        for (const int64_t dim_v : {int64_t{1}, dim_qk, int64_t{1024}}) {
          for (const int64_t len_q : {1, 300}) {
            const Problem p = problem(len_q, 300, dim_qk, dim_v, dtype);
            ASSERT_FALSE(kPortable.refusal(planned->query(p)).has_value())
                << *kPortable.refusal(planned->query(p));
            const Config config = kPortable.configure(planned->query(p));
            const PortableVariant* variant =
                portable_variant(p, config, planned->cuda.shared_bytes);
            ASSERT_NE(variant, nullptr) << dim_qk << "/" << dim_v;
            EXPECT_LE(variant->shared_bytes, planned->cuda.shared_bytes);
            EXPECT_GE(variant->instance.dims.dim_qk, dim_qk);
            EXPECT_GE(variant->instance.dims.dim_v, dim_v);
            EXPECT_EQ(variant->function != nullptr, variant->instance.is_compiled);
          }
        }
      }
    }
  }
}

// 64 keys of f32 128/128 would take 103,536 bytes: 2 KB more than 8.6, 8.9 and 12.0 have.
TEST(CudaPortable, F32OfDims65To128DoesNotRunInAWiderTileOnSmallCards) {
  for (const int64_t dim : {65, 80, 128}) {
    const Problem p = problem(300, 300, dim, dim, Dtype::kF32);
    for (const auto& [planned, keys] : {std::pair{&kAda, 32}, {&kAmpere, 64}, {&kHopper, 64}}) {
      const Config config = kPortable.configure(planned->query(p));
      const PortableVariant* variant = portable_variant(p, config, planned->cuda.shared_bytes);
      ASSERT_NE(variant, nullptr);
      EXPECT_EQ(variant->instance.dims.dim_qk, 128);
      EXPECT_EQ(variant->rows, 64);
      EXPECT_EQ(variant->keys, keys);
    }
  }
  EXPECT_EQ(portable_tile({128, 128}, 4, SharedMemory::kSmall).bytes, 69'232);
  EXPECT_EQ(portable_tile({128, 128}, 4, SharedMemory::kLarge).bytes, 103'536);
}

TEST(CudaPortable, AVariantFitsTheCardThatItIsAskedFor) {
  const Problem p = problem(300, 300, 128, 128, Dtype::kF32);
  const Config config = kPortable.configure(kAmpere.query(p));
  EXPECT_NE(portable_variant(p, config, kAmpere.cuda.shared_bytes), nullptr);
  EXPECT_EQ(portable_variant(p, config, kAda.cuda.shared_bytes), nullptr);
}

TEST(CudaPortable, FewRowsOfF32RunOnTheCudaCores) {
  const auto variant_of = [](const Problem& p) {
    return *portable_variant(p, kPortable.configure(kHopper.query(p)), kHopper.cuda.shared_bytes);
  };
  // Four heads share a kv head.
  for (const auto& [len_q, dim_qk, dim_v, rows, dim] :
       {std::array{1, 64, 64, 4, 64}, {2, 65, 32, 8, 128}, {1, 192, 128, 4, 256}}) {
    const PortableVariant variant = variant_of(problem(len_q, 5000, dim_qk, dim_v, Dtype::kF32));
    EXPECT_EQ(variant.cores, Cores::kCuda);
    EXPECT_EQ(variant.rows, rows);
    EXPECT_EQ(variant.instance.dims.dim_qk, dim);
  }
  EXPECT_EQ(variant_of(problem(3, 5000, 64, 64, Dtype::kF32)).cores, Cores::kTensor);
  EXPECT_EQ(variant_of(problem(1, 5000, 64, 257, Dtype::kF32)).cores, Cores::kTensor);
  EXPECT_EQ(variant_of(problem(1, 5000, 64, 64, Dtype::kBf16)).cores, Cores::kTensor);
  const Problem p = problem(1, 5000, 128, 128, Dtype::kF32);
  EXPECT_EQ(kPortable.variant(kHopper.query(p), kPortable.configure(kHopper.query(p))),
            "f32 CUDA cores, 128/128");
}

TEST(CudaPortable, CodesBesideElementsRunOnTheCudaCoresWhateverTheQueriesAre) {
  for (const Planned* planned : {&kAmpere, &kAda, &kHopper}) {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
      for (const Quantised format :
           {Quantised::kE4m3, Quantised::kInt8, Quantised::kQ8_0, Quantised::kQ4_0}) {
        for (const auto& [len_q, rows] : {std::pair{1, 4}, {2, 8}, {300, 8}}) {
          Problem p = problem(len_q, 5000, 160, 128, dtype);
          p.quantised_k = format;  // V stays elements
          const Query query = planned->query(p);
          ASSERT_FALSE(kPortable.refusal(query).has_value()) << *kPortable.refusal(query);
          const Config config = kPortable.configure(query);
          const PortableVariant* variant = portable_variant(p, config, planned->cuda.shared_bytes);
          ASSERT_NE(variant, nullptr);
          EXPECT_TRUE(variant->reads_codes);
          EXPECT_EQ(variant->cores, Cores::kCuda);
          EXPECT_EQ(variant->rows, rows);
          EXPECT_EQ(kPortable.variant(query, config),
                    "f32 CUDA cores, 256/256, codes widened as they are read");
          // A plan over elements names a variant that takes no codes.
          Problem elements = p;
          elements.quantised_k = Quantised::kNone;
          EXPECT_EQ(portable_variant(elements, config, planned->cuda.shared_bytes), nullptr);
        }
      }
    }
  }
  Problem wide = problem(1, 5000, 320, 256, Dtype::kF32);
  wide.quantised_k = wide.quantised_v = Quantised::kInt8;
  EXPECT_EQ(kPortable.refusal(kHopper.query(wide)),
            "reads codes of heads up to 256/256 wide in f32, these are 320/256");
}

TEST(CudaPortable, CodesRunOnTensorCoresWhereQueriesHave16Bits) {
  for (const Planned* planned : {&kAmpere, &kAda, &kHopper}) {
    for (const Quantised format :
         {Quantised::kE4m3, Quantised::kInt8, Quantised::kQ8_0, Quantised::kQ4_0}) {
      for (const auto& [len_q, dim, rows] :
           {std::tuple{1, 128, 16}, {300, 64, 128}, {300, 160, 64}, {1, 512, 16}, {9, 576, 64}}) {
        Problem p = problem(len_q, 5000, dim, std::min(dim, 512), Dtype::kBf16);
        p.quantised_k = format;
        p.quantised_v = Quantised::kE4m3;
        const Query query = planned->query(p);
        ASSERT_FALSE(kPortable.refusal(query).has_value()) << *kPortable.refusal(query);
        const Config config = kPortable.configure(query);
        const PortableVariant* variant = portable_variant(p, config, planned->cuda.shared_bytes);
        ASSERT_NE(variant, nullptr);
        EXPECT_TRUE(variant->reads_code_tiles());
        // 64 rows of 576 columns leave no room for two tiles in 99 KB.
        const bool is_cut = planned == &kAda && dim == 576;
        EXPECT_EQ(variant->rows, is_cut ? 16 : rows) << dim;
        EXPECT_EQ(config.tile_k, variant->code_tile().keys());
        const CodeLayout layout = code_layout(p, variant->code_tile(), planned->cuda.shared_bytes);
        EXPECT_GE(layout.stages, 2);
        EXPECT_LE(layout.bytes, planned->cuda.shared_bytes);
        EXPECT_EQ(layout.pitch_k / 16 % 2, 1);
        EXPECT_NE(kPortable.variant(query, config).find("bf16 mma.sync"), std::string::npos);
        const Limits high{.precision = Precision::kHigh};
        const Query precise{p, high, query.facts, query.correction};
        EXPECT_EQ(kPortable.refusal(precise).has_value(), dim > 256);
      }
    }
  }
  // Queries that one bf16 does not hold take two or three, and blocks of fewer rows where there is
  // no room for them.
  Problem p = problem(300, 5000, 256, 256, Dtype::kF16);
  p.quantised_k = p.quantised_v = Quantised::kInt8;
  EXPECT_EQ(code_layout(p, {256, 64}, kHopper.cuda.shared_bytes).parts, 2);
  p.scales_k = Scales::kChannel;
  EXPECT_EQ(code_layout(p, {256, 64}, kHopper.cuda.shared_bytes).parts, 3);
  EXPECT_EQ(kPortable.configure(kHopper.query(p)).tile_q, 64);
  EXPECT_EQ(kPortable.configure(kAda.query(p)).tile_q, 16);
  p = problem(1, 5000, 577, 512, Dtype::kBf16);
  p.quantised_k = p.quantised_v = Quantised::kInt8;
  EXPECT_EQ(kPortable.refusal(kHopper.query(p)),
            "reads codes of heads up to 576/512 wide in 16 bits, these are 577/512");
}

// One query over codes of token-head scales, or blocks.
Problem decode_over(Quantised format, Dtype dtype, int64_t heads_q, int64_t heads_kv, int64_t dim,
                    int64_t len_k) {
  Problem p = problem(1, len_k, dim, dim, dtype);
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.quantised_k = p.quantised_v = format;
  if (!is_block_format(format)) p.scales_k = p.scales_v = Scales::kTokenHead;
  set_dense(p);
  return p;
}

TEST(CudaPortable, EstimatesOfDecodeOverCodesAreNearWhatAnH200Took) {
  const Planned planned{{}, h200()};
  const auto us = [&](const Problem& p, int32_t splits) {
    Config config = kPortable.configure(planned.query(p));
    config.splits = splits;  // as it ran
    return kPortable.estimate_us(planned.query(p), config);
  };
  const Problem short_bf16 = decode_over(Quantised::kE4m3, Dtype::kBf16, 32, 8, 128, 2048);
  EXPECT_NEAR(us(short_bf16, 32) / 12.2, 1, 0.15);
  const Problem wide = decode_over(Quantised::kE4m3, Dtype::kBf16, 16, 1, 512, 65536);
  EXPECT_NEAR(us(wide, 158) / 184, 1, 0.15);
  const Problem f32 = decode_over(Quantised::kE4m3, Dtype::kF32, 32, 8, 128, 65536);
  EXPECT_NEAR(us(f32, 50) / 564, 1, 0.25);
  const Problem f32_blocks = decode_over(Quantised::kQ8_0, Dtype::kF32, 32, 8, 128, 65536);
  EXPECT_NEAR(us(f32_blocks, 50) / 433, 1, 0.25);
}

// A few blocks more than there is room for would take as long as all others.
TEST(CudaPortable, SharesOfCodesFillTheCardOnce) {
  const Planned planned{{}, h200()};
  const auto blocks = [&](const Problem& p) {
    return kPortable.configure(planned.query(p)).splits * p.heads_kv;
  };
  // An SM has shared memory for one block of 512 columns, and for two of 128.
  const int64_t wide = blocks(decode_over(Quantised::kE4m3, Dtype::kBf16, 16, 1, 512, 65536));
  EXPECT_LE(wide, 132);
  EXPECT_GT(wide, 0.9 * 132);
  const int64_t narrow = blocks(decode_over(Quantised::kE4m3, Dtype::kBf16, 32, 8, 128, 65536));
  EXPECT_LE(narrow, 2 * 132);
  EXPECT_GT(narrow, 0.9 * 2 * 132);
}

TEST(CudaPortable, SoftcapAndArrayMasksCostTime) {
  for (const Dtype dtype : {Dtype::kBf16, Dtype::kF32}) {
    const auto us = [&](const Problem& p) {
      return kPortable.estimate_us(kHopper.query(p), kPortable.configure(kHopper.query(p)));
    };
    Problem p = problem(4096, 4096, 128, 128, dtype);
    const double plain = us(p);
    p.softcap = 30;
    const double capped = us(p);
    p.mask = MaskKind::kBoolean;
    const double masked = us(p);
    EXPECT_GT(capped, plain);
    EXPECT_GT(masked, capped);
    // Beside f32's slower products the same scores weigh less.
    EXPECT_LT(masked, (dtype == Dtype::kF32 ? 1.3 : 2.6) * plain);
  }
}

TEST(CudaPortable, TilesAreWholeProductsOfAtMostEightWarps) {
  for (const Instance& instance : kPortableInstances) {
    const HeadDims dims = instance.dims;
    for (const int bytes : {2, 4}) {
      for (const SharedMemory memory : {SharedMemory::kSmall, SharedMemory::kLarge}) {
        const PortableTile tile = portable_tile(dims, bytes, memory);
        EXPECT_LE(tile.bytes, static_cast<int>(memory));
        EXPECT_LE(tile.warps(), 8);
        EXPECT_EQ(tile.rows % tile.warp_rows, 0);
        EXPECT_EQ(tile.keys % (bytes == 2 ? 16 : 8), 0);
        EXPECT_EQ(dims.dim_v % tile.column_groups, 0);
        // Every key's scores are computed by one column group.
        EXPECT_EQ(tile.keys % (8 * tile.slice_tiles()), 0);
        EXPECT_GE(tile.slice_tiles() * tile.column_groups * 8, tile.keys);
      }
    }
  }
}

TEST(CudaPortable, SplitsLongDecodesAndNeverTheWorkspaceOfFullGrids) {
  const Problem decode = problem(1, 100'000, 128, 128);
  const Config split = kPortable.configure(kAmpere.query(decode));
  const int64_t splits = PackedShape(decode, split).splits;
  EXPECT_GT(splits, 10);
  EXPECT_EQ(kPortable.workspace_bytes(decode, split),
            static_cast<size_t>(splits * 8 * (128 + 2) * 4));
  const Problem prefill = problem(8192, 8192, 128, 128);
  const Config whole = kPortable.configure(kAmpere.query(prefill));
  EXPECT_EQ(kPortable.workspace_bytes(prefill, whole), 0u);
}

TEST(CudaPortable, BatchInvariantSplitsIgnoreTheBatch) {
  Planned planned = kAmpere;
  planned.limits.batch_invariant = true;
  Problem alone = problem(1, 50'000, 256, 256), many = alone;
  many.batch = 16;
  EXPECT_EQ(PackedShape(alone, kPortable.configure(planned.query(alone))).splits,
            PackedShape(many, kPortable.configure(planned.query(many))).splits);
}

// Sequences of a packed batch over pages, of a pool with room for so many keys.
Problem served(int64_t batch, int64_t len_k, int64_t keys_in_pool) {
  Problem p = problem(1, len_k, 128, 128);
  p.batch = batch;
  p.query_layout = QueryLayout::kPacked;
  p.total_q = batch;
  p.key_layout = KeyLayout::kPaged;
  p.page_size = 16;
  p.pages = keys_in_pool / 16;
  p.has_key_lengths = true;
  set_dense(p);
  return p;
}

TEST(CudaPortable, SplitsTheLongestSequencesOfABatchThatFillsTheCard) {
  const auto splits = [](const Planned& planned, const Problem& p) {
    return kPortable.configure(planned.query(p)).splits;
  };
  // A pool with room for the most of every sequence says nothing of their lengths.
  EXPECT_EQ(splits(kHopper, served(256, 65'536, 256 * 65'536)), 1);
  EXPECT_GT(splits(kHopper, served(256, 65'536, 8 * 65'536)), 4);
  Planned invariant = kHopper;
  invariant.limits.batch_invariant = true;
  const int64_t alone = splits(invariant, served(1, 65'536, 65'536));
  EXPECT_EQ(splits(invariant, served(256, 65'536, 8 * 65'536)), alone);
}

TEST(CudaPortable, RefusesWhatItWouldRound) {
  Planned planned = kAmpere;
  planned.limits.precision = Precision::kHigh;
  EXPECT_NE(kPortable.refusal(planned.query(problem(8, 8, 64, 64)))->find("precision high"),
            std::string::npos);
  EXPECT_FALSE(kPortable.refusal(planned.query(problem(8, 8, 64, 64, Dtype::kF32))).has_value());
  Problem mixed = problem(8, 8, 64, 64, Dtype::kF32);
  mixed.dtype_kv = Dtype::kF16;
  EXPECT_TRUE(kPortable.refusal(kAmpere.query(mixed)).has_value());
}

// Shared memory as a loader leaves it; -1 where nothing was written.
struct Filled {
  int columns;
  std::vector<float>* tile;
  std::vector<int>* writes;
  void chunk(int row, int column, const float* from, int bytes) const {
    ASSERT_TRUE(bytes == 0 || bytes == 16);
    for (int i = 0; i < 4; ++i) element(row, column + i, bytes == 0 ? 0 : from[i]);
  }
  void element(int row, int column, float value) const {
    (*tile)[static_cast<size_t>(row * columns + column)] = value;
    ++(*writes)[static_cast<size_t>(row * columns + column)];
  }
};

// The same rows as pages of three, from the second row of a page on, which the pool has in another
// order. Entries of pages without a row that exists lead out of it.
struct InPages {
  static constexpr int kPage = 3, kFirstKey = 7 * kPage + 1;
  portable::TileRows<float> rows;
  int64_t stride_page;
  std::vector<int32_t> table;
  std::vector<float> pool;

  InPages(const portable::TileRows<float>& dense, int count)
      : rows(dense),
        stride_page(kPage * dense.stride + 8),
        table(static_cast<size_t>((kFirstKey + count) / kPage + 1), 1 << 28),
        pool(table.size() * static_cast<size_t>(stride_page), NAN) {
    for (int row = dense.begin; row < dense.end; ++row) {
      const int64_t key = kFirstKey + row, page = key / kPage;
      const int64_t in_pool = static_cast<int64_t>(table.size()) - 1 - page;
      table[static_cast<size_t>(page)] = static_cast<int32_t>(in_pool);
      std::copy_n(dense.first + row * dense.stride, dense.stride,
                  pool.begin() + in_pool * stride_page + key % kPage * dense.stride);
    }
    rows.first = pool.data();
  }
  KeyRows keys() const { return {table.data(), Divisor(kPage), 0, 0}; }
};

template <int kRows, int kColumns, int kThreads>
void check_loaders(int dim, int begin, int end, bool is_whole) {
  constexpr int kStride = kColumns + 12;
  // Rows that do not exist are NaN: reading one shows.
  std::vector<float> memory(kRows * kStride, NAN);
  for (int row = begin; row < end; ++row) {
    for (int column = 0; column < dim; ++column) {
      memory[static_cast<size_t>(row * kStride + column)] =
          static_cast<float>(1 + row * 2048 + column);
    }
  }
  const portable::TileRows<float> rows{memory.data(), kStride, 1, dim, begin, end, is_whole};
  const InPages paged(rows, kRows);
  enum class Loader { kSideBySide, kAnywhere, kInPages };
  for (const Loader loader : {Loader::kSideBySide, Loader::kAnywhere, Loader::kInPages}) {
    std::vector<float> tile(kRows * kColumns, -1);
    std::vector<int> writes(tile.size());
    const Filled filled{kColumns, &tile, &writes};
    for (int thread = 0; thread < kThreads; ++thread) {
      switch (loader) {
        case Loader::kSideBySide:
          portable::load_rows<kRows, kColumns, kThreads>(thread, rows, filled);
          break;
        case Loader::kAnywhere:
          portable::load_scattered<kRows, kColumns, kThreads>(
              thread, rows, [](int row) { return int64_t{row} * kStride; }, filled);
          break;
        case Loader::kInPages:
          portable::load_pages<kRows, kColumns, kThreads>(
              thread, paged.rows, paged.keys(), paged.stride_page, InPages::kFirstKey, filled);
          break;
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        const auto i = static_cast<size_t>(row * kColumns + column);
        const bool exists = row >= begin && row < end && column < dim;
        ASSERT_EQ(writes[i], 1) << row << ", " << column;
        ASSERT_EQ(tile[i], exists ? static_cast<float>(1 + row * 2048 + column) : 0.0f)
            << row << ", " << column;
      }
    }
  }
}

TEST(CudaPortable, PiecesNeedAlignedRowsEvenWhereThereIsOneAlone) {
  alignas(16) static const float memory[64] = {};
  EXPECT_TRUE(portable::is_whole(memory, {0, 0, 8, 1}, 8, Dtype::kF32, 16));
  // A cache of one key, whose length stride nobody multiplies with anything but 0, except the
  // loader, which goes on to rows that do not exist.
  EXPECT_FALSE(portable::is_whole(memory, {0, 0, 67, 1}, 8, Dtype::kF32, 16));
  EXPECT_FALSE(portable::is_whole(memory + 1, {0, 0, 8, 1}, 8, Dtype::kF32, 16));
  EXPECT_FALSE(portable::is_whole(memory, {0, 0, 8, 1}, 6, Dtype::kF32, 16));
  EXPECT_FALSE(portable::is_whole(memory, {0, 0, 8, 2}, 8, Dtype::kF32, 16));
  EXPECT_FALSE(portable::is_whole(memory, {0, 5, 8, 1}, 8, Dtype::kF32, 16));
  // Strides of heads, batches and rows that are one alone do not matter.
  Problem p;
  p.len_q = p.len_k = 1;
  p.dim_qk = p.dim_v = 8;
  p.stride_q = {3, 5, 67, 1};
  EXPECT_TRUE(portable::is_whole(memory, canonical(p).stride_q, 8, Dtype::kF32, 16));
}

// The addresses of copies, those of 0 bytes among them.
struct Addresses {
  bool* all_aligned;
  void chunk(int, int, const float* from, int) const {
    *all_aligned = *all_aligned && reinterpret_cast<uintptr_t>(from) % 16 == 0;
  }
  void element(int, int, float) const {}
};

TEST(CudaPortable, WholeRowsAreCopiedFromAlignedAddresses) {
  alignas(16) static const float memory[16 * 80] = {};
  for (const int64_t stride : {64, 68, 67, 66}) {
    const Strides strides{0, 0, stride, 1};
    const bool is_whole = portable::is_whole(memory, strides, 64, Dtype::kF32, 16);
    const portable::TileRows<float> rows{memory, stride, 1, 64, 0, 1, is_whole};
    bool all_aligned = true;
    for (int thread = 0; thread < 128; ++thread) {
      portable::load_rows<16, 64, 128>(thread, rows, Addresses{&all_aligned});
    }
    EXPECT_TRUE(all_aligned) << stride;
    EXPECT_EQ(is_whole, stride % 4 == 0);
  }
}

TEST(CudaPortable, LoadersFillEveryElementOnceAndReadOnlyWhatExists) {
  for (const bool is_whole : {true, false}) {
    for (const auto [begin, end] : {std::pair{0, 16}, {3, 11}, {0, 0}, {15, 16}}) {
      check_loaders<16, 64, 128>(64, begin, end, is_whole);
      check_loaders<16, 64, 128>(40, begin, end, is_whole);
      check_loaders<16, 192, 128>(192, begin, end, is_whole);  // 48 chunks: columns change
      check_loaders<16, 576, 256>(572, begin, end, is_whole);
      check_loaders<16, 1024, 128>(1000, begin, end, is_whole);  // more chunks than threads
      check_loaders<16, 512, 256>(512, begin, end, is_whole);
      check_loaders<8, 64, 256>(64, std::min(begin, 8), std::min(end, 8), is_whole);
    }
  }
}

}  // namespace
}  // namespace wh::cuda
