// What the kernels of sm90_backward make of scores: weights, and gradients of scores; and the
// numbers of the queries that blocks of keys take for it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/element.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/sm90/backward/kernel.h"
#include "cuda/sm90/common/query_rows.cuh"

namespace wh::cuda {

// A number of every column of a tile, in shared memory: [i] are those of the thread's two columns
// of the i-th eight.
struct GradientNumbers {
  const float* first;

  __device__ __forceinline__ float2 operator[](int i) const {
    return *reinterpret_cast<const float2*>(first + 8 * i + threadIdx.x % 4 * 2);
  }
};

// What a block of keys reads of a tile's queries: arrays of kColumns each, in shared memory.
template <int kColumns>
struct GradientQueries {
  unsigned char* first;

  __device__ __forceinline__ float* shift() const { return reinterpret_cast<float*>(first); }
  __device__ __forceinline__ float* delta() const { return shift() + kColumns; }
  __device__ __forceinline__ GradientNumbers shifts() const { return {shift()}; }
  __device__ __forceinline__ GradientNumbers deltas() const { return {delta()}; }
  __device__ __forceinline__ int32_t* first_key() const {
    return reinterpret_cast<int32_t*>(first) + 2 * kColumns;
  }
  __device__ __forceinline__ uint32_t* key_count() const {
    return reinterpret_cast<uint32_t*>(first) + 3 * kColumns;
  }

  // By one warp.
  __device__ __forceinline__ void fetch(const GradientBlockArgs& args, const BackwardItem& item,
                                        int32_t head, int32_t tile) const {
    const AttentionArgs& a = args.gradients.attention;
#pragma unroll
    for (int column = threadIdx.x % 32; column < kColumns; column += 32) {
      const int32_t query = tile * kColumns + column;
      const bool exists = query < item.sequence.len_q;
      const int64_t row = row_number(a, item.sequence, head, query);
      const ScoreRow seen = score_row(a, item.sequence, head, min(query, item.sequence.len_q - 1));
      shift()[column] = exists ? args.rows.shift[row] : INFINITY;
      delta()[column] = exists ? args.rows.delta[row] : 0.0f;
      first_key()[column] = seen.first_key;
      key_count()[column] = exists ? seen.key_count : 0;
    }
  }
};

// Scores on their way to weights and to gradients of scores, of 64 own rows beside kColumns.
template <typename Block>
struct GradientWeights {
  using T = typename Block::T;
  static constexpr bool kIsKeys = Block::kIsKeys;
  static constexpr int kColumns = Block::kColumns;
  static constexpr Scores kScores = Block::kScores;
  // A weight is at most 1 and of 262,144 alike 2^-18, where f16 has 6 bits of 11 left: they meet
  // d_out as many times larger.
  static constexpr float kWeightScale = std::is_same_v<T, __half> ? 4096 : 1;

  const Block& block;
  float scale_log2;
  int32_t first_row;  // of the warpgroup, in the block
  // Of the thread's two queries, in a block of queries.
  float shift[2], delta[2];
  ScoreRow seen[2];

  __device__ __forceinline__ GradientWeights(const Block& block, int32_t first_row)
      : block(block),
        scale_log2((kScores == Scores::kPlain ? block.attention().scale : 1) * kLog2E),
        first_row(first_row) {
    if constexpr (!kIsKeys) {
      const AttentionArgs& a = block.attention();
      const BackwardItem& item = block.item;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int32_t query = own_row(r);
        const bool exists = query < item.sequence.len_q;
        const int64_t row = row_number(a, item.sequence, item.head, query);
        shift[r] = exists ? block.args.rows.shift[row] : INFINITY;
        delta[r] = exists ? block.args.rows.delta[row] : 0.0f;
        seen[r] = score_row(a, item.sequence, item.head, min(query, item.sequence.len_q - 1));
      }
    }
  }

  __device__ __forceinline__ int32_t own_row(int r) const {
    return block.item.first + first_row + accumulator_row(r);
  }

  // In a block of keys, shifts or deltas in registers. Read while products run: behind them the
  // other consumer's keep shared memory busy.
  static constexpr int kNumbers = kIsKeys ? kColumns / 8 : 1;
  __device__ __forceinline__ void read(float2 (&numbers)[kNumbers], GradientNumbers from) const {
    if constexpr (kIsKeys) {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) numbers[i] = from[i];
    }
  }

  // s becomes the weights, times what a softcap leaves of a score's slope, and p the weights
  // alone, rounded to T. A hidden pair has neither, whatever its score is. `shifts` are the
  // queries' in a block of keys: what read() has left, or where they lie.
  template <bool kHides, int kCount, typename Numbers>
  __device__ __forceinline__ void weigh(float (&s)[kColumns / 2], uint32_t (&p)[kCount],
                                        const Numbers& shifts, int32_t tile, int stage) const {
    const int thread_column = threadIdx.x % 4 * 2;
    const GradientQueries<kColumns> queries = block.queries(stage);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const int column = 8 * i + thread_column;
      float2 row_shifts;
      int2 first_keys;
      uint2 key_counts;
      if constexpr (kIsKeys) {
        row_shifts = shifts[i];
        if constexpr (kHides) {
          first_keys = *reinterpret_cast<const int2*>(queries.first_key() + column);
          key_counts = *reinterpret_cast<const uint2*>(queries.key_count() + column);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float weights[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = s[4 * i + 2 * r + e];
          const float row_shift = kIsKeys ? (e == 0 ? row_shifts.x : row_shifts.y) : shift[r];
          float slope = 1;
          transform(score, slope);
          weights[e] = ptx::exp2_approx(fmaf(score, scale_log2, -row_shift));
          score = weights[e] * slope;
          if constexpr (kHides) {
            const int32_t key = kIsKeys ? own_row(r) : tile * kColumns + column + e;
            const int32_t first_key =
                kIsKeys ? (e == 0 ? first_keys.x : first_keys.y) : seen[r].first_key;
            const uint32_t key_count =
                kIsKeys ? (e == 0 ? key_counts.x : key_counts.y) : seen[r].key_count;
            if (static_cast<uint32_t>(key - first_key) >= key_count) weights[e] = score = 0;
          }
        }
        if constexpr (kCount > 1) {
          p[2 * i + r] = ptx::pack<T>(weights[0] * kWeightScale, weights[1] * kWeightScale);
        }
      }
    }
  }
  __device__ __forceinline__ void transform(float& score, float& slope) const {
    if constexpr (kScores == Scores::kPlain) return;
    const AttentionArgs& a = block.attention();
    if (a.softcap > 0) {
      const float capped = ptx::tanh_accurate(score * (a.scale / a.softcap));
      slope = 1 - capped * capped;
      score = a.softcap * capped;
    } else {
      score *= a.scale;
    }
  }

  // d_out v^T becomes gradients of scores, rounded to T. `weight_of(i)` is element i of what
  // weigh() left in s. Hidden pairs have weights of 0, but may meet NaN. `deltas` are as the
  // shifts.
  template <bool kHides, typename Numbers, typename WeightOf>
  __device__ __forceinline__ void differentiate(const float (&d)[kColumns / 2],
                                                uint32_t (&ds)[kColumns / 4], const Numbers& deltas,
                                                WeightOf weight_of) const {
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      float2 row_deltas;
      if constexpr (kIsKeys) row_deltas = deltas[i];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float gradients[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 4 * i + 2 * r + e;
          const float row_delta = kIsKeys ? (e == 0 ? row_deltas.x : row_deltas.y) : delta[r];
          const float weight = weight_of(at);
          gradients[e] = weight * (d[at] - row_delta);
          if (kHides && weight == 0) gradients[e] = 0;
        }
        ds[2 * i + r] = ptx::pack<T>(gradients[0], gradients[1]);
      }
    }
  }

  // The warpgroup's sums times `scale`, to the rows that they belong to, from `first_column` on.
  template <int kCount>
  __device__ __forceinline__ void store(const float (&sums)[kCount], float scale, void* data,
                                        const int64_t (&stride)[4], int32_t dim,
                                        int32_t first_column = 0) const {
    const SideRows of =
        block.item.rows_of(block.attention(), kIsKeys ? Side::kKeys : Side::kQueries);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      T* row = static_cast<T*>(data) + of.batch_idx * stride[0] + block.item.head * stride[1] +
               (of.first + own_row(r)) * stride[2] + first_column;
      store_sums(sums, r, row, own_row(r) < of.length ? dim - first_column : 0, scale);
    }
  }
};

}  // namespace wh::cuda
