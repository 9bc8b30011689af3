// sm90_prefill_wide: many queries, heads up to 576 wide with values up to 512, on Hopper.
//
// Schedule. A block owns 64 query rows; 64 x 512 sums are more than one warpgroup's registers, so
// two share them. The left one computes S = Q K^T, softmax and O[:, :256] += P V with P in
// registers, and hands P and the row factors over in shared memory; the right one computes
// O[:, 256:] += P V. No product is done twice. The left order is S(n), values of n + 1, softmax(n).
//
// Two blocks of a cluster work on the same keys for neighbouring rows or heads; each loads half of
// every K and V tile and multicasts it: 128 flops a byte out of L2, which 64 rows alone would not
// have. Copies go through two rings of 16 KB slots, one for each warpgroup, in the order in which
// it reads them: K as 64 keys x 128 columns, V as 32 keys x 256 columns. A slot is released as soon
// as the products that read it are done.
//
// Codes (sm90_prefill_wide_codes): no cluster. Seven warps widen slots of 8 KB that TMA fills into
// the two rings, and clean V; consumers are the same. Scales of tokens are multiplied into scores
// and weights, others folded into the exponent (K) and the stored rows (V). Codes in and out and
// widened ones in are 2,048 clocks of the port a tile, where elements are 1,024.
//
// Roofline: tensor cores, 4096 flops a clock and SM; but for 64 rows a tile of 64 keys also takes
// 2,750 clocks of the 128-byte port of shared memory against 2,048 of products (copies in 1,024,
// Q K^T 1,024, P V 580, P 128), so the bound is 74 % of the tensor rate.
#pragma once

#include "cuda/sm90/prefill_wide/consumers.cuh"

namespace wh::cuda {

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
__global__ void __launch_bounds__(wide_tile({kDimQk, kDimV}, kScores, kLayouts).threads(), 1)
    sm90_prefill_wide(const __grid_constant__ PrefillMaps maps,
                      const __grid_constant__ AttentionArgs args,
                      const __grid_constant__ TileOrder order) {
  using Block = WideBlock<kDimQk, kDimV, kDtype, kScores, kLayouts>;
  constexpr WideTile kTile = Block::kTile;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  const Block block{
      maps, args, order, s_memory, ptx::shared_address(s_memory), ptx::cluster_rank()};
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  ptx::cluster_sync();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    ptx::registers_give<kTile.producer_registers>();
    if (threadIdx.x < Block::Producer::kThreads) {
      block.produce();
    } else if (threadIdx.x >= 32) {
      block.clean();
    }
  } else if (warpgroup == 1) {
    ptx::registers_take<kTile.left_registers>();
    WideLeft<Block> left(block);
    left.run();
  } else {
    ptx::registers_take<kTile.right_registers>();
    WideRight<Block> right(block);
    right.run();
  }
  ptx::cluster_sync();  // no block leaves while the other may still write into it
}

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
__global__ void __launch_bounds__(wide_code_tile({kDimQk, kDimV}, kScores, kLayouts).threads(), 1)
    sm90_prefill_wide_codes(const __grid_constant__ PrefillMaps maps,
                            const __grid_constant__ AttentionArgs args,
                            const __grid_constant__ TileOrder order,
                            const __grid_constant__ StoredTensors stored) {
  using Block = WideCodeBlock<kDimQk, kDimV, kDtype, kScores, kLayouts>;
  constexpr WideTile kTile = Block::kTile;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  const Block block{maps, args, order, s_memory, ptx::shared_address(s_memory), stored};
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup < kTile.supply_warpgroups) {
    ptx::registers_give<kTile.producer_registers>();
    if (threadIdx.x < Block::Producer::kThreads) {
      block.produce();
    } else if (threadIdx.x >= 32) {
      typename Block::Widener(block).run();
    }
  } else if (warpgroup == kTile.supply_warpgroups) {
    ptx::registers_take<kTile.left_registers>();
    WideLeft<Block> left(block);
    left.run();
  } else {
    ptx::registers_take<kTile.right_registers>();
    WideRight<Block> right(block);
    right.run();
  }
}

template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* wide_instance() {
  return reinterpret_cast<const void*>(
      &sm90_prefill_wide<kDimQk, kDimV, kDtype, kScores, kLayouts>);
}
template <int kDimQk, int kDimV, Dtype kDtype, Scores kScores, Layouts kLayouts>
const void* wide_code_instance() {
  return reinterpret_cast<const void*>(
      &sm90_prefill_wide_codes<kDimQk, kDimV, kDtype, kScores, kLayouts>);
}

}  // namespace wh::cuda
