// cuda_portable over quantised keys and values where q has 16 bits: decode and prefill.
//
// Schedule: codes come as they lie into a ring of tiles in shared memory, up to four of them under
// way, and are widened in registers on their way into mma.sync: as bf16, which holds every code.
// Scales stay outside of the products: K's are multiplied into scores, V's into weights, those of
// blocks of 32 columns block by block; those of V's channels, of heads and of tensors into out. So
// products are those of the widened cache, but for the rounding of weights that any cache has. What
// a bf16 does not hold is two or three that add up to it: q of f16, q times K's scales of channels,
// and weights where q is f16. In decode, up to 16 rows, the warps take a share of each tile's keys
// each and merge at the end; else all warps take all keys, each for its own rows.
//
// Lanes read words of four columns. Q is stored so that these are the columns that mma.sync's lanes
// have of a step; of V's rows a word gives a lane four columns that are four products' apart.
//
// Roofline: decode streams codes; at the memory's rate of an H200, 20 bytes a clock and SM,
// widening takes a third of the instructions that it can issue. A tile in 16 bits, written to
// shared memory and read again, would take all of that memory's 128 bytes a clock. Prefill: a warp
// of 32 rows widens six instructions for two products, about as long as these take on Hopper.
//
// NaN in V: in tiles where some row does not see some key, codes and scales that are not finite are
// taken out of shared memory and added again to the rows that see them, as in block.cuh.
//
// Each class is made of the one before: CodeRing has shared memory and the copies into it,
// CodeProducts the two products and the softmax, CodeOutput what is written, CodeBlock, here, when.
#pragma once

#include "cuda/portable/code_output.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {
namespace {

template <int kDimV, int kRows>
class CodeBlock : CodeOutput<kDimV, kRows> {
  using Output = CodeOutput<kDimV, kRows>;

 public:
  using Output::Output;

  __device__ __forceinline__ void run(int32_t* s_dropped) {
    s_dropped_ = s_dropped;
    if (threadIdx.x == 0) *s_dropped_ = 0;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o_[m][i] = 0;
    }
    if (item_.tile_begin < item_.tile_end) {
      clear_padding();
      load_queries();
      work_on_tiles();
    }
    if constexpr (kKeyWarps > 1) {
      merge_warps();
    } else {
      store_rows();
    }
    __syncthreads();
    if (*s_dropped_ != 0) restore();
  }

 private:
  using Output::args_, Output::p_, Output::item_, Output::kKeys, Output::kRowTiles;
  using Output::clear_padding, Output::load_queries, Output::load, Output::wait_for_tile;
  using Output::kKeyWarps, Output::kColumns, Output::kTiles, Output::slice_;
  using Output::merge_warps, Output::store_rows;
  using Output::softmax_, Output::o_, Output::s_dropped_;
  using Output::values_of_stage, Output::scales_of_stage, Output::clean_values, Output::restore;
  using Output::warp_has_rows, Output::has_token_scales, Output::corrects;

  // Loads tiles ahead from one place in the code, which begins so many in front of the first.
  __device__ __forceinline__ void work_on_tiles() {
    const int ahead = args_.layout.stages - 1;
    int stage = 1;  // so that the first tile's is 0
#pragma unroll 1
    for (int32_t tile = item_.tile_begin - ahead; tile < item_.tile_end; ++tile) {
      const bool is_there = tile >= item_.tile_begin;
      if (is_there) {
        wait_for_tile();
        __syncthreads();  // all copies are here, and the stage in front has been read
      }
      load(tile + ahead, stage == 0 ? ahead : stage - 1);
      if (is_there) work_on(tile, stage);
      stage = stage == ahead ? 0 : stage + 1;
    }
  }

  __device__ __forceinline__ void work_on(int32_t tile, int stage) {
    float s[kRowTiles][4 * kTiles];
    if (warp_has_rows()) {
      scores(s, tile, stage);
      weigh(s);
    }
    if (!item_.tiles.is_clean(tile)) {
      clean_values(stage);
      __syncthreads();
    }
    if (!warp_has_rows()) return;
    if (corrects()) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) o_[m][i] *= softmax_[m].correction[i / 2 % 2];
      }
    }
    if (has_token_scales(p_.stored_v)) {
      const float* const scales = scales_of_stage(stage) + kKeys + slice_;
      scale_keys(s, scales);
    }
    with_format(p_.stored_v.format, [&]<Quantised kFormat>() {
      add_values<kFormat>(s, values_of_stage(stage) + slice_ * args_.layout.pitch_v);
    });
  }
};

template <int kDimV, int kRows>
__global__ void __launch_bounds__(CodeTile{kDimV, kRows}.threads(),
                                  CodeTile{kDimV, kRows}.resident())
    code_tiles(const __grid_constant__ CodeTileArgs args) {
  extern __shared__ __align__(16) unsigned char s_code_tiles[];
  static_assert(sizeof(PackedItem) + sizeof(int32_t) <= CodeTile::kItemBytes);
  unsigned char* const s_item = s_code_tiles + args.layout.bytes - CodeTile::kItemBytes;
  auto* const item = reinterpret_cast<PackedItem*>(s_item);
  if (threadIdx.x == 0) {
    *item = PackedItem(args.portable.attention, args.portable.rows,
                       args.portable.last_item - static_cast<int32_t>(blockIdx.x), kRows,
                       CodeTile{kDimV, kRows}.keys());
  }
  __syncthreads();
  if (item->rows <= 0) return;  // packed queries have fewer
  CodeBlock<kDimV, kRows> block(args, *item, s_code_tiles);
  ptx::launch_dependents();
  block.run(reinterpret_cast<int32_t*>(s_item + sizeof(PackedItem)));
}

}  // namespace

template <int kDimV, int kRows>
const void* code_tiles_instance(bool) {
  return reinterpret_cast<const void*>(&code_tiles<kDimV, kRows>);
}

}  // namespace wh::cuda
