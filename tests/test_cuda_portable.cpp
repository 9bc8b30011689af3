// Tiles, variants and splits of cuda_portable, checked without a GPU.
#include <gtest/gtest.h>

#include <cmath>

#include "cuda/common/packed_rows.h"
#include "cuda/portable/config.h"
#include "cuda/portable/kernel.h"

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

}  // namespace
}  // namespace wh::cuda
