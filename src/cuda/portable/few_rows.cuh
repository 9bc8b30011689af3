// cuda_portable for up to eight query rows of a kv head in f32: decode, on the CUDA cores. And for
// quantised keys and values, whose products are f32 whatever q is: there more rows are more blocks.
//
// Schedule: a block has all rows and one share of the keys. Its warps (half warps where heads are
// 64 wide) are teams that never wait for each other: a team takes every n-th few keys, a lane four
// columns of each. cp.async brings K and V three steps ahead into shared memory, where a lane reads
// what it has copied itself, so that no barrier is needed. Dot products are summed by a butterfly
// that leaves each lane with one score of one row; softmax is per lane, and the weights go out
// again by shuffles. At the end the teams' shares are merged as split keys are.
//
// Roofline: memory. 8 rows take 4 operations a byte, the cores of an H100 have 20 a byte that
// arrives. The tensor cores' f32 takes three products of 16 rows for what one row needs: twice the
// time at 4 rows of 128.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "core/element.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/portable/few_rows.h"
#include "cuda/portable/kernel.h"
#include "cuda/portable/stored_rows.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {
namespace {

// One of out by its type.
__device__ __forceinline__ void store_out(void* out, Dtype dtype, int64_t offset, float value) {
  switch (dtype) {
    case Dtype::kF32:
      static_cast<float*>(out)[offset] = value;
      break;
    case Dtype::kF16:
      static_cast<__half*>(out)[offset] = __float2half_rn(value);
      break;
    case Dtype::kBf16:
      static_cast<__nv_bfloat16*>(out)[offset] = __float2bfloat16_rn(value);
      break;
  }
}

// `Rows` are those of stored_rows.cuh. Of F32Rows everything is f32; of others q and out have types
// of their own.
template <int kDim, int kRows, typename Rows>
class FewRowsBlock {
 public:
  __device__ __forceinline__ FewRowsBlock(const PortableArgs& args, const PackedItem& item,
                                          float4* s_ring)
      : args_(args),
        a_(args.attention),
        item_(item),
        s_ring_(s_ring),
        lane_(threadIdx.x % kLanes),
        team_(threadIdx.x / kLanes),
        begin_(max(item.seen.begin, item.tile_begin * FewRowsTile::kKeys)),
        end_(min(item.seen.end, item.tile_end * FewRowsTile::kKeys)),
        k_(args.stored_k, args.k_is_whole, a_, item),
        v_(args.stored_v, args.v_is_whole, a_, item) {
    const PackedRow at = packed_row(min(lane_ % kScores / kStepKeys, item.rows - 1));
    score_row_ = score_row(a_, item.sequence, at.head, at.query);
    load_queries();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) o_[r][i] = make_float4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void run() {
    constexpr int kAhead = FewRowsTile::kStages - 1;
    const int32_t steps =
        item_.tile_begin < item_.tile_end ? (end_ - begin_ + kBlockKeys - 1) / kBlockKeys : 0;
    constexpr int kUnrolled = kIsF32 ? kAhead : 1;
#pragma unroll kUnrolled
    for (int step = 0; step < kAhead; ++step) {
      if (step < steps) load(step);
      ptx::cp_async_commit();
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<kAhead - 1>();
      if (step + kAhead < steps) load(step + kAhead);
      ptx::cp_async_commit();
      work_on(step);
    }
    merge_teams();
  }

 private:
  static constexpr bool kIsF32 = !std::is_same_v<Rows, StoredRows>;
  static constexpr FewRowsTile kTile{kDim, kRows};
  static constexpr int kThreads = FewRowsTile::kThreads;
  static constexpr int kLanes = kTile.lanes();
  static constexpr int kPieces = kTile.pieces();
  static constexpr int kTeams = kTile.teams();
  static constexpr int kStepKeys = kTile.step_keys();
  static constexpr int kBlockKeys = kTeams * kStepKeys;
  static constexpr int kStepPieces = 2 * kStepKeys * kPieces;  // of a lane, K's in front of V's
  static constexpr int kScores = kRows * kStepKeys;  // of a team's step; lanes beyond repeat them
  static_assert(kScores <= kLanes && FewRowsTile::kKeys % kBlockKeys == 0);

  __device__ __forceinline__ PackedRow packed_row(int row) const {
    return {a_, args_.rows, item_, row};
  }
  __device__ __forceinline__ int column(int piece) const { return 4 * (lane_ + kLanes * piece); }
  __device__ __forceinline__ int32_t first_key(int step) const {
    return begin_ + (step * kTeams + team_) * kStepKeys;
  }
  __device__ __forceinline__ float4* slot(int step, bool is_v, int key, int piece) const {
    const int stage = step % FewRowsTile::kStages;
    return s_ring_ +
           (((stage * 2 + (is_v ? 1 : 0)) * kStepKeys + key) * kPieces + piece) * kThreads +
           threadIdx.x;
  }

  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const PackedRow at = packed_row(min(r, item_.rows - 1));
      const int64_t row = at.offset(args_.stride_q, item_);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int d = column(i) + e;
          x[e] = d < a_.dim_qk ? query_element(row + d * args_.stride_q[3]) : 0;
        }
        q_[r][i] = make_float4(x[0], x[1], x[2], x[3]);
      }
    }
  }

  __device__ __forceinline__ float query_element(int64_t offset) const {
    if constexpr (kIsF32) return static_cast<const float*>(args_.q)[offset];
    return load_element(args_.q, args_.dtype_q, offset);
  }

  __device__ __forceinline__ void load(int step) {
    if constexpr (kIsF32) {
      load_f32(step);
    } else {
      load_stored(step);
    }
  }
  __device__ __forceinline__ void load_f32(int step) {
    KeyRows::Place at[kStepKeys] = {};
    if constexpr (Rows::kHasPages) {  // all before the first copy, which no load passes
#pragma unroll
      for (int key = 0; key < kStepKeys; ++key) at[key] = place(first_key(step) + key);
    }
#pragma unroll
    for (int key = 0; key < kStepKeys; ++key) {
      const int32_t key_idx = first_key(step) + key;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const Piece piece{existing_key(key_idx), at[key], column(i), key_idx < end_};
        k_.copy(slot(step, false, key, i), piece);
        v_.copy(slot(step, true, key, i), piece);
      }
    }
  }
  // By code that is there once: a lane finds the place of one key, and copies pieces of all.
  __device__ __forceinline__ void load_stored(int step) {
    const KeyRows::Place own = place(first_key(step) + lane_ % kStepKeys);
#pragma unroll 1
    for (int i = 0; i < kStepPieces; ++i) {
      const int key = i % kStepKeys, column_piece = i / kStepKeys % kPieces;
      const bool is_v = i >= kStepPieces / 2;
      const int32_t key_idx = first_key(step) + key;
      const KeyRows::Place at{__shfl_sync(~0u, own.batch_idx, key, kLanes),
                              __shfl_sync(~0u, own.token_idx, key, kLanes)};
      const Piece piece{existing_key(key_idx), at, column(column_piece), key_idx < end_};
      rows(is_v).copy(slot(step, is_v, key, column_piece), piece);
    }
  }
  __device__ __forceinline__ void widen(int step) const {
#pragma unroll 1
    for (int i = 0; i < 2 * kPieces; ++i) {
      const int piece = i % kPieces;
      const bool is_v = i >= kPieces;
      rows(is_v).template widen<kStepKeys>(column(piece),
                                           [&](int key) { return slot(step, is_v, key, piece); });
    }
  }
  __device__ __forceinline__ Rows rows(bool is_v) const { return is_v ? v_ : k_; }
  __device__ __forceinline__ int32_t existing_key(int32_t key_idx) const {
    return key_idx < end_ ? key_idx : begin_;
  }
  __device__ __forceinline__ KeyRows::Place place(int32_t key_idx) const {
    return item_.key_rows(a_).place(existing_key(key_idx));
  }

  __device__ __forceinline__ void work_on(int step) {
    if constexpr (!kIsF32) widen(step);
    const int32_t key = first_key(step) + lane_ % kStepKeys;
    float sums[kScores];
    dot_products(step, sums);
    const float score = visible_score(sum_over_lanes(sums), key);
    const float weight = weigh(score);
    add_values(step, score, weight);
  }

  // [row, key], of this lane's columns alone.
  __device__ __forceinline__ void dot_products(int step, float (&sums)[kScores]) const {
#pragma unroll
    for (int key = 0; key < kStepKeys; ++key) {
      float4 k[kPieces];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) k[i] = *slot(step, false, key, i);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          sum = fmaf(q_[r][i].x, k[i].x, sum);
          sum = fmaf(q_[r][i].y, k[i].y, sum);
          sum = fmaf(q_[r][i].z, k[i].z, sum);
          sum = fmaf(q_[r][i].w, k[i].w, sum);
        }
        sums[r * kStepKeys + key] = sum;
      }
    }
  }

  // The whole sum of score lane_ % kScores: each exchange halves what a lane still sums.
  template <int kCount>
  __device__ __forceinline__ float sum_over_lanes(const float (&sums)[kCount]) const {
    if constexpr (kCount == 1) {
      float sum = sums[0];
#pragma unroll
      for (int step = kScores; step < kLanes; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      return sum;
    } else {
      constexpr int kHalf = kCount / 2;
      const bool keeps_upper = (lane_ & kHalf) != 0;
      float halves[kHalf];
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float kept = keeps_upper ? sums[i + kHalf] : sums[i];
        const float sent = keeps_upper ? sums[i] : sums[i + kHalf];
        halves[i] = kept + __shfl_xor_sync(~0u, sent, kHalf);
      }
      return sum_over_lanes(halves);
    }
  }

  // In units of 1 / scale_log2_; minus infinity where this lane's row may not see the key.
  __device__ __forceinline__ float visible_score(float dot, int32_t key) const {
    if (key >= end_ || static_cast<uint32_t>(key - score_row_.first_key) >= score_row_.key_count) {
      return -INFINITY;
    }
    float score[1] = {dot};
    if (args_.scores == Scores::kPlain) return score[0];
    transform_scores(score, a_);
    const float bias = bias_of_key(key);
    return bias == -INFINITY ? -INFINITY : score[0] + bias;
  }

  __device__ __forceinline__ float bias_of_key(int32_t key) const {
    if constexpr (!kIsF32) {
      if (args_.dtype_q == Dtype::kF16) return mask_bias<__half>(a_, score_row_, key);
      if (args_.dtype_q == Dtype::kBf16) return mask_bias<__nv_bfloat16>(a_, score_row_, key);
    }
    return mask_bias<float>(a_, score_row_, key);
  }

  // Takes the scores of a step into the row's softmax; returns this lane's weight.
  __device__ __forceinline__ float weigh(float score) {
    float top = fmaxf(largest_, score);
#pragma unroll
    for (int step = 1; step < kStepKeys; step *= 2) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    }
    const float shift = top == -INFINITY ? 0 : top;
    const float correction = ptx::exp2_approx((largest_ - shift) * scale_log2_);
    const float weight = ptx::exp2_approx((score - shift) * scale_log2_);
    sum_ = fmaf(sum_, correction, weight);
    // A first key replaces minus infinity: what is summed is still 0.
    if (__any_sync(~0u, top > largest_)) rescale(correction);
    largest_ = top;
    return weight;
  }
  __device__ __forceinline__ void rescale(float correction) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float factor = __shfl_sync(~0u, correction, r * kStepKeys, kLanes);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        o_[r][i].x *= factor;
        o_[r][i].y *= factor;
        o_[r][i].z *= factor;
        o_[r][i].w *= factor;
      }
    }
  }

  __device__ __forceinline__ void add_values(int step, float score, float weight) {
    float4 v[kStepKeys][kPieces];
    float zero = 0;  // not while everything is finite
#pragma unroll
    for (int key = 0; key < kStepKeys; ++key) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        v[key][i] = *slot(step, true, key, i);
        zero = fmaf(v[key][i].x, 0.0f, zero);
        zero = fmaf(v[key][i].y, 0.0f, zero);
        zero = fmaf(v[key][i].z, 0.0f, zero);
        zero = fmaf(v[key][i].w, 0.0f, zero);
      }
    }
    // A weight of 0 would not hide NaN or infinity.
    const bool is_finite = !__any_sync(~0u, zero != 0);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int key = 0; key < kStepKeys; ++key) {
        const int from = r * kStepKeys + key;
        const float p = __shfl_sync(~0u, weight, from, kLanes);
        if (!is_finite && __shfl_sync(~0u, score, from, kLanes) == -INFINITY) continue;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          o_[r][i].x = fmaf(p, v[key][i].x, o_[r][i].x);
          o_[r][i].y = fmaf(p, v[key][i].y, o_[r][i].y);
          o_[r][i].z = fmaf(p, v[key][i].z, o_[r][i].z);
          o_[r][i].w = fmaf(p, v[key][i].w, o_[r][i].w);
        }
      }
    }
  }

  // What the teams leave in shared memory, over the ring.
  struct Shares {
    float o[kTeams][kRows][kDim];
    float largest[kTeams][kRows], sum[kTeams][kRows];
    float factor[kTeams][kRows];  // of o
  };

  __device__ __forceinline__ void merge_teams() {
    static_assert(sizeof(Shares) == kTile.merge_bytes());
    auto& shares = *reinterpret_cast<Shares*>(s_ring_);
#pragma unroll
    for (int step = 1; step < kStepKeys; step *= 2) sum_ += __shfl_xor_sync(~0u, sum_, step);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the ring has been read
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        *reinterpret_cast<float4*>(&shares.o[team_][r][column(i)]) = o_[r][i];
      }
    }
    if (lane_ < kScores && lane_ % kStepKeys == 0) {
      shares.largest[team_][lane_ / kStepKeys] = largest_;
      shares.sum[team_][lane_ / kStepKeys] = sum_;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < item_.rows) weigh_teams(shares, threadIdx.x);
    __syncthreads();
    store(shares);
  }

  __device__ __forceinline__ void weigh_teams(Shares& shares, int r) const {
    const PackedRow at = packed_row(r);
    const Partials& partials = args_.partials;
    const float sink = partials.splits > 1 ? -INFINITY : sink_of(a_, at.head);
    float largest = -INFINITY;
#pragma unroll
    for (int t = 0; t < kTeams; ++t) largest = fmaxf(largest, shares.largest[t][r]);
    const float top = fmaxf(__fmul_rn(largest, scale_log2_), __fmul_rn(sink, kLog2E));
    const float base = largest == -INFINITY ? 0 : largest;
    const float unit =
        largest == -INFINITY ? 0 : ptx::exp2_approx(exponent_of(largest, scale_log2_, top));
    float sum = sink == -INFINITY ? 0 : ptx::exp2_approx(exponent_of(sink, kLog2E, top));
#pragma unroll
    for (int t = 0; t < kTeams; ++t) {
      const float factor = unit * ptx::exp2_approx((shares.largest[t][r] - base) * scale_log2_);
      sum = fmaf(shares.sum[t][r], factor, sum);
      shares.factor[t][r] = factor;
    }
    const float norm = sum == 0 ? 0 : __fdividef(1.0f, sum);
#pragma unroll
    for (int t = 0; t < kTeams; ++t) shares.factor[t][r] *= norm;
    const RowWeight weight{top, sum};
    if (partials.splits > 1) {
      partials.weights[at.index(a_, item_) * partials.splits + item_.split] = weight;
    } else if (a_.log_sum_exp != nullptr) {
      a_.log_sum_exp[at.index(a_, item_)] = log_sum_exp(weight);
    }
  }

  __device__ __forceinline__ void store(const Shares& shares) const {
    const Partials& partials = args_.partials;
    const bool is_split = partials.splits > 1;
    const int columns = is_split ? partials.columns : a_.dim_v;
#pragma unroll 1
    for (int r = 0; r < item_.rows; ++r) {
      const PackedRow at = packed_row(r);
      float* sums =
          partials.sums + (item_.split * partials.rows + at.index(a_, item_)) * partials.columns;
      const int64_t out = at.offset(a_.stride_out, item_);
#pragma unroll 1
      for (int d = threadIdx.x; d < columns; d += kThreads) {
        float sum = 0;
#pragma unroll
        for (int t = 0; t < kTeams; ++t) sum = fmaf(shares.factor[t][r], shares.o[t][r][d], sum);
        if (is_split) {
          sums[d] = sum;
        } else {
          const int64_t at_column = out + d * a_.stride_out[3];
          store_out(a_.out, kIsF32 ? Dtype::kF32 : args_.dtype_out, at_column, sum);
        }
      }
    }
  }

  const PortableArgs& args_;
  const AttentionArgs& a_;
  const PackedItem& item_;  // in shared memory
  float4* s_ring_;
  const int lane_, team_;  // of its team; of the block
  const int32_t begin_, end_;
  const Rows k_, v_;
  float scale_log2_ = (args_.scores == Scores::kPlain ? a_.scale : 1) * kLog2E;  // of scores
  ScoreRow score_row_;                   // of the row whose score this lane ends up with
  float largest_ = -INFINITY, sum_ = 0;  // of that row; the sum over this lane's keys
  float4 q_[kRows][kPieces], o_[kRows][kPieces];
};

template <int kDim, int kRows, typename Rows>
__global__ void __launch_bounds__(FewRowsTile::kThreads, FewRowsTile{kDim, kRows}.resident())
    few_rows(const __grid_constant__ PortableArgs args) {
  extern __shared__ __align__(16) float4 s_few_rows[];
  // Behind the ring, not static: 48 KB without asking are for both together.
  constexpr FewRowsTile kTile{kDim, kRows};
  static_assert(sizeof(PackedItem) <= FewRowsTile::kItemBytes);
  auto* item = reinterpret_cast<PackedItem*>(s_few_rows + kTile.ring_bytes() / sizeof(float4));
  if (threadIdx.x == 0) {
    *item = PackedItem(args.attention, args.rows, args.last_item - static_cast<int32_t>(blockIdx.x),
                       kRows, FewRowsTile::kKeys);
  }
  __syncthreads();
  if (item->rows <= 0) return;  // packed queries have fewer
  FewRowsBlock<kDim, kRows, Rows> block(args, *item, s_few_rows);
  ptx::launch_dependents();
  block.run();
}

}  // namespace

template <int kDim, int kRows>
const void* few_rows_instance(bool pages_cut_tiles) {
  return pages_cut_tiles ? reinterpret_cast<const void*>(&few_rows<kDim, kRows, F32Rows<true>>)
                         : reinterpret_cast<const void*>(&few_rows<kDim, kRows, F32Rows<false>>);
}
template <int kDim, int kRows>
const void* code_rows_instance(bool) {
  return reinterpret_cast<const void*>(&few_rows<kDim, kRows, StoredRows>);
}

}  // namespace wh::cuda
