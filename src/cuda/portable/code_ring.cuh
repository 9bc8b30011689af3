// What a block over codes has in shared memory, and how it gets there: queries as bf16 in parts,
// and a ring of tiles of codes and scales.
#pragma once

#include <cuda_bf16.h>

#include "cuda/common/scores.cuh"
#include "cuda/portable/code_args.h"
#include "cuda/portable/code_layout.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {
namespace {

template <int kDimV, int kRows>
class CodeRing {
 public:
  static constexpr CodeTile kTile{kDimV, kRows};

  __device__ __forceinline__ CodeRing(const CodeTileArgs& args, const PackedItem& item,
                                      unsigned char* s_memory)
      : args_(args),
        p_(args.portable),
        a_(args.portable.attention),
        item_(item),
        s_q_(reinterpret_cast<__nv_bfloat16*>(s_memory)),
        s_ring_(s_memory + args.layout.queries_bytes(kRows)) {}

 protected:
  static constexpr int kThreads = kTile.threads();
  static constexpr int kKeys = kTile.keys();

  __device__ __forceinline__ PackedRow packed_row(int row) const {
    return {a_, p_.rows, item_, row};
  }
  __device__ __forceinline__ KvPlace place(int32_t key) const {
    const KeyRows::Place at = item_.key_rows(a_).place(key);
    return {at.batch_idx, item_.head_kv, at.token_idx, item_.sequence.batch_idx};
  }
  // Of a head or tensor; 1 where elements have others.
  __device__ __forceinline__ float shared_scale(const KvTensor& tensor) const {
    const bool is_shared = tensor.scales == Scales::kTensor || tensor.scales == Scales::kHead;
    return is_shared ? tensor.scale({0, item_.head_kv, 0, item_.sequence.batch_idx}, 0) : 1;
  }
  static __device__ __forceinline__ bool has_token_scales(const KvTensor& tensor) {
    return tensor.scales == Scales::kTokenHead;
  }

  // A stage of the ring.
  __device__ __forceinline__ unsigned char* keys_of_stage(int stage) const {
    return s_ring_ + stage * args_.layout.stage_bytes(kKeys);
  }
  __device__ __forceinline__ unsigned char* values_of_stage(int stage) const {
    return keys_of_stage(stage) + kKeys * args_.layout.pitch_k;
  }
  // [2, keys]: of K and of V.
  __device__ __forceinline__ float* scales_of_stage(int stage) const {
    return reinterpret_cast<float*>(values_of_stage(stage) + kKeys * args_.layout.pitch_v);
  }

  // Columns past the dimension meet zeros of q: they must be finite.
  __device__ __forceinline__ void clear_padding() const {
    if (args_.layout.padded_qk == a_.dim_qk) return;
    const int bytes = args_.layout.stages * args_.layout.stage_bytes(kKeys);
    for (int i = threadIdx.x * 16; i < bytes; i += kThreads * 16) {
      *reinterpret_cast<uint4*>(s_ring_ + i) = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }

  __device__ __forceinline__ __nv_bfloat16* query_part(int part, int row) const {
    return s_q_ + (part * kRows + row) * args_.layout.pitch_q;
  }
  // The columns that a lane of mma.sync has of 16, 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, are 4 t to
  // 4 t + 3 here.
  static __device__ __forceinline__ int query_slot(int column) {
    const int in_step = column % 16;
    return column - in_step + in_step / 4 * 2 + in_step % 2 + in_step % 4 / 2 * 8;
  }
  __device__ __forceinline__ void load_queries() const {
    const int padded = args_.layout.padded_qk;
    const KvPlace at{0, item_.head_kv, 0, item_.sequence.batch_idx};
    const bool is_scaled = p_.stored_k.scales == Scales::kChannel;
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < kRows; row += kThreads / 32) {
      const bool exists = row < item_.rows;
      const int64_t offset = exists ? packed_row(row).offset(p_.stride_q, item_) : 0;
#pragma unroll 1
      for (int column = threadIdx.x % 32; column < padded; column += 32) {
        float x = 0;
        if (exists && column < a_.dim_qk) {
          x = load_element(p_.q, p_.dtype_q, offset + column * p_.stride_q[3]);
          if (is_scaled) x *= p_.stored_k.scale(at, column);
        }
#pragma unroll 1
        for (int part = 0; part < args_.layout.parts; ++part) {
          const __nv_bfloat16 rounded = __float2bfloat16_rn(x);
          query_part(part, row)[query_slot(column)] = rounded;
          x = is_finite(x) ? x - __bfloat162float(rounded) : 0;
        }
      }
    }
  }

  // Rows of codes of a tile as they lie: keys that do not exist are not read and become 0. Rows of
  // a tile are one stride apart unless pages cut it: looked up one by one, with their places in 64
  // bits, copying took longer than multiplying.
  template <int kBytes>
  __device__ __forceinline__ void copy_rows(const CodeCopy& copy, unsigned char* to, int pitch,
                                            int32_t first_key) const {
    const KeyRows key_rows = item_.key_rows(a_);
    const int32_t begin = item_.sequence.present.begin - first_key;
    const int32_t end = item_.sequence.present.end - first_key;
    const auto thread = static_cast<int>(threadIdx.x), pieces = static_cast<int>(copy.pieces.value);
    const unsigned char* from = copy.data + item_.head_kv * copy.stride[1];
    if (!p_.pages_cut_tiles) from += key_rows.offset(copy.stride[0], copy.stride[2], first_key);
    int row = copy.pieces.quotient(thread);
    int piece = thread - row * pieces;
#pragma unroll 1
    while (row < kKeys) {
      const bool exists = row >= begin && row < end;
      int64_t offset = row * copy.stride[2];
      if (p_.pages_cut_tiles) {
        offset = exists ? key_rows.offset(copy.stride[0], copy.stride[2], first_key + row) : 0;
      }
      unsigned char* const to_piece = to + row * pitch + piece * kBytes;
      if constexpr (kBytes == 1) {
        *to_piece = exists ? from[offset + piece * copy.stride[3]] : 0;
      } else {
        ptx::cp_async<kBytes>(ptx::shared_address(to_piece), from + offset + piece * kBytes,
                              exists ? kBytes : 0);
      }
      row += copy.row_step;
      piece += copy.piece_step;
      if (piece >= pieces) {
        piece -= pieces;
        ++row;
      }
    }
  }
  __device__ __forceinline__ void load_rows(const CodeCopy& copy, unsigned char* to, int pitch,
                                            int32_t first_key) const {
    switch (copy.piece_bytes) {
      case 16:
        return copy_rows<16>(copy, to, pitch, first_key);
      case 8:
        return copy_rows<8>(copy, to, pitch, first_key);
      case 4:
        return copy_rows<4>(copy, to, pitch, first_key);
      default:
        return copy_rows<1>(copy, to, pitch, first_key);
    }
  }
  __device__ __forceinline__ void load_scales(const CodeCopy& copy, float* to,
                                              int32_t first_key) const {
    if (copy.scales == nullptr) return;
    const KeyRows key_rows = item_.key_rows(a_);
    const float* const from = copy.scales + item_.head_kv * copy.stride_scales[1];
#pragma unroll 1
    for (int row = threadIdx.x; row < kKeys; row += kThreads) {
      const int32_t key = first_key + row;
      const bool exists = key >= item_.sequence.present.begin && key < item_.sequence.present.end;
      const int64_t offset =
          exists ? key_rows.offset(copy.stride_scales[0], copy.stride_scales[2], key) : 0;
      ptx::cp_async<4>(ptx::shared_address(to + row), from + offset, exists ? 4 : 0);
    }
  }
  __device__ __forceinline__ void load(int32_t tile, int stage) const {
    if (tile < item_.tile_end) {
      const int32_t first_key = tile * kKeys;
#pragma unroll 1
      for (int of = 0; of < 2; ++of) {
        const CodeCopy& copy = args_.copy[of];
        load_rows(copy, of == 0 ? keys_of_stage(stage) : values_of_stage(stage),
                  of == 0 ? args_.layout.pitch_k : args_.layout.pitch_v, first_key);
        load_scales(copy, scales_of_stage(stage) + of * kKeys, first_key);
      }
    }
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void wait_for_tile() const {
    switch (args_.layout.stages) {
      case 2:
        return ptx::cp_async_wait<0>();
      case 3:
        return ptx::cp_async_wait<1>();
      default:
        return ptx::cp_async_wait<2>();
    }
  }

  const CodeTileArgs& args_;
  const PortableArgs& p_;
  const AttentionArgs& a_;
  const PackedItem& item_;  // in shared memory
  __nv_bfloat16* s_q_;      // [parts, rows, pitch_q]
  unsigned char* s_ring_;
};

}  // namespace
}  // namespace wh::cuda
