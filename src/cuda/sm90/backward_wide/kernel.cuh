// sm90_backward_wide: gradients on Hopper by TMA and wgmma, heads up to 512 wide, f16 and bf16.
//
//   p = 2^(s * log2(e) - shift)    ds = p * (d_out v^T - delta)
//   dv = p^T d_out    dq = scale * ds k    dk = scale * ds^T q
//
// Schedule. 64 rows of one gradient 512 wide fill the registers of two warpgroups, so a block sums
// one gradient of 64 rows of its own: three kernels, and no two blocks add to one number. Each
// consumer owns half of the columns. For dq and dk the left one makes the scores and weights, the
// right one d_out v^T and gradients of scores; weights go to the right in f32 and gradients come
// back rounded, through the same words of shared memory: a thread's are its namesake's, who writes
// only what it has read, and both are in the order of accumulators, which is that of operands. The
// left is a tile ahead: it makes scores while the right differentiates. For dv the left one makes
// weights for both, while the last tile's are multiplied.
//
// Two blocks of a cluster own neighbouring rows and meet the same rows of the other side, which
// come as panels of 64 rows and 64 columns, 8 KB: each block asks for every second one and
// multicasts it. Each consumer has a ring of its own and a thread that fills it, in the order in
// which it multiplies; what is summed comes a second time, as shared memory does not hold a tile
// beside the block's own rows.
//
// Roofline: tensor cores, 4096 flops a clock and SM; 2 * (5 * dim_qk + 3 * dim_v) flops a pair,
// eight products where five are the least: dk and dv of 64 keys together would be 1024 columns,
// which fill all registers of an SM. But 64 rows beside 64 take shared memory's port, 128 bytes a
// clock, longer than products: 4,480 clocks against 3,072 for dq and dk (first two products 2,048,
// copies 1,536, sums 512, exchange 384), 2,688 against 2,048 for dv: 1,800 of 4,096 flops a clock,
// counted as five products. L2 gives 21 bytes a clock and SM at that rate, 5 TB/s.
#pragma once

#include "cuda/ptx/sync.cuh"
#include "cuda/sm90/backward_wide/block.cuh"
#include "cuda/sm90/backward_wide/consumers.cuh"
#include "cuda/sm90/backward_wide/producers.cuh"

namespace wh::cuda {

template <Gradient kOf, int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
__global__ void __launch_bounds__(kGradientThreads, 1)
    sm90_backward_wide(const __grid_constant__ GradientMaps maps,
                       const __grid_constant__ GradientBlockArgs args) {
  using Block = WideGradientBlock<kOf, kDimQk, kDimV, kDtype, kScores>;
  extern __shared__ __align__(1024) unsigned char s_memory[];
  auto* item = reinterpret_cast<BackwardItem*>(s_memory + Block::kMemory.item_offset);
  const Block block{
      maps, args, *item, s_memory, ptx::shared_address(s_memory), ptx::cluster_rank()};
  if (threadIdx.x == 0) {
    // The cluster's: its blocks meet the same tiles, and a tile is full where it is for both.
    *item = BackwardItem(args.gradients, side_of(kOf), args.tiles,
                         args.first_item + static_cast<int32_t>(blockIdx.x) / kWideGradientCluster,
                         kWideGradientRows, Block::kColumns);
    item->first += static_cast<int32_t>(block.rank) * Block::kRows;
    block.init_barriers();
  }
  __syncthreads();
  if (item->rows <= 0) return;  // of the cluster: both blocks
  ptx::cluster_sync();
  // Shuffled, so that the compiler knows it to be the same for the warp.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::registers_give<kGradientProducerRegisters>();
    if (threadIdx.x == 0) {
      feed_left(block);
    } else if (threadIdx.x == 32) {
      feed_right(block);
    } else if (Block::kIsKeys && threadIdx.x >= 64 && threadIdx.x < 96) {
      fetch_queries(block);
    }
  } else {
    ptx::registers_take<kGradientConsumerRegisters>();
    if (warpgroup == 1) {
      WideLeft<Block>(block).run();
    } else {
      WideRight<Block>(block).run();
    }
  }
  ptx::cluster_sync();  // no block leaves while the other may still write into it
}

template <Gradient kOf, int kDimQk, int kDimV, Dtype kDtype, Scores kScores>
const void* wide_gradient_instance() {
  return reinterpret_cast<const void*>(&sm90_backward_wide<kOf, kDimQk, kDimV, kDtype, kScores>);
}

}  // namespace wh::cuda
