// What a block of cuda_portable computes; see kernel.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/common/element.cuh"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/portable/kernel.h"
#include "cuda/portable/load.h"
#include "cuda/portable/products.cuh"
#include "cuda/portable/seen_rows.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {
namespace portable {

static_assert(sizeof(PackedItem) <= kPortableItemBytes);

template <int kDimQk, int kDimV, typename T, SharedMemory kMemory, TilePages kPages>
class Block {
 public:
  static constexpr PortableTile kTile = portable_tile({kDimQk, kDimV}, sizeof(T), kMemory, kPages);
  static_assert(kTile.bytes > 0 && kTile.threads() <= 256);

  __device__ __forceinline__ Block(const PortableArgs& args, const PackedItem& item,
                                   unsigned char* s_memory)
      : args_(args),
        a_(args.attention),
        item_(item),
        scale_log2_((args.scores == Scores::kPlain ? a_.scale : 1) * kLog2E) {
    auto* next = reinterpret_cast<T*>(s_memory);
    const auto take = [&next](int rows, int pitch) {
      SharedRows<T> taken{next, pitch};
      next += rows * pitch;
      return taken;
    };
    s_q_ = take(kTile.rows, kTile.pitch_qk);
    s_k_ = take(kKeys, kTile.pitch_qk);
    s_v_ =
        kTile.shares_buffer ? SharedRows<T>{s_k_.data, kTile.pitch_v} : take(kKeys, kTile.pitch_v);
    s_p_ = take(kTile.rows, kTile.pitch_p);
    s_tops_ = reinterpret_cast<float*>(next);
    s_dropped_ = reinterpret_cast<int32_t*>(s_tops_ + (kGroups > 1 ? kTile.rows * kGroups : 0));
    warp_row_ = threadIdx.x / 32 / kGroups * kTile.warp_rows;
    group_ = threadIdx.x / 32 % kGroups;
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x == 0) *s_dropped_ = 0;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o_[m][i] = 0;
    }
    if (item_.tile_begin < item_.tile_end) {
      load_queries();
      load_keys(item_.tile_begin);
    }
#pragma unroll 1
    for (int32_t tile = item_.tile_begin; tile < item_.tile_end; ++tile) work_on(tile);
    if constexpr (kGroups > 1) gather_sums();
    const bool is_split = args_.partials.splits > 1;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) store_row(m, r, is_split);
    }
    __syncthreads();
    if (*s_dropped_ != 0) restore(is_split);
  }

 private:
  static constexpr int kKeys = kTile.keys;
  static constexpr int kGroups = kTile.column_groups;
  static constexpr int kThreads = kTile.threads();
  static constexpr int kRowTiles = kTile.warp_rows / 16;
  static constexpr int kColumns = kDimV / kGroups;  // of V, a warp
  static constexpr int kTiles = kTile.slice_tiles();
  static constexpr int kSliceKeys = 8 * kTiles;
  // Exponentials beside products (2 to 5 % faster at 16 rows) take registers that the sums of 32
  // rows and the halves of f32's weights need.
  static constexpr bool kWeighsFirst = kRowTiles > 1 || sizeof(T) == 4;

  __device__ __forceinline__ PackedRow packed_row(int row) const {
    return {a_, args_.rows, item_, row};
  }
  __device__ __forceinline__ int thread_row(int m, int r) const {
    return warp_row_ + 16 * m + 8 * r + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ bool warp_has_rows() const { return warp_row_ < item_.rows; }
  __device__ __forceinline__ bool has_slice() const { return group_ * kSliceKeys < kKeys; }

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

  __device__ __forceinline__ void load_queries() {
    const TileRows<T> rows{static_cast<const T*>(args_.q),
                           0,
                           args_.stride_q[3],
                           a_.dim_qk,
                           0,
                           item_.rows,
                           args_.q_is_whole};
    load_scattered<kTile.rows, kDimQk, kThreads>(
        static_cast<int>(threadIdx.x), rows,
        [&](int row) { return packed_row(row).offset(args_.stride_q, item_); }, AsyncCopy{s_q_});
  }
  // K or V of the item's kv head, in all of its pages where there are some.
  struct HeadKeys {
    const T* first;
    const int64_t (&stride)[4];
    int32_t dim;
    bool is_whole;
  };
  __device__ __forceinline__ HeadKeys keys() const {
    return {static_cast<const T*>(args_.k) + item_.head_kv * args_.stride_k[1], args_.stride_k,
            a_.dim_qk, args_.k_is_whole};
  }
  __device__ __forceinline__ HeadKeys values() const {
    return {static_cast<const T*>(a_.v) + item_.head_kv * a_.stride_v[1], a_.stride_v, a_.dim_v,
            args_.v_is_whole};
  }

  // Keys that do not exist are not read.
  template <int kColumnsOf>
  __device__ __forceinline__ void load_tile(const SharedRows<T>& to, const HeadKeys& from,
                                            int32_t tile) {
    const int32_t first = tile * kKeys;
    const KeyRows key_rows = item_.key_rows(a_);
    TileRows<T> rows{from.first,
                     from.stride[2],
                     from.stride[3],
                     from.dim,
                     item_.sequence.present.begin - first,
                     item_.sequence.present.end - first,
                     from.is_whole};
    int thread = static_cast<int>(threadIdx.x);
    // Opaque: what follows from it is computed anew for each tile, as 64 keys beside 32 x 128 sums
    // leave no registers for it.
    if constexpr (kRowTiles == 2 && kColumns == 128) asm volatile("" : "+r"(thread));
    const bool is_cut = kTile.takes_cut_tiles() && args_.pages_cut_tiles;
    if (is_cut) {
      load_pages<kKeys, kColumnsOf, kThreads>(thread, rows, key_rows, from.stride[0], first,
                                              AsyncCopy{to});
    } else {
      rows.first += key_rows.offset(from.stride[0], from.stride[2], first);
      load_rows<kKeys, kColumnsOf, kThreads>(thread, rows, AsyncCopy{to});
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void load_keys(int32_t tile) { load_tile<kDimQk>(s_k_, keys(), tile); }
  __device__ __forceinline__ void load_values(int32_t tile) {
    load_tile<kDimV>(s_v_, values(), tile);
  }

  static __device__ __forceinline__ void meet_copies() {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void work_on(int32_t tile) {
    meet_copies();  // K is here, and V has been read
    if constexpr (!kTile.shares_buffer) load_values(tile);
    float s[kRowTiles][4 * kTiles];
    const bool has_scores = warp_has_rows() && has_slice();
    if (has_scores) scores(s, tile);
    if constexpr (kGroups > 1) tell_tops(s, has_scores);
    meet_copies();  // K has been read; V is here where it has a buffer of its own
    if constexpr (kTile.shares_buffer) {
      load_values(tile);
    } else if (tile + 1 < item_.tile_end) {
      load_keys(tile + 1);
    }
    if constexpr (kGroups > 1) {
      share_weights(s, has_scores);
    } else if constexpr (kWeighsFirst) {
      if (has_scores) weigh(s);
    }
    if constexpr (kTile.shares_buffer) {
      meet_copies();  // and the weights are
    } else if constexpr (kGroups > 1) {
      __syncthreads();
    }
    if (std::is_same_v<T, float> || !item_.tiles.is_clean(tile)) {
      clean_values(tile);
      __syncthreads();
    }
    if (warp_has_rows()) {
      // Without a branch between them the last exponentials run beside the first products.
      if constexpr (kGroups == 1 && !kWeighsFirst) weigh(s);
      constexpr int kStep = Products<T>::kStep;
      typename Products<T>::First weights[kRowTiles][kKeys / kStep];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kKeys / kStep; ++i) {
          if constexpr (kGroups == 1) {
            weights[m][i].set(s[m] + i * kStep / 2);
          } else {
            weights[m][i].load({s_p_.at(warp_row_, 0), kTile.pitch_p}, i * kStep);
          }
        }
      }
      float correction[kRowTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) correction[m][r] = softmax_[m].correction[r];
      }
      Products<T>::template values<kRowTiles, kKeys / kStep, kColumns>(
          o_, correction, weights, {s_v_.at(0, group_ * kColumns), kTile.pitch_v});
    }
    if constexpr (kTile.shares_buffer) {
      __syncthreads();
      if (tile + 1 < item_.tile_end) load_keys(tile + 1);
    }
  }

  __device__ __forceinline__ void scores(float (&s)[kRowTiles][4 * kTiles], int32_t tile) {
    const int32_t first_key = tile * kKeys + group_ * kSliceKeys;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) s[m][i] = 0;
    }
    Products<T>::template scores<kDimQk, kRowTiles, kTiles>(
        s, {s_q_.at(warp_row_, 0), kTile.pitch_qk},
        {s_k_.at(group_ * kSliceKeys, 0), kTile.pitch_qk});
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (args_.scores != Scores::kPlain) transform_scores(s[m], a_);
      if (item_.tiles.is_full(tile)) continue;
      ScoreRow rows[2];
      see_rows(args_, item_, thread_row(m, 0), rows);
      if (args_.scores == Scores::kMasked) {
        mask_scores<T>(s[m], a_, rows, first_key);
      } else {
        hide_keys(s[m], rows, first_key);
      }
    }
  }

  // All rows at once: one after another, a warp waits four times for the largest score's shuffles.
  __device__ __forceinline__ void weigh(float (&s)[kRowTiles][4 * kTiles]) {
    float tops[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) tops[m][r] = softmax_[m].top(s[m], r);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) softmax_[m].raise(s[m], tops[m], scale_log2_);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) softmax_[m].weigh(s[m], scale_log2_);
  }

  // Of this warp's keys, for the other warps of its rows.
  __device__ __forceinline__ void tell_tops(const float (&s)[kRowTiles][4 * kTiles],
                                            bool has_scores) {
    static_assert(kRowTiles == 1 || kGroups == 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = has_scores ? softmax_[0].top(s[0], r) : -INFINITY;
      if (threadIdx.x % 4 == 0) s_tops_[thread_row(0, r) * kGroups + group_] = top;
    }
  }
  __device__ __forceinline__ void share_weights(float (&s)[kRowTiles][4 * kTiles],
                                                bool has_scores) {
    if (!warp_has_rows()) return;
    float tops[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      tops[r] = softmax_[0].largest[r];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        tops[r] = fmaxf(tops[r], s_tops_[thread_row(0, r) * kGroups + g]);
      }
    }
    softmax_[0].raise(s[0], tops, scale_log2_);  // a warp without scores corrects its sums alone
    if (has_scores) {
      softmax_[0].weigh(s[0], scale_log2_);
      Products<T>::template share<kTiles>(s[0],
                                          {s_p_.at(warp_row_, group_ * kSliceKeys), kTile.pitch_p});
    }
  }
  // The sums of all column groups, in all of them.
  __device__ __forceinline__ void gather_sums() {
    float sums[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums[r] = softmax_[0].sum[r];
      sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
      sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
    }
    __syncthreads();  // the largest scores have been read
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (threadIdx.x % 4 == 0) s_tops_[thread_row(0, r) * kGroups + group_] = sums[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) total += s_tops_[thread_row(0, r) * kGroups + g];
      // finish() adds the four threads of a row.
      softmax_[0].sum[r] = threadIdx.x % 4 == 0 ? total : 0;
    }
  }

  static __device__ __forceinline__ bool is_finite(T x) {
    return fabsf(static_cast<float>(x)) < INFINITY;
  }

  // Takes NaN and infinity out of a tile of V.
  __device__ __forceinline__ void clean_values(int32_t tile) {
    bool dropped = false;
#pragma unroll 1
    for (int i = threadIdx.x; i < kKeys * kDimV / 4; i += kThreads) {
      T* at = s_v_.at(i / (kDimV / 4), i % (kDimV / 4) * 4);
      using Four = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
      union {
        Four bits;
        T values[4];
      };
      bits = *reinterpret_cast<const Four*>(at);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (is_finite(values[e])) continue;
        at[e] = T(0.0f);
        dropped = true;
      }
    }
    if (dropped) *s_dropped_ = 1;
  }

  // Adds again what clean_values() took out to the rows that see it, but for empty ones, which stay
  // 0. A warp takes the rows and columns that it stored. Rare: speed does not matter.
  __device__ __forceinline__ void restore(bool is_split) const {
    const int32_t begin = max(item_.seen.begin, item_.tile_begin * kKeys);
    const int32_t end = min(item_.seen.end, item_.tile_end * kKeys);
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll 1
      for (int i = 0; i < 16; ++i) {
        const auto& factors = softmax_[m].correction;
        const float factor = __shfl_sync(~0u, i < 8 ? factors[0] : factors[1], i % 8 * 4);
        const int row = warp_row_ + 16 * m + i;
        if (row >= item_.rows || factor == 0) continue;
        const PackedRow at = packed_row(row);
        const ScoreRow mask = score_row(a_, item_.sequence, at.head, at.query);
#pragma unroll 1
        for (int column = threadIdx.x % 32; column < kColumns; column += 32) {
          restore_value({begin, end}, at, mask, group_ * kColumns + column, is_split);
        }
      }
    }
  }
  __device__ __forceinline__ void restore_value(Keys keys, const PackedRow& at,
                                                const ScoreRow& mask, int32_t column,
                                                bool is_split) const {
    if (column >= a_.dim_v) return;
    float added = 0;
    bool has_dropped = false;
#pragma unroll 1
    for (int32_t key = keys.begin; key < keys.end; ++key) {
      const int64_t row = item_.key_rows(a_).offset(a_.stride_v[0], a_.stride_v[2], key);
      const T value = values().first[row + column * a_.stride_v[3]];
      if (is_finite(value)) continue;
      const bool was_dropped = std::is_same_v<T, float> || !item_.tiles.is_clean(key / kKeys);
      if (!was_dropped || static_cast<uint32_t>(key - mask.first_key) >= mask.key_count ||
          mask_bias<T>(a_, mask, key) == -INFINITY) {
        continue;
      }
      added += static_cast<float>(value);
      has_dropped = true;
    }
    if (!has_dropped) return;
    if (is_split) {
      partial_row(at)[column] += added;
    } else {
      T& out = out_row(at)[column * a_.stride_out[3]];
      out = static_cast<T>(static_cast<float>(out) + added);
    }
  }

  __device__ __forceinline__ T* out_row(PackedRow at) const {
    return static_cast<T*>(a_.out) + at.offset(a_.stride_out, item_);
  }
  __device__ __forceinline__ float* partial_row(PackedRow at) const {
    const Partials& partials = args_.partials;
    return partials.sums + (item_.split * partials.rows + at.index(a_, item_)) * partials.columns;
  }

  __device__ __forceinline__ void store_row(int m, int r, bool is_split) {
    const int row = thread_row(m, r);
    const bool exists = row < item_.rows;
    const PackedRow at = packed_row(min(row, item_.rows - 1));
    const float sink = is_split ? -INFINITY : sink_of(a_, at.head);
    const RowWeight weight = softmax_[m].finish(r, scale_log2_, sink);
    const float factor = softmax_[m].correction[r];
    if (!exists) return;
    const int first_column = group_ * kColumns + threadIdx.x % 4 * 2;
    if (is_split) {
      const Partials& partials = args_.partials;
      if (first_column == 0) {
        partials.weights[at.index(a_, item_) * partials.splits + item_.split] = weight;
      }
      float* to = partial_row(at) + first_column;
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        if (first_column + 8 * i >= partials.columns) continue;  // combine.cu reads whole float4
        *reinterpret_cast<float2*>(to + 8 * i) =
            make_float2(o_[m][4 * i + 2 * r] * factor, o_[m][4 * i + 2 * r + 1] * factor);
      }
      return;
    }
    if (first_column == 0 && a_.log_sum_exp != nullptr) {
      a_.log_sum_exp[at.index(a_, item_)] = log_sum_exp(weight);
    }
    T* to = out_row(at) + first_column * a_.stride_out[3];
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      const int left = a_.dim_v - first_column - 8 * i;
      // A row without weight: its sums may be 0 * NaN.
      const float x = factor == 0 ? 0 : o_[m][4 * i + 2 * r] * factor;
      const float y = factor == 0 ? 0 : o_[m][4 * i + 2 * r + 1] * factor;
      if (args_.out_is_whole) {
        if (left > 0) store_pair(to + 8 * i, x, y);
      } else {
        if (left > 0) to[8 * i * a_.stride_out[3]] = static_cast<T>(x);
        if (left > 1) to[(8 * i + 1) * a_.stride_out[3]] = static_cast<T>(y);
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

  const PortableArgs& args_;
  const AttentionArgs& a_;
  const PackedItem& item_;  // in shared memory: 16 registers that the sums need
  const float scale_log2_;
  SharedRows<T> s_q_, s_k_, s_v_, s_p_;
  float* s_tops_;  // [rows, groups]
  int32_t* s_dropped_;
  int warp_row_;  // its first one
  int group_;     // of columns
  OnlineSoftmax softmax_[kRowTiles];
  float o_[kRowTiles][kColumns / 2];
};

}  // namespace portable
}  // namespace wh::cuda
