// Tiles, variants and splits of cuda_portable, checked without a GPU.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "cuda/common/packed_rows.h"
#include "cuda/portable/config.h"
#include "cuda/portable/kernel.h"
#include "cuda/portable/load.h"

namespace wh::cuda {
namespace {

struct Planned {
  Limits limits;
  CpuFacts cpu;
  CudaFacts cuda;

  explicit Planned(int32_t compute_capability, int64_t shared_bytes) {
    cuda.name = "a card";
    cuda.compute_capability = compute_capability;
    cuda.sms = 100;
    cuda.shared_bytes = shared_bytes;
    cuda.tensor_tflops = 300;
    cuda.read_gbytes_per_s = 1000;
  }
  Query query(const Problem& p) const { return {p, limits, cpu, cuda}; }
};
const Planned kAmpere(80, 166912), kAda(89, 101376), kHopper(90, 232448);

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
  p.stride_q = dense_strides(8, len_q, dim_qk);
  p.stride_k = dense_strides(2, len_k, dim_qk);
  p.stride_v = dense_strides(2, len_k, dim_v);
  p.stride_out = dense_strides(8, len_q, dim_v);
  p.scale = 1 / std::sqrt(static_cast<float>(dim_qk));
  return p;
}

TEST(CudaPortable, HasATileForEveryDimensionTypeAndCard) {
  for (const Planned* planned : {&kAmpere, &kAda, &kHopper}) {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
      for (int64_t dim_qk = 1; dim_qk <= 1024; dim_qk += dim_qk < 8 ? 1 : 37) {
        for (const int64_t dim_v : {int64_t{1}, dim_qk, int64_t{1024}}) {
          const Problem p = problem(300, 300, dim_qk, dim_v, dtype);
          ASSERT_FALSE(kPortable.refusal(planned->query(p)).has_value())
              << *kPortable.refusal(planned->query(p));
          const Config config = kPortable.configure(planned->query(p));
          const PortableVariant* variant = portable_variant(p, config);
          ASSERT_NE(variant, nullptr) << dim_qk << "/" << dim_v;
          EXPECT_LE(variant->tile.bytes, planned->cuda.shared_bytes);
          EXPECT_GE(variant->dims.dim_qk, dim_qk);
          EXPECT_GE(variant->dims.dim_v, dim_v);
          EXPECT_NE(variant->instance(), nullptr);
        }
      }
    }
  }
}

TEST(CudaPortable, TilesAreWholeProductsOfAtMostEightWarps) {
  for (const HeadDims dims : kPortableDims) {
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
            static_cast<size_t>(splits * 8 * (128 + 1) * 4));
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
  for (const bool is_scattered : {false, true}) {
    std::vector<float> tile(kRows * kColumns, -1);
    std::vector<int> writes(tile.size());
    const Filled filled{kColumns, &tile, &writes};
    for (int thread = 0; thread < kThreads; ++thread) {
      if (is_scattered) {
        portable::load_scattered<kRows, kColumns, kThreads>(
            thread, rows, [](int row) { return int64_t{row} * kStride; }, filled);
      } else {
        portable::load_rows<kRows, kColumns, kThreads>(thread, rows, filled);
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

TEST(CudaPortable, LoadersFillEveryElementOnceAndReadOnlyWhatExists) {
  for (const bool is_whole : {true, false}) {
    for (const auto [begin, end] : {std::pair{0, 16}, {3, 11}, {0, 0}, {15, 16}}) {
      check_loaders<16, 64, 128>(64, begin, end, is_whole);
      check_loaders<16, 64, 128>(40, begin, end, is_whole);
      check_loaders<16, 192, 128>(192, begin, end, is_whole);  // 48 chunks: columns change
      check_loaders<16, 576, 256>(572, begin, end, is_whole);
      check_loaders<16, 1024, 128>(1000, begin, end, is_whole);  // more chunks than threads
      check_loaders<16, 512, 256>(512, begin, end, is_whole);
    }
  }
}

}  // namespace
}  // namespace wh::cuda
