// cuda_portable_backward: gradients by mma.sync and cp.async, for every card from sm_80 on, any
// dimensions up to 512, f16, bf16 and f32.
//
//   p = 2^((s - base) * log2(e) - shift)    ds = p * (d_out v^T - delta)
//   dv = p^T d_out    dq = scale * ds k    dk = scale * ds^T q
//
// Schedule: two kernels of one form, so that nothing is added by two blocks and bits are the same
// on every run. A block of the first owns queries, with q and d_out in shared memory, and k and v
// stream past; it also makes delta, and of rows whose log-sum-exp is coarse the sum of weights once
// more. A block of the second owns keys, with k and v, and q and d_out of every head of the group
// stream past. Both make the scores and d_out v^T of a tile with their own rows on the
// accumulators' rows, so that these become the first operand of the products that follow: dq, or dk
// and dv. That is 7 products for 5; dq by one kernel would take f32 additions to memory, in turns
// to be the same on every run. Eight warps have 16 rows each; wider heads share rows between 2 to 8
// of them, which pass weights through shared memory and each sum their own columns.
//
// Roofline: mma.sync's rate, as cuda_portable; 2 * (4 * dim_qk + 3 * dim_v) flops a pair.
//
// NaN and infinity: in tiles where some row does not see some key, and in all tiles in f32, what is
// not finite is taken out of the streamed tile before it meets weights of 0, and a flag is raised
// for launch_restore().
#pragma once

#include "cuda/portable/backward/block.cuh"

namespace wh::cuda {

template <Side kSide, int kDimQk, int kDimV, typename T, SharedMemory kMemory>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    cuda_portable_backward(const __grid_constant__ PortableBackwardArgs args) {
  if (args.only_if != nullptr && *args.only_if == 0) return;
  using Block = portable::BackwardBlock<kSide, kDimQk, kDimV, T, kMemory>;
  extern __shared__ __align__(16) unsigned char s_memory[];
  auto* item = reinterpret_cast<BackwardItem*>(s_memory);
  if (threadIdx.x == 0) {
    *item = BackwardItem(args.gradients, kSide, args.tiles,
                         args.first_item + static_cast<int32_t>(blockIdx.x), Block::kTile.rows,
                         Block::kTile.columns);
  }
  __syncthreads();
  if (item->rows <= 0) return;
  Block(args, *item, s_memory).run();
}

}  // namespace wh::cuda
