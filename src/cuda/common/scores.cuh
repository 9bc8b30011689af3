// What happens to a tile of scores before softmax: scale, softcap and masks, in the accumulator
// layout that online_softmax.cuh describes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "core/score_rules.h"
#include "cuda/common/attention_args.h"
#include "cuda/common/key_range.h"
#include "cuda/ptx/math.cuh"

namespace wh::cuda {

// One query of one head, as far as masks are concerned.
struct ScoreRow {
  int32_t first_key;   // that the row may see
  uint32_t key_count;  // from there on
  const char* mask;    // its row of the array mask, key 0
};

__device__ __forceinline__ ScoreRow score_row(const AttentionArgs& args, const Sequence& sequence,
                                              int32_t head, int32_t query_idx) {
  const Keys keys = visible_keys(args, sequence, query_idx);
  ScoreRow row{keys.begin, static_cast<uint32_t>(max(0, keys.end - keys.begin)), nullptr};
  if (args.mask_kind != MaskKind::kNone) {
    const int64_t element_bytes = args.mask_kind == MaskKind::kBoolean       ? 1
                                  : args.mask_kind == MaskKind::kAdditiveF32 ? 4
                                                                             : 2;
    row.mask = static_cast<const char*>(args.mask) +
               (sequence.batch_idx * args.stride_mask[0] + head * args.stride_mask[1] +
                query_idx * args.stride_mask[2]) *
                   element_bytes;
  }
  return row;
}

// An element of an array mask as a bias: finite ones stay finite in what follows.
template <typename T>
__device__ __forceinline__ float bias_of(const char* element) {
  return limited_bias(static_cast<float>(*reinterpret_cast<const T*>(element)));
}

// Of a query head, in units of the scores.
__device__ __forceinline__ float sink_of(const AttentionArgs& args, int32_t head) {
  return sink_score(args.sinks, head);
}

// The bias of a key that the row may see; minus infinity hides it.
template <typename T>
__device__ __forceinline__ float mask_bias(const AttentionArgs& args, const ScoreRow& row,
                                           int32_t key_idx) {
  const int64_t offset = key_idx * args.stride_mask[3];
  switch (args.mask_kind) {
    case MaskKind::kNone:
      return 0;
    case MaskKind::kBoolean:
      return row.mask[offset] != 0 ? 0 : -INFINITY;
    case MaskKind::kAdditiveF32:
      return bias_of<float>(row.mask + offset * 4);
    case MaskKind::kAdditiveQ:
      return bias_of<T>(row.mask + offset * static_cast<int64_t>(sizeof(T)));
  }
  return 0;
}

// Scale and softcap: what follows works in natural units.
template <int kCount>
__device__ __forceinline__ void transform_scores(float (&s)[kCount], const AttentionArgs& args) {
  if (args.softcap > 0) {
    const float inner = args.scale / args.softcap;
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] = args.softcap * ptx::tanh_accurate(s[i] * inner);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) s[i] *= args.scale;
  }
}

// Hides the keys of the tile that starts at `tile_key` from rows that may not see them. Whatever
// was there, NaN too, is replaced.
template <int kCount>
__device__ __forceinline__ void hide_keys(float (&s)[kCount], const ScoreRow (&rows)[2],
                                          int32_t tile_key) {
  const int32_t thread_key = tile_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t offset = thread_key - rows[r].first_key;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      if (offset + 8 * i >= rows[r].key_count) s[4 * i + 2 * r] = -INFINITY;
      if (offset + 8 * i + 1 >= rows[r].key_count) s[4 * i + 2 * r + 1] = -INFINITY;
    }
  }
}

// Adds what `bias_at` reads from the array mask to the scores of the keys that rows may see, and
// hides the rest.
template <int kCount, typename BiasAt>
__device__ __forceinline__ void add_bias(float (&s)[kCount], const ScoreRow (&rows)[2],
                                         int32_t tile_key, int64_t stride_bytes, BiasAt bias_at) {
  const int32_t thread_key = tile_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const uint32_t offset = thread_key - rows[r].first_key;
    const char* at = rows[r].mask + thread_key * stride_bytes;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      // Opaque: the compiler would otherwise compute every address ahead, and spill.
      asm volatile("" : "+l"(at));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = s[4 * i + 2 * r + e];
        float bias = -INFINITY;
        if (offset + 8 * i + e < rows[r].key_count) bias = bias_at(at + e * stride_bytes);
        score = bias == -INFINITY ? -INFINITY : score + bias;
      }
      at += 8 * stride_bytes;
    }
  }
}

// hide_keys() under an array mask. One loop a kind: with the choice inside, the loads of a tile
// wait for each other.
template <typename T, int kCount>
__device__ __forceinline__ void mask_scores(float (&s)[kCount], const AttentionArgs& args,
                                            const ScoreRow (&rows)[2], int32_t tile_key) {
  const int64_t stride = args.stride_mask[3];
  if (args.mask_kind == MaskKind::kBoolean) {
    add_bias(s, rows, tile_key, stride, [](const char* at) { return *at != 0 ? 0.0f : -INFINITY; });
  } else if (args.mask_kind == MaskKind::kAdditiveF32) {
    add_bias(s, rows, tile_key, stride * 4, bias_of<float>);
  } else {
    add_bias(s, rows, tile_key, stride * static_cast<int64_t>(sizeof(T)), bias_of<T>);
  }
}

}  // namespace wh::cuda
