// How codes are widened, and their scales. What all keys of a head share is folded into the
// exponent (K) and into the stored rows (V). Those of tokens come into shared memory a tile of keys
// ahead of the codes; scores are multiplied by K's, weights by V's.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/kv_tensor.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/key_range.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/sm90/common/code_scales.cuh"
#include "cuda/sm90/common/products.cuh"
#include "cuda/sm90/common/tile_walk.cuh"
#include "cuda/sm90/common/widen.cuh"

namespace wh::cuda {

// How many tiles of keys a consumer has multiplied, twice, and 1 where scores are to be multiplied
// by scales: one register, there is no other.
class ScaledTiles {
 public:
  __device__ __forceinline__ uint32_t count() const { return counted_ / 2; }
  __device__ __forceinline__ bool multiplies_scores() const { return counted_ % 2 != 0; }
  __device__ __forceinline__ void next() { counted_ += 2; }
  // The exponent's scale of a tile of queries.
  template <Scores kScores, typename Work>
  __device__ __forceinline__ float enter(const AttentionArgs& args, const KvTensor& k,
                                         const Work& w) {
    float scale_log2 = scale_log2_of<kScores>(args);
    counted_ &= ~1u;
    if (wh::cuda::multiplies_scores<kScores>(args, k, w)) {
      ++counted_;
    } else if constexpr (kScores == Scores::kPlain) {
      scale_log2 *= k.scale(head_of(args, w), 0);
    }
    return scale_log2;
  }

 private:
  uint32_t counted_ = 0;
};

// Whether all keys share V's scales: those are multiplied into sums.
__device__ __forceinline__ bool scales_sums(const KvTensor& v) {
  return v.scales != Scales::kNone && v.scales != Scales::kTokenHead;
}
// Those sums, of columns from kFirstColumn on, normalised first.
template <int kFirstColumn, int kCount>
__device__ __forceinline__ void scale_sums(float (&o)[kCount], const float (&norm)[2],
                                           const AttentionArgs& args, const KvTensor& v,
                                           const KvPlace& head) {
  const float of_all = v.scales == Scales::kChannel ? 1 : v.scale(head, 0);
  // Opaque, or pointers to the scales of columns would be kept through the main loop.
  int32_t lane_column = static_cast<int32_t>(threadIdx.x % 4) * 2;
  asm volatile("" : "+r"(lane_column));
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t column = kFirstColumn + 8 * i + e + lane_column;
      float scale = of_all;
      if (v.scales == Scales::kChannel && column < args.dim_v) scale = v.scale(head, column);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& sum = o[4 * i + 2 * r + e];
        sum = sum * norm[r] * scale;
      }
    }
    // These are multiplied before more scales are loaded: there are no registers for all of them.
    ptx::keep(sums_from<4>(o, 4 * i));
  }
}

// What QueryRows::restore() asks for, of codes.
template <typename Work>
__device__ __forceinline__ auto widened_values(const AttentionArgs& args, const KvTensor& v,
                                               const Work& w) {
  const KeyRows rows = w.key_rows(args);
  const int32_t head_kv = w.at.first_head / args.group;
  return [&, rows, head_kv](int32_t key, int32_t column) {
    const auto at = rows.place(key);
    return widened_code(v, {at.batch_idx, head_kv, at.token_idx, w.sequence.batch_idx}, column);
  };
}

// What a warp that widens need not keep in registers of where it is.
struct WidenerNotes {
  int32_t batch_idx, key_batch, first_key;
  int32_t present_begin, present_end;
  int32_t head_kv;
};

// The part of those who widen that is about scales. The block has kTileK, kWideningWarps from warp
// 1 on, notes for each of them in its mailbox, and scale_offset(key_tile, is_v) for the tiles of
// keys that are under way.
template <typename Block>
struct ScaleCopies {
  using Work = typename Block::Work;
  const Block& block;

  __device__ __forceinline__ volatile WidenerNotes& notes() const {
    return block.mailbox()->widener_notes[threadIdx.x / 32 - 1];
  }
  __device__ __forceinline__ void note(const Work& w) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      volatile WidenerNotes& to = notes();
      to.batch_idx = w.sequence.batch_idx;
      to.key_batch = w.sequence.key_batch;
      to.first_key = w.sequence.first_key;
      to.present_begin = w.sequence.present.begin;
      to.present_end = w.sequence.present.end;
      to.head_kv = w.at.first_head / block.args.group;
    }
    __syncwarp();
  }
  __device__ __forceinline__ Keys present_keys() const {
    return {notes().present_begin, notes().present_end};
  }

  // Those of the tile before the one that was asked for last, or of that one.
  __device__ __forceinline__ static void await_scales(bool has_asked_again) {
    if (has_asked_again) {
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
  }
  // The scales of a tile of keys come while the tile before is widened. Those of keys that do not
  // exist are not read, and are 0.
  __device__ __forceinline__ void request_scales(int32_t n, const KvTensor& tensor,
                                                 int offset) const {
    const volatile WidenerNotes& at = notes();
    Work w{};
    w.sequence.batch_idx = at.batch_idx;
    w.sequence.key_batch = at.key_batch;
    w.sequence.first_key = at.first_key;
    const KeyRows rows = w.key_rows(block.args);
    const int32_t head_kv = at.head_kv;
    const Keys present = present_keys();
#pragma unroll 1
    for (int i = threadIdx.x - 32; i < Block::kTileK; i += 32 * Block::kWideningWarps) {
      const int32_t key = n * Block::kTileK + i;
      const bool exists = key >= present.begin && key < present.end;
      int64_t from = 0;
      if (exists) {
        const auto place = rows.place(key);
        from =
            tensor.scale_offset({place.batch_idx, head_kv, place.token_idx, w.sequence.batch_idx});
      }
      ptx::cp_async<4>(block.s_q + offset + 4 * i, tensor.scales_data + from, exists ? 4 : 0);
    }
  }
  // A weight of 0 does not hide a scale that is no number, either.
  __device__ __forceinline__ bool clean_scales(uint32_t key_tile) const {
    auto* of_v = reinterpret_cast<float*>(block.s_memory + Block::scale_offset(key_tile, true));
    bool has_dropped = false;
#pragma unroll 1
    for (int i = threadIdx.x - 32; i < Block::kTileK; i += 32 * Block::kWideningWarps) {
      if (fabsf(of_v[i]) < INFINITY) continue;
      of_v[i] = 0;
      has_dropped = true;
    }
    return has_dropped;
  }
};

// What a warp widens of a slot, one block of 8 rows and 128 codes after another, for a slot has no
// more groups of 8 rows than there are warps (WidenedTile): panels of codes have as many columns,
// those of T 64, and the rows of both are 128 bytes in the same swizzle. A lane takes 16 codes of a
// row in each half of the panel, so that eight lanes, whose accesses are one of the memory's, have
// a row each and all of its banks. The blocks of a tile are dealt in turn, and the next tile's go
// on where these end: a warp that has one more of one tile has one less of another.
template <typename T, int kRows, int kDim, int kWarps, int kLoads>
struct WidenedSlot {
  static constexpr int kPanels = (kDim + 2 * kPanelColumns - 1) / (2 * kPanelColumns);
  static constexpr int kRowBlocks = kRows / 8;
  static constexpr int kBlocks = kPanels * kRowBlocks;
  static constexpr int kBlockBytes = panel_bytes(8);
  static_assert(kRows % 8 == 0 && kDim % kPanelColumns == 0);

  int first;  // block, of this warp
  const unsigned char* codes;
  unsigned char* wide;

  static constexpr int next_first(int first) {
    const int next = first - kBlocks % kWarps;
    return next < 0 ? next + kWarps : next;
  }

  // Whether the panel of `block` has columns 64 to 127.
  static __device__ __forceinline__ bool has_second_half(int block) {
    return kDim % (2 * kPanelColumns) == 0 || block < (kPanels - 1) * kRowBlocks;
  }
  __device__ __forceinline__ const uint4* from(int block, int half) const {
    const int row = threadIdx.x % 8, chunk = threadIdx.x % 32 / 8 + 4 * half;
    return reinterpret_cast<const uint4*>(codes + block * kBlockBytes +
                                          chunk_offset(row, chunk, 8));
  }
  __device__ __forceinline__ uint4* to(int block, int half, int chunk_of_two) const {
    const int row = threadIdx.x % 8, chunk = threadIdx.x % 32 / 8 * 2 + chunk_of_two;
    const int wide_block = block + (block / kRowBlocks + half) * kRowBlocks;
    return reinterpret_cast<uint4*>(wide + wide_block * kBlockBytes + chunk_offset(row, chunk, 8));
  }

  template <Quantised kFormat>
  __device__ __forceinline__ void widen() const {
    constexpr int kHalves = kDim > kPanelColumns ? 2 : 1;
    constexpr int kBatch = kLoads / kHalves;  // loads under way
#pragma unroll 1
    for (int block = first; block < kBlocks; block += kBatch * kWarps) {
      uint4 words[kBatch][kHalves];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = block + i * kWarps;
        if (kBatch > 1 && at >= kBlocks) break;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          if (half == 0 || has_second_half(at)) words[i][half] = *from(at, half);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = block + i * kWarps;
        if (kBatch > 1 && at >= kBlocks) break;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          if (half == 1 && !has_second_half(at)) break;
          const uint4 word = words[i][half];
          const uint2 a = widen_four<kFormat, T>(word.x), b = widen_four<kFormat, T>(word.y);
          const uint2 c = widen_four<kFormat, T>(word.z), d = widen_four<kFormat, T>(word.w);
          *to(at, half, 0) = make_uint4(a.x, a.y, b.x, b.y);
          *to(at, half, 1) = make_uint4(c.x, c.y, d.x, d.y);
        }
      }
    }
  }
  __device__ __forceinline__ void widen(Quantised format) const {
    if (format == Quantised::kE4m3) {
      widen<Quantised::kE4m3>();
    } else {
      widen<Quantised::kInt8>();
    }
  }

  // clean_values() of what this thread has widened.
  __device__ __forceinline__ bool clean(Keys present, int32_t tile_key) const {
    bool dropped = false;
#pragma unroll 1
    for (int block = first; block < kBlocks; block += kWarps) {
      const int32_t key = tile_key + block % kRowBlocks * 8 + static_cast<int32_t>(threadIdx.x % 8);
      const bool exists = key >= present.begin && key < present.end;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i >= 2 && !has_second_half(block)) break;
        dropped |= clean_chunk<T>(to(block, i / 2, i % 2), exists);
      }
    }
    return dropped;
  }
};

}  // namespace wh::cuda
