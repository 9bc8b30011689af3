// What a block of cuda_portable_backward computes; see kernel.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/common/element.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/portable/backward/memory.cuh"
#include "cuda/portable/products.cuh"

namespace wh::cuda {
namespace portable {

template <Side kSide, int kDimQk, int kDimV, typename T, SharedMemory kMemory>
class BackwardBlock : public BackwardMemory<kSide, kDimQk, kDimV, T, kMemory> {
  using Memory = BackwardMemory<kSide, kDimQk, kDimV, T, kMemory>;
  using Memory::a_, Memory::args_, Memory::g_, Memory::item_, Memory::place_;
  using Memory::begin, Memory::has_tile, Memory::step, Memory::load_own, Memory::load_tile;
  using Memory::key_offset, Memory::query_offset;
  using Memory::kIsKeys, Memory::kColumns, Memory::kGroups, Memory::kQueryRows;
  using Memory::meet_copies, Memory::staged, Memory::clean, Memory::no_row;
  using Memory::s_own_qk_, Memory::s_own_v_, Memory::s_qk_, Memory::s_v_;
  using Memory::s_rows_, Memory::s_weights_, Memory::s_d_scores_;
  using typename Memory::Place;

 public:
  using Memory::kTile;

  __device__ __forceinline__ BackwardBlock(const PortableBackwardArgs& args,
                                           const BackwardItem& item, unsigned char* s_memory)
      : Memory(args, item, s_memory),
        scale_log2_((g_.scores == Scores::kPlain ? a_.scale : 1) * kLog2E) {
    warp_row_ = threadIdx.x / 32 / kGroups * 16;
    group_ = threadIdx.x / 32 % kGroups;
  }

  __device__ __forceinline__ void run() {
    clear(sums_qk_[0]);
    if constexpr (kIsKeys) clear(sums_v_[0]);
    load_own();
    if constexpr (kSide == Side::kQueries) prepare_rows();
    begin();
    if (has_tile()) load_tile(0);
    int stage = 0;
#pragma unroll 1
    while (has_tile()) {
      meet_copies();
      const Place at = place_;
      step();
      const int next = kTile.stages == 2 ? 1 - stage : 0;
      if (kTile.stages == 2 && has_tile()) load_tile(next);
      work_on(at, stage);
      if (kTile.stages == 1) {
        __syncthreads();
        if (has_tile()) load_tile(next);
      }
      stage = next;
    }
    store();
  }

 private:
  static constexpr int kSumsQk = kDimQk / kGroups;  // columns, a warp
  static constexpr int kSumsV = kIsKeys ? kDimV / kGroups : 0;
  static constexpr int kTiles = kTile.slice_tiles();
  static constexpr int kSliceColumns = 8 * kTiles;
  static constexpr int kStep = Products<T>::kStep;
  static constexpr int kSteps = kColumns / kStep;
  // A weight is at most 1 and of 262,144 alike 2^-18, where f16 has 6 bits of 11 left: they meet
  // d_out as many times larger. Their gradients have no such bound, and stay as they are.
  static constexpr float kWeightScale = std::is_same_v<T, __half> ? 4096 : 1;
  // Beyond it the rounding of a log-sum-exp is more than 4e-6 of its row's weights.
  static constexpr float kCoarseLogSumExp = 64;

  template <int kCount>
  static __device__ __forceinline__ void clear(float (&sums)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0;
  }
  // The block's own queries: delta and how scores become weights.
  __device__ __forceinline__ void prepare_rows() {
    meet_copies();
    const int lane = threadIdx.x % 32;
    bool is_coarse = false, is_empty = false;
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < kTile.rows; row += kBackwardThreads / 32) {
      QueryRow to = no_row();
      if (row < item_.rows) {
        const int32_t query = item_.first + row;
        const T* out =
            static_cast<const T*>(a_.out) + query_offset(a_.stride_out, item_.head, query);
        float delta = 0;
#pragma unroll 1
        for (int32_t d = lane; d < a_.dim_v; d += 32) {
          delta = fmaf(static_cast<float>(*s_own_v_.at(row, d)),
                       static_cast<float>(out[d * a_.stride_out[3]]), delta);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
        to.log_sum_exp = a_.log_sum_exp[row_number(a_, item_.sequence, item_.head, query)];
        to.delta = delta;
        to.seen = score_row(a_, item_.sequence, item_.head, query);
        if (to.log_sum_exp == kEmptyRowLogSumExp) {
          to.seen.key_count = 0;
          is_empty = true;
        } else {
          to.shift = to.log_sum_exp * kLog2E;
          is_coarse |= is_coarse_row(to.log_sum_exp);
        }
      }
      if (lane == 0) {
        s_rows_[row] = to;
        if (row < item_.rows) {
          const float weight = ptx::exp2_approx(fmaf(sink_of(a_, item_.head), kLog2E, -to.shift));
          store_row(row, to, weight);
        }
      }
    }
    has_empty_row_ = __syncthreads_or(is_empty) != 0;
    if (__syncthreads_or(is_coarse) != 0) prepare_coarse_rows();
  }
  static __device__ __forceinline__ bool is_coarse_row(float log_sum_exp) {
    return fabsf(log_sum_exp) > kCoarseLogSumExp && fabsf(log_sum_exp) < INFINITY;
  }
  __device__ __forceinline__ void store_row(int row, const QueryRow& from,
                                            float sink_weight) const {
    const int64_t i = row_number(a_, item_.sequence, item_.head, item_.first + row);
    args_.rows.base[i] = from.base;
    args_.rows.shift[i] = from.shift;
    args_.rows.delta[i] = from.delta;
    if (args_.rows.d_sink == nullptr) return;
    args_.rows.d_sink[i] =
        from.log_sum_exp == kEmptyRowLogSumExp ? 0.0f : -sink_weight * from.delta;
  }

  // The softmax of these rows once more, from the very scores that the tiles below see: the largest
  // one's weight is then right whatever its size. All column groups do the same.
  __device__ __forceinline__ void prepare_coarse_rows() {
    constexpr int kAll = kColumns / 8;
    OnlineSoftmax softmax;
#pragma unroll 1
    for (int32_t tile = item_.begin; tile < item_.end; ++tile) {
      __syncthreads();
      load_keys<kColumns>(staged(s_qk_, 0), item_.head / a_.group, tile * kColumns);
      ptx::cp_async_commit();
      meet_copies();
      float s[1][4 * kAll];
      clear(s[0]);
      Products<T>::template scores<kDimQk, 1, kAll>(s, {s_own_qk_.at(warp_row_, 0), kTile.pitch_qk},
                                                    {s_qk_.at(0, 0), kTile.pitch_qk});
      if (g_.scores != Scores::kPlain) transform_scores(s[0], a_);
      const ScoreRow rows[2] = {own_row(0).seen, own_row(1).seen};
      if (g_.scores == Scores::kMasked) {
        mask_scores<T>(s[0], a_, rows, tile * kColumns);
      } else {
        hide_keys(s[0], rows, tile * kColumns);
      }
      softmax.raise(s[0], scale_log2_);
      softmax.weigh(s[0], scale_log2_);
    }
    __syncthreads();  // K has been read
    const float sink = sink_of(a_, item_.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const RowWeight weight = softmax.finish(r, scale_log2_, sink);
      const float largest = softmax.largest[r] == -INFINITY ? 0 : softmax.largest[r];
      const float share = softmax.weight(largest, r, scale_log2_) * softmax.correction[r];
      const int row = thread_row(r);
      QueryRow& to = s_rows_[row];
      if (threadIdx.x % 4 == 0 && group_ == 0 && row < item_.rows &&
          is_coarse_row(to.log_sum_exp)) {
        to.base = largest;
        to.shift = -ptx::log2_approx(share);
        store_row(row, to,
                  ptx::exp2_approx(exponent_of(sink, kLog2E, weight.largest)) / weight.sum);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ int thread_row(int r) const {
    return warp_row_ + 8 * r + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ const QueryRow& own_row(int r) const { return s_rows_[thread_row(r)]; }

  __device__ __forceinline__ void work_on(const Place& at, int stage) {
    const int32_t first = at.tile * kColumns;
    const bool has_work = warp_sees(stage, first);
    const bool is_full = tile_is_full(at.tile, stage, first);
    float s[1][4 * kTiles], d[1][4 * kTiles];
    const SharedRows<T> qk = staged(s_qk_, stage), v = staged(s_v_, stage);
    const bool has_slice = group_ * kSliceColumns < kColumns;
    if (has_work && has_slice) {
      clear(s[0]);
      clear(d[0]);
      Products<T>::template scores<kDimQk, 1, kTiles>(
          s, {s_own_qk_.at(warp_row_, 0), kTile.pitch_qk},
          {qk.at(group_ * kSliceColumns, 0), kTile.pitch_qk});
      Products<T>::template scores<kDimV, 1, kTiles>(
          d, {s_own_v_.at(warp_row_, 0), kTile.pitch_v},
          {v.at(group_ * kSliceColumns, 0), kTile.pitch_v});
      if (is_full && g_.scores == Scores::kPlain) {
        weigh(s[0], d[0], stage, first,
              [&](const QueryRow& row, float& score, float& gradient, int32_t) {
                weigh_plain(row, score, gradient);
              });
      } else {
        weigh(s[0], d[0], stage, first,
              [&](const QueryRow& row, float& score, float& gradient, int32_t key) {
                weigh_any(row, score, gradient, key);
              });
      }
      if constexpr (kGroups > 1) {
        const int column = group_ * kSliceColumns;
        if constexpr (kIsKeys) {
          Products<T>::template share<kTiles>(s[0],
                                              {s_weights_.at(warp_row_, column), kTile.pitch_p});
        }
        Products<T>::template share<kTiles>(d[0],
                                            {s_d_scores_.at(warp_row_, column), kTile.pitch_p});
      }
    }
    const bool cleans = std::is_same_v<T, float> || !is_full;
    if (cleans || kGroups > 1) __syncthreads();
    if (cleans) {
      clean<kDimQk>(qk);
      if constexpr (kIsKeys) clean<kDimV>(v);
      __syncthreads();
    }
    if (!has_work) return;
    if constexpr (kIsKeys) add<kSumsV>(sums_v_, s[0], s_weights_, v);
    add<kSumsQk>(sums_qk_, d[0], s_d_scores_, qk);
  }

  // sums += weights times the streamed rows; weights of all columns, this warp's of the products.
  template <int kSums>
  __device__ __forceinline__ void add(float (&sums)[1][kSums / 2], const float (&own)[4 * kTiles],
                                      const SharedRows<T>& shared, const SharedRows<T>& rows) {
    typename Products<T>::First weights[1][kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (kGroups == 1) {
        weights[0][i].set(own + i * kStep / 2);
      } else {
        weights[0][i].load({shared.at(warp_row_, 0), kTile.pitch_p}, i * kStep);
      }
    }
    constexpr float kKept[1][2] = {{1, 1}};
    Products<T>::template values<1, kSteps, kSums>(sums, kKept, weights,
                                                   {rows.at(0, group_ * kSums), rows.pitch});
  }

  // Whether some row of this warp meets some column: ranges move with the query.
  __device__ __forceinline__ bool warp_sees(int stage, int32_t first) const {
    if (warp_row_ >= item_.rows) return false;
    if constexpr (kIsKeys) {
      const int32_t last = min(kColumns, item_.sequence.len_q - first) - 1;
      const Keys from = visible_keys(a_, item_.sequence, first);
      const Keys to = visible_keys(a_, item_.sequence, first + last);
      const int32_t key = item_.first + warp_row_;
      return key < to.end && key + 16 > from.begin;
    } else {
      const int32_t query = item_.first + warp_row_;
      const Keys from = visible_keys(a_, item_.sequence, query);
      const Keys to =
          visible_keys(a_, item_.sequence, min(query + 15, item_.first + item_.rows - 1));
      return first < to.end && first + kColumns > from.begin;
    }
  }

  // Whether every query sees every key of the tile. A row whose scores are all minus infinity sees
  // them, has no weight, and may hold NaN.
  __device__ __forceinline__ bool tile_is_full(int32_t tile, int stage, int32_t first) const {
    if constexpr (kIsKeys) {
      const int column = threadIdx.x % kColumns;
      const QueryRow& row = s_rows_[stage * kColumns + column];
      const int32_t end = item_.first + item_.rows;
      const auto key_end = static_cast<int32_t>(row.seen.first_key + row.seen.key_count);
      const bool sees_all = row.seen.first_key <= item_.first && key_end >= end;
      // All warps alike: with 64 columns a warp has half of them.
      bool all = a_.mask_kind == MaskKind::kNone && sees_all;
      if constexpr (kColumns > 32) {
        const QueryRow& other = s_rows_[stage * kColumns + (column + 32) % kColumns];
        const auto other_end = static_cast<int32_t>(other.seen.first_key + other.seen.key_count);
        all = all && other.seen.first_key <= item_.first && other_end >= end;
      }
      return __all_sync(~0u, all);
    } else {
      return tile >= item_.full_begin && tile < item_.full_end && !has_empty_row_;
    }
  }

  // use(query row, score, gradient, key) for every element of this thread.
  template <typename Use>
  __device__ __forceinline__ void weigh(float (&s)[4 * kTiles], float (&d)[4 * kTiles], int stage,
                                        int32_t first, Use use) {
    const int column = group_ * kSliceColumns + threadIdx.x % 4 * 2;
    if constexpr (kIsKeys) {
      const int32_t key = item_.first + thread_row(0);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const QueryRow& row = s_rows_[stage * kColumns + column + 8 * i + e];
          use(row, s[4 * i + e], d[4 * i + e], key);
          use(row, s[4 * i + 2 + e], d[4 * i + 2 + e], key + 8);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const QueryRow& row = own_row(r);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            use(row, s[4 * i + 2 * r + e], d[4 * i + 2 * r + e], first + column + 8 * i + e);
          }
        }
      }
    }
  }
  __device__ __forceinline__ void weigh_plain(const QueryRow& row, float& score,
                                              float& gradient) const {
    const float weight = ptx::exp2_approx(fmaf(score - row.base, scale_log2_, -row.shift));
    score = weight * kWeightScale;
    gradient = weight * (gradient - row.delta);
  }
  __device__ __forceinline__ void weigh_any(const QueryRow& row, float& score, float& gradient,
                                            int32_t key) const {
    float slope = 1;
    if (a_.softcap > 0) {
      const float capped = ptx::tanh_accurate(score * (a_.scale / a_.softcap));
      slope = 1 - capped * capped;
      score = a_.softcap * capped;
    } else if (g_.scores != Scores::kPlain) {
      score *= a_.scale;
    }
    float bias = -INFINITY;
    if (static_cast<uint32_t>(key - row.seen.first_key) < row.seen.key_count) {
      bias = mask_bias<T>(a_, row.seen, key);
    }
    const bool is_hidden = bias == -INFINITY;
    const float weight = ptx::exp2_approx(fmaf(score + bias - row.base, scale_log2_, -row.shift));
    score = is_hidden ? 0 : weight * kWeightScale;
    gradient = is_hidden ? 0 : weight * (gradient - row.delta) * slope;
  }

  __device__ __forceinline__ void store() {
    if constexpr (!kIsKeys) {
      store_rows<kSumsQk>(sums_qk_[0], a_.scale, g_.dq, g_.stride_dq, a_.dim_qk, args_.dq_is_whole);
    } else if (g_.dv != nullptr) {
      store_rows<kSumsQk>(sums_qk_[0], a_.scale, g_.dk, g_.stride_dk, a_.dim_qk, args_.dk_is_whole);
      store_rows<kSumsV>(sums_v_[0], 1 / kWeightScale, g_.dv, g_.stride_dv, a_.dim_v,
                         args_.dv_is_whole);
    } else {
      add_values_to_keys();
      store_rows<kSumsQk>(sums_qk_[0], 1, g_.dk, g_.stride_dk, a_.dim_qk, args_.dk_is_whole);
    }
  }
  // dk = scale * dk + dv, through shared memory: other warps may hold these columns of dv.
  __device__ __forceinline__ void add_values_to_keys() {
    auto* s_dv = reinterpret_cast<float*>(s_own_qk_.data);
    static_assert(!kIsKeys || kTile.rows * kDimV * 4 + kBackwardItemBytes +
                                      kQueryRows * kBackwardQueryRowBytes <=
                                  kTile.bytes);
    meet_copies();
#pragma unroll
    for (int i = 0; i < kSumsV / 2; ++i) {
      const int column = group_ * kSumsV + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      s_dv[thread_row(i / 2 % 2) * kDimV + column] = sums_v_[0][i] / kWeightScale;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSumsQk / 2; ++i) {
      const int column = group_ * kSumsQk + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
      const float of_v = column < a_.dim_v ? s_dv[thread_row(i / 2 % 2) * kDimV + column] : 0.0f;
      sums_qk_[0][i] = fmaf(sums_qk_[0][i], a_.scale, of_v);
    }
  }

  template <int kSums>
  __device__ __forceinline__ void store_rows(const float (&sums)[kSums / 2], float scale,
                                             void* data, const int64_t (&stride)[4], int32_t dim,
                                             bool is_whole) const {
    const int first_column = group_ * kSums + threadIdx.x % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = thread_row(r);
      if (row >= item_.rows) continue;
      const int64_t offset = kIsKeys ? key_offset(stride, item_.head, item_.first + row)
                                     : query_offset(stride, item_.head, item_.first + row);
      T* to = static_cast<T*>(data) + offset + first_column * stride[3];
#pragma unroll
      for (int i = 0; i < kSums / 8; ++i) {
        const int left = dim - first_column - 8 * i;
        const float x = sums[4 * i + 2 * r] * scale, y = sums[4 * i + 2 * r + 1] * scale;
        if (is_whole) {
          if (left > 0) store_pair(to + 8 * i, x, y);
        } else {
          if (left > 0) to[8 * i * stride[3]] = static_cast<T>(x);
          if (left > 1) to[(8 * i + 1) * stride[3]] = static_cast<T>(y);
        }
      }
    }
  }
  static __device__ __forceinline__ void store_pair(T* to, float x, float y) {
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(to) = ptx::pack<T>(x, y);
    } else {
      *reinterpret_cast<float2*>(to) = make_float2(x, y);
    }
  }

  const float scale_log2_;
  int warp_row_;  // its first one
  int group_;     // of columns
  bool has_empty_row_ = false;
  float sums_qk_[1][kSumsQk / 2];
  float sums_v_[1][kIsKeys ? kSumsV / 2 : 1];
};

}  // namespace portable
}  // namespace wh::cuda
