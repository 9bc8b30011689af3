// What a block of cuda_portable_backward has in shared memory: its own rows, what streams past
// them, and how both come there.
#pragma once

#include <cmath>

#include "cuda/common/element.cuh"
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
class BackwardMemory {
 public:
  static constexpr BackwardTile kTile = backward_tile({kDimQk, kDimV}, sizeof(T), kSide, kMemory);
  static_assert(kTile.bytes > 0);

 protected:
  static constexpr bool kIsKeys = kSide == Side::kKeys;
  static constexpr int kColumns = kTile.columns;
  static constexpr int kGroups = kTile.column_groups;
  static constexpr int kQueryRows = kIsKeys ? kTile.stages * kColumns : kTile.rows;

  __device__ __forceinline__ BackwardMemory(const PortableBackwardArgs& args,
                                            const BackwardItem& item, unsigned char* s_memory)
      : args_(args), g_(args.gradients), a_(args.gradients.attention), item_(item) {
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
  }

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
  // Where a query, or a key, of the sequence lies.
  __device__ __forceinline__ int64_t query_offset(const int64_t (&stride)[4], int32_t head,
                                                  int32_t query) const {
    const Sequence& of = item_.sequence;
    return of.query_batch * stride[0] + head * stride[1] + (of.first_query + query) * stride[2];
  }
  __device__ __forceinline__ int64_t key_offset(const int64_t (&stride)[4], int32_t head_kv,
                                                int32_t key) const {
    const Sequence& of = item_.sequence;
    return of.key_batch * stride[0] + head_kv * stride[1] + (of.first_key + key) * stride[2];
  }
  // Rows from `offset` on; those outside of [begin, end), counted from it, are not read.
  template <int kRows, int kColumnsOf>
  __device__ __forceinline__ void load(const SharedRows<T>& to, const void* data,
                                       const int64_t (&stride)[4], int64_t offset, int32_t begin,
                                       int32_t end, int32_t dim, bool is_whole) {
    const TileRows<T> rows{
        static_cast<const T*>(data) + offset, stride[2], stride[3], dim, begin, end, is_whole};
    int thread = static_cast<int>(threadIdx.x);
    // Opaque: what follows from it is computed anew for each tile, as the sums leave no registers
    // for it (bf16 keys of 128/128 took a stack frame).
    asm volatile("" : "+r"(thread));
    load_rows<kRows, kColumnsOf, kBackwardThreads>(thread, rows, AsyncCopy{to});
  }
  template <int kRows>
  __device__ __forceinline__ void load_queries(const SharedRows<T>& q, const SharedRows<T>& d_out,
                                               int32_t head, int32_t first) {
    const int32_t end = item_.sequence.len_q - first;
    load<kRows, kDimQk>(q, g_.q, g_.stride_q, query_offset(g_.stride_q, head, first), -first, end,
                        a_.dim_qk, args_.q_is_whole);
    load<kRows, kDimV>(d_out, g_.d_out, g_.stride_d_out, query_offset(g_.stride_d_out, head, first),
                       -first, end, a_.dim_v, args_.d_out_is_whole);
  }
  template <int kRows>
  __device__ __forceinline__ void load_keys(const SharedRows<T>& k, int32_t head_kv,
                                            int32_t first) {
    const Keys& present = item_.sequence.present;
    load<kRows, kDimQk>(k, g_.k, g_.stride_k, key_offset(g_.stride_k, head_kv, first),
                        present.begin - first, present.end - first, a_.dim_qk, args_.k_is_whole);
  }
  template <int kRows>
  __device__ __forceinline__ void load_values(const SharedRows<T>& v, int32_t head_kv,
                                              int32_t first) {
    const Keys& present = item_.sequence.present;
    load<kRows, kDimV>(v, a_.v, a_.stride_v, key_offset(a_.stride_v, head_kv, first),
                       present.begin - first, present.end - first, a_.dim_v, args_.v_is_whole);
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
  // The streamed queries.
  __device__ __forceinline__ void fetch_rows(int stage, int32_t first) {
    const auto thread = static_cast<int>(threadIdx.x);
    if (thread >= kColumns) return;
    const int32_t query = first + thread;
    QueryRow row = no_row();
    if (query < item_.sequence.len_q) {
      const int64_t i = row_number(a_, item_.sequence, place_.head, query);
      row.base = args_.rows.base[i];
      row.shift = args_.rows.shift[i];
      row.delta = args_.rows.delta[i];
      row.log_sum_exp = a_.log_sum_exp[i];
      row.seen = score_row(a_, item_.sequence, place_.head, query);
      if (row.log_sum_exp == kEmptyRowLogSumExp) row.seen.key_count = 0;
    }
    s_rows_[stage * kColumns + thread] = row;
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

  const PortableBackwardArgs& args_;
  const GradientArgs& g_;
  const AttentionArgs& a_;
  const BackwardItem& item_;          // in shared memory
  QueryRow* s_rows_;                  // own ones, or those of the stages
  SharedRows<T> s_own_qk_, s_own_v_;  // q and d_out, or k and v
  SharedRows<T> s_qk_, s_v_;          // the other side's
  SharedRows<T> s_weights_, s_d_scores_;
  Place place_;  // the next tile to load
  int32_t last_head_;
};

}  // namespace portable
}  // namespace wh::cuda
