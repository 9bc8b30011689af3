// NaN and infinity in V under hidden keys. A hidden key has weight 0, and a product of 0 and NaN is
// NaN in wgmma as everywhere. So the values of a tile in which some query does not see some key are
// cleaned in shared memory before they are multiplied: keys that do not exist become 0, and so does
// every NaN and infinity. What was lost that way is added again, after the output is stored, to the
// rows that do see it; a flag says whether there is anything to add. The check costs no arithmetic
// units: a warp that has nothing else to do makes it while earlier tiles are worked on.
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

// Cleans one tile of V, kPanels x [kRows][64], with one warp. Returns whether this lane dropped a
// NaN or an infinity of a key that exists.
template <typename T, int kPanels, int kRows>
__device__ __forceinline__ bool clean_values(unsigned char* s_v, Keys present, int32_t tile_key) {
  const int lane = threadIdx.x % 32;
  uint32_t dropped = 0;
#pragma unroll 1
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll 2
    for (int row = lane / 8; row < kRows; row += 4) {
      uint4* chunk = reinterpret_cast<uint4*>(s_v + panel * kRows * 128 + row * 128) + lane % 8;
      const uint4 v = *chunk;
      const int32_t key = tile_key + row;
      const bool exists = key >= present.begin && key < present.end;
      const uint32_t x = not_finite<T>(v.x), y = not_finite<T>(v.y), z = not_finite<T>(v.z),
                     w = not_finite<T>(v.w);
      if (exists && (x | y | z | w) == 0) continue;
      if (!exists) {
        *chunk = make_uint4(0, 0, 0, 0);
      } else {
        dropped = 1;
        const auto keep = [](uint32_t pair, uint32_t bad) {
          return pair & ~((bad >> 15) * 0xFFFFu);
        };
        *chunk = make_uint4(keep(v.x, x), keep(v.y, y), keep(v.z, z), keep(v.w, w));
      }
    }
  }
  return dropped != 0;
}

// Adds what clean_values() dropped from keys [keys.begin, keys.end) to output row `out` of a row
// that sees them with a weight above 0: finite + inf = inf, inf - inf = NaN. `column` is this
// thread's share.
template <typename T>
__device__ __forceinline__ void restore_values(const AttentionArgs& args, const ScoreRow& row,
                                               Keys keys, const T* v, T* out, int32_t column) {
  float sum = static_cast<float>(out[column]);
#pragma unroll 1
  for (int32_t key = keys.begin; key < keys.end; ++key) {
    const float value = static_cast<float>(v[key * args.stride_v[2] + column]);
    if (fabsf(value) < INFINITY) continue;
    if (static_cast<uint32_t>(key - row.first_key) >= row.key_count) continue;
    if (mask_bias<T>(args, row, key) == -INFINITY) continue;
    sum += value;
  }
  out[column] = static_cast<T>(sum);
}

}  // namespace wh::cuda
