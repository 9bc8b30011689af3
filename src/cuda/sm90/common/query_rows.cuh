// The query rows of a block, 64 a consumer warpgroup: where they are in the problem, which keys
// they see, and how they are stored.
#pragma once

#include <cstdint>

#include "cuda/common/attention_args.h"
#include "cuda/common/clean_values.cuh"
#include "cuda/common/key_range.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/common/tile_order.h"
#include "cuda/ptx/math.cuh"
#include "cuda/sm90/common/tile_walk.cuh"

namespace wh::cuda {

// The row of a warpgroup's accumulator that this thread holds as number `r` of two.
__device__ __forceinline__ int32_t accumulator_row(int r) {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
}

// Accumulator row `r` times `norm`, of which the first `columns` are there, to a row in memory that
// is aligned to 8 bytes. Lane pairs swap halves, so that a quad fills the 32 bytes of a sector.
template <typename T, int kCount>
__device__ __forceinline__ void store_sums(const float (&o)[kCount], int r, T* row, int32_t columns,
                                           float norm) {
  const int lane = threadIdx.x % 32;
  const int32_t column = lane % 2 * 8 + lane % 4 / 2 * 4;
#pragma unroll
  for (int i = 0; i < kCount / 4; i += 2) {
    const float* sums = o + 4 * i + 2 * r;
    const uint32_t low = norm == 0 ? 0 : ptx::pack<T>(sums[0] * norm, sums[1] * norm);
    const uint32_t high = norm == 0 ? 0 : ptx::pack<T>(sums[4] * norm, sums[5] * norm);
    const uint32_t other = __shfl_xor_sync(~0u, lane % 2 != 0 ? low : high, 1);
    const uint2 four = lane % 2 != 0 ? make_uint2(other, high) : make_uint2(low, other);
    if (8 * i + column < columns) *reinterpret_cast<uint2*>(row + column + 8 * i) = four;
  }
}

template <typename T, typename Tile>
struct QueryRows {
  const AttentionArgs& args;
  const Tile& tile;      // a WalkedTile whose first query is the block's
  int32_t packed_heads;  // row r is query r / packed_heads, head r % packed_heads
  int32_t queries;       // the block holds so many; rows beyond them are empty

  struct Place {
    int32_t head, query;
    bool exists;
  };
  __device__ __forceinline__ Place place(int32_t row) const {
    const int32_t query = row / packed_heads;
    const int32_t of_sequence = tile.at.first_query + query;
    return {tile.at.first_head + row - query * packed_heads, of_sequence,
            query < queries && of_sequence < tile.sequence.len_q};
  }

  // What the row may see; rows that do not exist see what the last one does.
  __device__ __forceinline__ ScoreRow scores(int32_t row) const {
    const Place p = place(row);
    return score_row(args, tile.sequence, min(p.head, args.heads_q - 1),
                     min(p.query, tile.sequence.len_q - 1));
  }

  __device__ __forceinline__ float sink(const Place& p) const {
    return p.exists ? sink_of(args, p.head) : -INFINITY;
  }

  __device__ __forceinline__ void store_log_sum_exp(const Place& p, RowWeight weight) const {
    if (args.log_sum_exp == nullptr || !p.exists || threadIdx.x % 4 != 0) return;
    args.log_sum_exp[row_index<int64_t>(Tile::query_layout(args), args.heads_q, args.len_q,
                                        tile.sequence.query_batch, p.head,
                                        tile.sequence.first_query + p.query)] = log_sum_exp(weight);
  }

  __device__ __forceinline__ T* out(const Place& p) const {
    return static_cast<T*>(args.out) + tile.sequence.query_batch * args.stride_out[0] +
           p.head * args.stride_out[1] + (tile.sequence.first_query + p.query) * args.stride_out[2];
  }

  // Columns [first_column, ...) of accumulator row `r` times `norm`; where that is 0 the row is
  // empty, and its sums may be NaN: weights of 0 times infinities of V.
  template <int kCount>
  __device__ __forceinline__ void store(const float (&o)[kCount], int r, const Place& p, float norm,
                                        int32_t first_column) const {
    store_sums(o, r, out(p) + first_column, p.exists ? args.dim_v - first_column : 0, norm);
  }

  // Adds what cleaning dropped from V to stored rows [first_row, first_row + 64) that see it, in
  // columns [first_column, end_column). A warp takes the rows that it stored, whose `norm` its
  // lanes hold: empty ones stay 0. Rare: speed does not matter.
  __device__ __forceinline__ void restore(int32_t tile_k, int32_t first_row, const float (&norm)[2],
                                          int32_t first_column, int32_t end_column) const {
    const T* v = static_cast<const T*>(args.v) + tile.at.first_head / args.group * args.stride_v[1];
    const KeyRows rows = tile.key_rows(args);
    restore(tile_k, first_row, norm, first_column, end_column, [&](int32_t key, int32_t column) {
      return static_cast<float>(v[rows.offset(args.stride_v[0], args.stride_v[2], key) + column]);
    });
  }
  // By value_at(key, column) of the head.
  template <typename Value>
  __device__ __forceinline__ void restore(int32_t tile_k, int32_t first_row, const float (&norm)[2],
                                          int32_t first_column, int32_t end_column,
                                          Value value_at) const {
    __syncwarp();  // its rows are stored
    const Keys present = tile.sequence.present;
    const KeyTiles& tiles = tile.keys;
    const Keys left{max(present.begin, tiles.begin * tile_k),
                    min(present.end, tiles.full_begin * tile_k)};
    const Keys right{max(present.begin, max(tiles.full_begin, tiles.clean_end) * tile_k),
                     min(present.end, tiles.end * tile_k)};
#pragma unroll 1
    for (int32_t i = 0; i < 16; ++i) {
      const int32_t r = first_row + threadIdx.x % 128 / 32 * 16 + i;
      const float row_norm = __shfl_sync(~0u, i < 8 ? norm[0] : norm[1], i % 8 * 4);
      const Place p = place(r);
      if (!p.exists || row_norm == 0) continue;
      const ScoreRow row = scores(r);
#pragma unroll 1
      for (int32_t column = first_column + threadIdx.x % 32; column < min(end_column, args.dim_v);
           column += 32) {
        restore_values<T>(args, row, left, value_at, out(p), column);
        restore_values<T>(args, row, right, value_at, out(p), column);
      }
    }
  }
};

}  // namespace wh::cuda
