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

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/common/element.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/portable/backward/kernel.h"
#include "cuda/portable/load.h"
#include "cuda/portable/products.cuh"
#include "cuda/ptx/cp_async.cuh"

namespace wh::cuda {
namespace portable {

// A query row as the blocks read it, in shared memory.
struct alignas(16) QueryRow {
  float base, shift, delta;
  float log_sum_exp;  // of the row's own block alone
  ScoreRow seen;
};
static_assert(sizeof(QueryRow) == kBackwardQueryRowBytes);

template <Side kSide, int kDimQk, int kDimV, typename T, SharedMemory kMemory>
class BackwardBlock {
 public:
  static constexpr BackwardTile kTile = backward_tile({kDimQk, kDimV}, sizeof(T), kSide, kMemory);
  static_assert(kTile.bytes > 0);

  __device__ __forceinline__ BackwardBlock(const PortableBackwardArgs& args,
                                           const BackwardItem& item, unsigned char* s_memory)
      : args_(args),
        g_(args.gradients),
        a_(args.gradients.attention),
        item_(item),
        scale_log2_((g_.scores == Scores::kPlain ? a_.scale : 1) * kLog2E) {
    s_rows_ = reinterpret_cast<QueryRow*>(s_memory + kBackwardItemBytes);
    auto* next = reinterpret_cast<T*>(s_rows_ + kQueryRows);
    const auto take = [&next](int rows, int pitch) {
      SharedRows<T> taken{next, pitch};
      next += rows * pitch;
      return taken;
    };
    s_own_qk_ = take(kTile.rows, kTile.pitch_qk);
    s_own_v_ = take(kTile.rows, kTile.pitch_v);
    s_qk_ = take(kTile.stages * kColumns, kTile.pitch_qk);
    s_v_ = take(kTile.stages * kColumns, kTile.pitch_v);
    s_weights_ = take(kTile.rows, kTile.pitch_p);
    s_d_scores_ = take(kTile.rows, kTile.pitch_p);
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
  static constexpr bool kIsKeys = kSide == Side::kKeys;
  static constexpr int kColumns = kTile.columns;
  static constexpr int kGroups = kTile.column_groups;
  static constexpr int kSumsQk = kDimQk / kGroups;  // columns, a warp
  static constexpr int kSumsV = kIsKeys ? kDimV / kGroups : 0;
  static constexpr int kTiles = kTile.slice_tiles();
  static constexpr int kSliceColumns = 8 * kTiles;
  static constexpr int kStep = Products<T>::kStep;
  static constexpr int kSteps = kColumns / kStep;
  static constexpr int kQueryRows = kIsKeys ? kTile.stages * kColumns : kTile.rows;
  // A weight is at most 1 and of 262,144 alike 2^-18, where f16 has 6 bits of 11 left: they meet
  // d_out as many times larger. Their gradients have no such bound, and stay as they are.
  static constexpr float kWeightScale = std::is_same_v<T, __half> ? 4096 : 1;
  // Beyond it the rounding of a log-sum-exp is more than 4e-6 of its row's weights.
  static constexpr float kCoarseLogSumExp = 64;

  // What streams: a tile, and of queries whose head.
  struct Place {
    int32_t head, tile;
  };
  __device__ __forceinline__ void begin() {
    place_ = {kIsKeys ? item_.head * a_.group : item_.head, item_.begin};
    last_head_ = kIsKeys ? place_.head + a_.group - 1 : place_.head;
    if (item_.begin >= item_.end) last_head_ = -1;
  }
  __device__ __forceinline__ bool has_tile() const { return place_.head <= last_head_; }
  __device__ __forceinline__ void step() {
    if (++place_.tile < item_.end) return;
    place_.tile = item_.begin;
    ++place_.head;
  }

  template <int kCount>
  static __device__ __forceinline__ void clear(float (&sums)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] = 0;
  }
  static __device__ __forceinline__ void meet_copies() {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // How a loader fills rows of shared memory.
  struct AsyncCopy {
    SharedRows<T> to;
    __device__ __forceinline__ void chunk(int row, int column, const T* from, int bytes) const {
      ptx::cp_async<16>(ptx::shared_address(to.at(row, column)), from, bytes);
    }
    __device__ __forceinline__ void element(int row, int column, T value) const {
      *to.at(row, column) = value;
    }
  };
  // Rows [first, first + kRows) of a head; those outside of [begin, end) are not read.
  template <int kRows, int kColumnsOf>
  __device__ __forceinline__ void load(const SharedRows<T>& to, const void* data,
                                       const int64_t (&stride)[4], int32_t head, int32_t first,
                                       int32_t begin, int32_t end, int32_t dim, bool is_whole) {
    const TileRows<T> rows{static_cast<const T*>(data) + item_.batch_idx * stride[0] +
                               head * stride[1] + first * stride[2],
                           stride[2],
                           stride[3],
                           dim,
                           begin - first,
                           end - first,
                           is_whole};
    int thread = static_cast<int>(threadIdx.x);
    // Opaque: what follows from it is computed anew for each tile, as the sums leave no registers
    // for it (bf16 keys of 128/128 took a stack frame).
    asm volatile("" : "+r"(thread));
    load_rows<kRows, kColumnsOf, kBackwardThreads>(thread, rows, AsyncCopy{to});
  }
  template <int kRows>
  __device__ __forceinline__ void load_queries(const SharedRows<T>& q, const SharedRows<T>& d_out,
                                               int32_t head, int32_t first) {
    load<kRows, kDimQk>(q, g_.q, g_.stride_q, head, first, 0, a_.len_q, a_.dim_qk,
                        args_.q_is_whole);
    load<kRows, kDimV>(d_out, g_.d_out, g_.stride_d_out, head, first, 0, a_.len_q, a_.dim_v,
                       args_.d_out_is_whole);
  }
  template <int kRows>
  __device__ __forceinline__ void load_keys(const SharedRows<T>& k, int32_t head_kv,
                                            int32_t first) {
    load<kRows, kDimQk>(k, g_.k, g_.stride_k, head_kv, first, item_.present.begin,
                        item_.present.end, a_.dim_qk, args_.k_is_whole);
  }
  template <int kRows>
  __device__ __forceinline__ void load_values(const SharedRows<T>& v, int32_t head_kv,
                                              int32_t first) {
    load<kRows, kDimV>(v, a_.v, a_.stride_v, head_kv, first, item_.present.begin, item_.present.end,
                       a_.dim_v, args_.v_is_whole);
  }
  __device__ __forceinline__ SharedRows<T> staged(const SharedRows<T>& rows, int stage) const {
    return {rows.at(stage * kColumns, 0), rows.pitch};
  }

  __device__ __forceinline__ void load_own() {
    if constexpr (kIsKeys) {
      load_keys<kTile.rows>(s_own_qk_, item_.head, item_.first);
      load_values<kTile.rows>(s_own_v_, item_.head, item_.first);
    } else {
      load_queries<kTile.rows>(s_own_qk_, s_own_v_, item_.head, item_.first);
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_tile(int stage) {
    const int32_t first = place_.tile * kColumns;
    const SharedRows<T> qk = staged(s_qk_, stage), v = staged(s_v_, stage);
    if constexpr (kIsKeys) {
      load_queries<kColumns>(qk, v, place_.head, first);
      fetch_rows(stage, first);
    } else {
      load_keys<kColumns>(qk, item_.head / a_.group, first);
      load_values<kColumns>(v, item_.head / a_.group, first);
    }
    ptx::cp_async_commit();
  }

  // What is left of a row that sees nothing: no weight, and no key.
  static __device__ __forceinline__ QueryRow no_row() {
    return {0, INFINITY, 0, -INFINITY, {0, 0, nullptr}};
  }
  __device__ __forceinline__ int64_t row_index(int32_t head, int32_t query) const {
    return (int64_t{item_.batch_idx} * a_.heads_q + head) * a_.len_q + query;
  }
  // The streamed queries.
  __device__ __forceinline__ void fetch_rows(int stage, int32_t first) {
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread >= kColumns) return;
    const int32_t query = first + thread;
    QueryRow row = no_row();
    if (query < a_.len_q) {
      const int64_t i = row_index(place_.head, query);
      row.base = args_.rows.base[i];
      row.shift = args_.rows.shift[i];
      row.delta = args_.rows.delta[i];
      row.log_sum_exp = a_.log_sum_exp[i];
      row.seen = score_row(a_, item_.sequence(a_), place_.head, query);
      if (row.log_sum_exp == kEmptyRowLogSumExp) row.seen.key_count = 0;
    }
    s_rows_[stage * kColumns + thread] = row;
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
        const T* out = static_cast<const T*>(a_.out) + item_.batch_idx * a_.stride_out[0] +
                       item_.head * a_.stride_out[1] + query * a_.stride_out[2];
        float delta = 0;
#pragma unroll 1
        for (int32_t d = lane; d < a_.dim_v; d += 32) {
          delta = fmaf(static_cast<float>(*s_own_v_.at(row, d)),
                       static_cast<float>(out[d * a_.stride_out[3]]), delta);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
        to.log_sum_exp = a_.log_sum_exp[row_index(item_.head, query)];
        to.delta = delta;
        to.seen = score_row(a_, item_.sequence(a_), item_.head, query);
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
    const int64_t i = row_index(item_.head, item_.first + row);
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
      const int32_t last = min(kColumns, a_.len_q - first) - 1;
      const Keys from = visible_keys(a_, item_.sequence(a_), first);
      const Keys to = visible_keys(a_, item_.sequence(a_), first + last);
      const int32_t key = item_.first + warp_row_;
      return key < to.end && key + 16 > from.begin;
    } else {
      const int32_t query = item_.first + warp_row_;
      const Keys from = visible_keys(a_, item_.sequence(a_), query);
      const Keys to =
          visible_keys(a_, item_.sequence(a_), min(query + 15, item_.first + item_.rows - 1));
      return first < to.end && first + kColumns > from.begin;
    }
  }

  // Whether every query sees every key of the tile. A row whose scores are all minus infinity sees
  // them, has no weight, and may hold NaN.
  __device__ __forceinline__ bool tile_is_full(int32_t tile, int stage, int32_t first) const {
    if constexpr (kIsKeys) {
      const int column = threadIdx.x % kColumns;
      const QueryRow& row = s_rows_[stage * kColumns + column];
      const int32_t end = min(item_.first + item_.rows, a_.len_k);
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

  // Takes NaN and infinity out of the streamed tile.
  template <int kDim>
  __device__ __forceinline__ void clean(const SharedRows<T>& rows) {
    bool dropped = false;
#pragma unroll 1
    for (int i = threadIdx.x; i < kColumns * kDim / 4; i += kBackwardThreads) {
      T* at = rows.at(i / (kDim / 4), i % (kDim / 4) * 4);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (fabsf(static_cast<float>(at[e])) < INFINITY) continue;
        at[e] = T(0.0f);
        dropped = true;
      }
    }
    if (dropped) *args_.rows.dropped = 1;  // every writer writes the same
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
      T* to = static_cast<T*>(data) + item_.batch_idx * stride[0] + item_.head * stride[1] +
              (item_.first + row) * stride[2] + first_column * stride[3];
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

  const PortableBackwardArgs& args_;
  const GradientArgs& g_;
  const AttentionArgs& a_;
  const BackwardItem& item_;  // in shared memory
  const float scale_log2_;
  QueryRow* s_rows_;                  // own ones, or those of the stages
  SharedRows<T> s_own_qk_, s_own_v_;  // q and d_out, or k and v
  SharedRows<T> s_qk_, s_v_;          // the other side's
  SharedRows<T> s_weights_, s_d_scores_;
  int warp_row_;  // its first one
  int group_;     // of columns
  Place place_;   // the next tile to load
  int32_t last_head_;
  bool has_empty_row_ = false;
  float sums_qk_[1][kSumsQk / 2];
  float sums_v_[1][kIsKeys ? kSumsV / 2 : 1];
};

}  // namespace portable

template <Side kSide, int kDimQk, int kDimV, typename T, SharedMemory kMemory>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    cuda_portable_backward(const __grid_constant__ PortableBackwardArgs args) {
  using Block = portable::BackwardBlock<kSide, kDimQk, kDimV, T, kMemory>;
  extern __shared__ __align__(16) unsigned char s_memory[];
  auto* item = reinterpret_cast<BackwardItem*>(s_memory);
  if (threadIdx.x == 0) {
    *item = BackwardItem(args.gradients, kSide, args.tiles,
                         args.first_item + static_cast<int32_t>(blockIdx.x), Block::kTile.rows,
                         Block::kTile.columns);
  }
  __syncthreads();
  Block(args, *item, s_memory).run();
}

}  // namespace wh::cuda
