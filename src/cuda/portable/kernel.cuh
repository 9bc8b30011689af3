// cuda_portable: attention by mma.sync and cp.async, for every card from sm_80 on, any dimensions
// up to 1024, f16, bf16 and f32; prefill and split-key decode in one kernel.
//
// Schedule: a block owns up to 128 query rows that share a kv head (queries x heads of the group)
// and one share of the key tiles that any of them sees. K and V tiles come by cp.async, one of each
// in shared memory: V arrives during S = Q K^T, the next K during softmax and O += P V. A warp
// keeps 16 rows (narrow 16-bit heads: 32) of S and O in registers. Where V is wider than 256 (f32:
// 128), two to eight warps share their rows: each computes the scores of some of the keys, they
// agree on the largest, pass the weights through shared memory, and each sums its own columns of
// V. Warps without a row skip the products. Shares of keys leave normalised partial rows, merged by
// combine.cu.
//
// Roofline: mma.sync reaches 60 to 65 % of the dense rate of sm_80 and two fifths of Hopper's,
// whose full rate needs wgmma. With 16 rows a warp each fragment of K and V feeds one product:
// shared memory's 128 bytes a clock bound those tiles (256 wide and more), the tensor cores the
// narrow ones. f32 takes three TF32 products for one: a sixth of the 16-bit rate.
//
// NaN and infinity in V: keys that do not exist are never read. In tiles where some row does not
// see some key, and in all tiles in f32 (infinity has no second half in 3xTF32), what is not finite
// is taken out of shared memory and added again, after the rows are stored, to the rows that see
// it.
#pragma once

#include "cuda/portable/block.cuh"

namespace wh::cuda {

// Cards with little shared memory hold one block of most tiles: left alone, ptxas saves registers
// for three there and spills.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kLeastBlocks = 1;
#else
constexpr int kLeastBlocks = 0;
#endif

// For cards with so much shared memory.
template <int kDimQk, int kDimV, typename T, SharedMemory kMemory, TilePages kPages>
__global__ void __launch_bounds__(
    portable_tile({kDimQk, kDimV}, sizeof(T), kMemory, kPages).threads(), kLeastBlocks)
    cuda_portable(const __grid_constant__ PortableArgs args) {
  using Block = portable::Block<kDimQk, kDimV, T, kMemory, kPages>;
  extern __shared__ __align__(16) unsigned char s_memory[];
  auto* item = reinterpret_cast<PackedItem*>(s_memory + Block::kTile.bytes - kPortableItemBytes);
  if (threadIdx.x == 0) {
    // Longest first: the last rows see the most keys.
    *item = PackedItem(args.attention, args.rows, args.last_item - static_cast<int32_t>(blockIdx.x),
                       Block::kTile.rows, Block::kTile.keys);
  }
  __syncthreads();
  if (item->rows <= 0) return;  // packed queries have fewer
  Block block(args, *item, s_memory);
  ptx::launch_dependents();
  block.run();
}

// Pages that cut the tiles of heads whose warps have no registers left are read in smaller tiles.
template <int kDimQk, int kDimV, typename T, SharedMemory kMemory>
const void* portable_function(bool pages_cut_tiles) {
  constexpr PortableTile kTile = portable_tile({kDimQk, kDimV}, sizeof(T), kMemory);
  if constexpr (!kTile.takes_cut_tiles()) {
    constexpr PortableTile kCut =
        portable_tile({kDimQk, kDimV}, sizeof(T), kMemory, TilePages::kSeveral);
    static_assert(kCut.takes_cut_tiles() && kCut.rows == kTile.rows &&
                  kCut.threads() == kTile.threads() && kCut.bytes <= kTile.bytes);
    if (pages_cut_tiles) {
      return reinterpret_cast<const void*>(
          &cuda_portable<kDimQk, kDimV, T, kMemory, TilePages::kSeveral>);
    }
  }
  return reinterpret_cast<const void*>(&cuda_portable<kDimQk, kDimV, T, kMemory, TilePages::kOne>);
}

}  // namespace wh::cuda
