// NaN and infinity in V under hidden keys. A hidden key has weight 0, and a product of 0 and NaN is
// NaN in wgmma as everywhere. So the values of a tile in which some query does not see some key are
// cleaned in shared memory before they are multiplied: keys that do not exist become 0, and so does
// every NaN and infinity. What was lost that way is added again, after the output is stored, to the
// rows that do see it; a flag says whether there is anything to add. The check costs no arithmetic
// units: warps that have nothing else to do make it while earlier tiles are worked on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/common/attention_args.h"
#include "cuda/common/key_range.h"
#include "cuda/common/scores.cuh"

namespace wh::cuda {

// Bits 15 and 31 of the result say which halves of `pair` are NaN or infinite: adding 1 to an
// exponent of all ones carries into the sign.
template <typename T>
__device__ __forceinline__ uint32_t not_finite(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7C007C00u : 0x7F807F80u;
  constexpr uint32_t kOne = std::is_same_v<T, __half> ? 0x04000400u : 0x00800080u;
  return ((pair & kExponent) + kOne) & 0x80008000u;
}

// Cleans one 16-byte chunk; returns whether a NaN or an infinity of a key that exists went.
template <typename T>
__device__ __forceinline__ bool clean_chunk(uint4* chunk, bool exists) {
  if (!exists) {
    *chunk = make_uint4(0, 0, 0, 0);
    return false;
  }
  const auto finite = [](uint32_t pair) { return pair & ~((not_finite<T>(pair) >> 15) * 0xFFFFu); };
  const uint4 v = *chunk;
  const uint4 kept = make_uint4(finite(v.x), finite(v.y), finite(v.z), finite(v.w));
  *chunk = kept;
  return ((v.x ^ kept.x) | (v.y ^ kept.y) | (v.z ^ kept.z) | (v.w ^ kept.w)) != 0;
}

// Cleans one tile of V, kPanels x [kRows][64], with kThreads threads of which this is number
// `thread`. Returns whether this one dropped a NaN or an infinity of a key that exists.
template <typename T, int kPanels, int kRows, int kThreads>
__device__ __forceinline__ bool clean_values(unsigned char* s_v, Keys present, int32_t tile_key,
                                             int thread) {
  constexpr int kChunks = kPanels * kRows * 8;
  constexpr int kBatch = 4;  // loads under way at once: one at a time costs as long as the products
  const bool all_exist = tile_key >= present.begin && tile_key + kRows <= present.end;
  uint4* chunks = reinterpret_cast<uint4*>(s_v);
  bool dropped = false;
#pragma unroll 1
  for (int first = thread; first < kChunks; first += kBatch * kThreads) {
    uint32_t bad = all_exist ? 0 : 1;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * kThreads;
      if (at >= kChunks) continue;
      const uint4 v = chunks[at];
      bad |= not_finite<T>(v.x) | not_finite<T>(v.y) | not_finite<T>(v.z) | not_finite<T>(v.w);
    }
    if (bad == 0) continue;
#pragma unroll 1
    for (int at = first; at < min(kChunks, first + kBatch * kThreads); at += kThreads) {
      const int32_t key = tile_key + at / 8 % kRows;
      dropped |= clean_chunk<T>(chunks + at, key >= present.begin && key < present.end);
    }
  }
  return dropped;
}

// Adds what clean_values() dropped from keys [keys.begin, keys.end) to output row `out` of a row
// that sees them with a weight above 0, where value_at(key, column) is its head's: finite + inf =
// inf, inf - inf = NaN. `column` is this thread's share.
template <typename T, typename Value>
__device__ __forceinline__ void restore_values(const AttentionArgs& args, const ScoreRow& row,
                                               Keys keys, Value value_at, T* out, int32_t column) {
  float sum = static_cast<float>(out[column]);
#pragma unroll 1
  for (int32_t key = keys.begin; key < keys.end; ++key) {
    const float value = value_at(key, column);
    if (fabsf(value) < INFINITY) continue;
    if (static_cast<uint32_t>(key - row.first_key) >= row.key_count) continue;
    if (mask_bias<T>(args, row, key) == -INFINITY) continue;
    sum += value;
  }
  out[column] = static_cast<T>(sum);
}

}  // namespace wh::cuda
