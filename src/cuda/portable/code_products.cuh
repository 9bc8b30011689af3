// The two products of a tile of codes, and the softmax between them; see code_tiles.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/portable/code_ring.cuh"
#include "cuda/portable/code_words.cuh"
#include "cuda/portable/products.cuh"
#include "cuda/portable/seen_rows.cuh"

namespace wh::cuda {
namespace {

template <int kDimV, int kRows>
class CodeProducts : protected CodeRing<kDimV, kRows> {
  using Ring = CodeRing<kDimV, kRows>;

 public:
  __device__ __forceinline__ CodeProducts(const CodeTileArgs& args, const PackedItem& item,
                                          unsigned char* s_memory)
      : Ring(args, item, s_memory),
        scale_log2_((p_.scores == Scores::kPlain ? a_.scale : 1) * kLog2E) {
    const int warp = threadIdx.x / 32;
    columns_idx_ = warp % kTile.column_warps();
    const int rest = warp / kTile.column_warps();
    slice_ = kKeyWarps > 1 ? rest * kSliceKeys : 0;
    warp_row_ = kKeyWarps > 1 ? 0 : rest * 16 * kRowTiles;
    scale_k_ = shared_scale(p_.stored_k);
  }

 protected:
  using Ring::args_, Ring::p_, Ring::a_, Ring::item_, Ring::kTile, Ring::kKeys;
  using Ring::keys_of_stage, Ring::scales_of_stage;
  using Ring::shared_scale, Ring::has_token_scales, Ring::query_part;

  static constexpr int kRowTiles = kTile.row_tiles();
  static constexpr int kKeyWarps = kTile.key_warps();
  static constexpr int kColumns = kTile.columns();
  static constexpr int kSliceKeys = kTile.slice_keys();
  static constexpr int kTiles = kSliceKeys / 8;
  static constexpr int kBlocks = kColumns / 32;  // of columns of V, a warp

  __device__ __forceinline__ int thread_row(int m, int r) const {
    return warp_row_ + 16 * m + 8 * r + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ bool warp_has_rows() const { return warp_row_ < item_.rows; }
  __device__ __forceinline__ bool corrects() const {
    bool any = softmax_[0].corrects();
#pragma unroll
    for (int m = 1; m < kRowTiles; ++m) any = any || softmax_[m].corrects();
    return any;
  }

  __device__ __forceinline__ void scale_keys(float (&s)[kRowTiles][4 * kTiles],
                                             const float* scales) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(scales + 8 * i + threadIdx.x % 4 * 2);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          s[m][4 * i + 2 * r] *= pair.x;
          s[m][4 * i + 2 * r + 1] *= pair.y;
        }
      }
    }
  }

  __device__ __forceinline__ void scores(float (&s)[kRowTiles][4 * kTiles], int32_t tile,
                                         int stage) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) s[m][i] = 0;
    }
    with_format(p_.stored_k.format, [&]<Quantised kFormat>() {
      dot_products<kFormat>(s, keys_of_stage(stage) + slice_ * args_.layout.pitch_k);
    });
    if (has_token_scales(p_.stored_k)) {
      const float* const scales = scales_of_stage(stage) + slice_;
      scale_keys(s, scales);
    } else {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) s[m][i] *= scale_k_;
      }
    }
    const int32_t first_key = tile * kKeys + slice_;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (p_.scores != Scores::kPlain) transform_scores(s[m], a_);
      if (item_.tiles.is_full(tile)) continue;
      ScoreRow rows[2];
      portable::see_rows(p_, item_, thread_row(m, 0), rows);
      if (p_.scores != Scores::kMasked) {
        hide_keys(s[m], rows, first_key);
      } else if (p_.dtype_q == Dtype::kF16) {
        mask_scores<__half>(s[m], a_, rows, first_key);
      } else {
        mask_scores<__nv_bfloat16>(s[m], a_, rows, first_key);
      }
    }
  }

  // s += Q times the codes of K, block by block where blocks have scales.
  template <Quantised kFormat>
  __device__ __forceinline__ void dot_products(float (&s)[kRowTiles][4 * kTiles],
                                               const unsigned char* keys) const {
    using Rows = CodeRows<kFormat>;
    const Rows k{keys, args_.layout.pitch_k};
    const int lane = threadIdx.x % 32, blocks = args_.layout.padded_qk / 32;
    uint32_t q_at[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const portable::SharedRows<__nv_bfloat16> q{query_part(0, warp_row_ + 16 * m),
                                                  args_.layout.pitch_q};
      q_at[m] = q.square_address(0, 0);
    }
    const uint32_t part_bytes = kRows * args_.layout.pitch_q * 2;
    // Tiles of keys at once: the sums of a block beside those of 32 rows spill.
    constexpr int kTogether = Rows::kHasBlocks && kRowTiles > 1 ? 2 : kTiles;
#pragma unroll 2
    for (int block = 0; block < blocks; ++block) {
#pragma unroll
      for (int first = 0; first < kTiles; first += kTogether) {
        uint32_t b[kTogether][2][2];  // of two steps of 16 columns
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          uint32_t words[2];
          k.codes(8 * (first + n) + lane / 4, block, lane % 4, words);
          widen_word<kFormat>(words[0], b[n][0]);
          widen_word<kFormat>(words[1], b[n][1]);
        }
        float sums[kRowTiles][4 * kTogether];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
          for (int i = 0; i < 4 * kTogether; ++i) {
            sums[m][i] = Rows::kHasBlocks ? 0 : s[m][4 * first + i];
          }
        }
#pragma unroll 1
        for (int part = 0; part < args_.layout.parts; ++part) {
#pragma unroll
          for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
              uint32_t a[4];
              ptx::ldmatrix(a, q_at[m] + part * part_bytes + (32 * block + 16 * step) * 2);
#pragma unroll
              for (int n = 0; n < kTogether; ++n) {
                ptx::mma<__nv_bfloat16>(portable::quad(sums[m], n), a, b[n][step][0],
                                        b[n][step][1]);
              }
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int tile = first + n;
            float scale = 1;
            if constexpr (Rows::kHasBlocks) scale = k.scale(8 * tile + lane % 4 * 2 + e, block);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
              for (int r = 0; r < 2; ++r) {
                const float sum = sums[m][4 * n + 2 * r + e];
                float& to = s[m][4 * tile + 2 * r + e];
                to = Rows::kHasBlocks ? fmaf(sum, scale, to) : sum;
              }
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void weigh(float (&s)[kRowTiles][4 * kTiles]) {
    float tops[kRowTiles][2];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) tops[m][r] = softmax_[m].top(s[m], r);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      softmax_[m].raise(s[m], tops[m], scale_log2_);
      softmax_[m].weigh(s[m], scale_log2_);
    }
  }

  // First operands of weights, and of what bf16 does not hold of them.
  struct Weights {
    uint32_t high[4], low[4];

    __device__ __forceinline__ explicit Weights(const float (&p)[8]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        high[i] = ptx::pack<__nv_bfloat16>(p[2 * i], p[2 * i + 1]);
        low[i] = ptx::pack<__nv_bfloat16>(p[2 * i] - __uint_as_float(high[i] << 16),
                                          p[2 * i + 1] - __uint_as_float(high[i] & 0xffff0000u));
      }
    }
    Weights() = default;
  };

  // o += weights times the codes of V. Of a block of 32 columns, product j has columns j, 4 + j, 8
  // + j and so on.
  template <Quantised kFormat>
  __device__ __forceinline__ void add_values(const float (&weights)[kRowTiles][4 * kTiles],
                                             const unsigned char* values) {
    using Rows = CodeRows<kFormat>;
    const Rows v{values, args_.layout.pitch_v};
    const int lane = threadIdx.x % 32;
    const bool has_low = args_.layout.parts_p > 1;
#pragma unroll
    for (int step = 0; step < kSliceKeys / 16; ++step) {
      const int row = 16 * step + lane % 4 * 2;  // of the first of four keys
      Weights a[kRowTiles];
      if constexpr (!Rows::kHasBlocks) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) a[m] = weights_of(weights[m], step);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        uint32_t b[4][2];
        widen_values<kFormat>(v, row, block, b);
        if constexpr (Rows::kHasBlocks) {
          float scales[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            scales[i] = v.scale(row + i % 2 + i / 2 * 8, columns_idx_ * kBlocks + block);
          }
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) a[m] = weights_of(weights[m], step, scales);
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply(m, block, a[m].high, b);
          if (has_low) multiply(m, block, a[m].low, b);
        }
      }
    }
  }
  static __device__ __forceinline__ Weights weights_of(const float (&weights)[4 * kTiles],
                                                       int step) {
    float p[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = weights[8 * step + i];
    return Weights(p);
  }
  static __device__ __forceinline__ Weights weights_of(const float (&weights)[4 * kTiles], int step,
                                                       const float (&scales)[4]) {
    float p[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = weights[8 * step + i] * scales[i / 4 * 2 + i % 2];
    return Weights(p);
  }
  template <Quantised kFormat>
  __device__ __forceinline__ void widen_values(const CodeRows<kFormat>& v, int row, int block,
                                               uint32_t (&b)[4][2]) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = v.codes(row + i % 2 + i / 2 * 8, columns_idx_ * kBlocks + block,
                         static_cast<int>(threadIdx.x % 32 / 4));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // keys from 8 * i on
      uint32_t to[2];
      widen_word<kFormat>(interleave_low(words[2 * i], words[2 * i + 1]), to);
      b[0][i] = to[0];
      b[1][i] = to[1];
      widen_word<kFormat>(interleave_high(words[2 * i], words[2 * i + 1]), to);
      b[2][i] = to[0];
      b[3][i] = to[1];
    }
  }
  __device__ __forceinline__ void multiply(int m, int block, const uint32_t (&a)[4],
                                           const uint32_t (&b)[4][2]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::mma<__nv_bfloat16>(portable::quad(o_[m], 4 * block + j), a, b[j][0], b[j][1]);
    }
  }

  const float scale_log2_;
  float scale_k_;
  int columns_idx_, slice_, warp_row_;  // of this warp
  OnlineSoftmax softmax_[kRowTiles];
  float o_[kRowTiles][kColumns / 2];
};

}  // namespace
}  // namespace wh::cuda
