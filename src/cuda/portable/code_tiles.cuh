// cuda_portable over quantised keys and values where q has 16 bits: decode and prefill.
//
// Schedule: codes come as they lie into a ring of tiles in shared memory, up to four of them under
// way, and are widened in registers on their way into mma.sync: as bf16, which holds every code.
// Scales stay outside of the products: K's are multiplied into scores, V's into weights, those of
// blocks of 32 columns block by block; those of V's channels, of heads and of tensors into out. So
// products are those of the widened cache, but for the rounding of weights that any cache has. What
// a bf16 does not hold is two or three that add up to it: q of f16, q times K's scales of channels,
// and weights where q is f16. In decode, up to 16 rows, the warps take a share of each tile's keys
// each and merge at the end; else all warps take all keys, each for its own rows.
//
// Lanes read words of four columns. Q is stored so that these are the columns that mma.sync's lanes
// have of a step; of V's rows a word gives a lane four columns that are four products' apart.
//
// Roofline: decode streams codes; at the memory's rate of an H200, 20 bytes a clock and SM,
// widening takes a third of the instructions that it can issue. A tile in 16 bits, written to
// shared memory and read again, would take all of that memory's 128 bytes a clock. Prefill: a warp
// of 32 rows widens six instructions for two products, about as long as these take on Hopper.
//
// NaN in V: in tiles where some row does not see some key, codes and scales that are not finite are
// taken out of shared memory and added again to the rows that see them, as in block.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/element.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/portable/code_args.h"
#include "cuda/portable/code_words.cuh"
#include "cuda/portable/products.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {
namespace {

template <typename Body>
__device__ __forceinline__ void with_format(Quantised format, const Body& body) {
  switch (format) {
    case Quantised::kNone:  // has no codes
      break;
    case Quantised::kE4m3:
      return body.template operator()<Quantised::kE4m3>();
    case Quantised::kInt8:
      return body.template operator()<Quantised::kInt8>();
    case Quantised::kQ8_0:
      return body.template operator()<Quantised::kQ8_0>();
    case Quantised::kQ4_0:
      return body.template operator()<Quantised::kQ4_0>();
  }
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// Rows of K or V of a tile in shared memory, as they lie in the cache.
template <Quantised kFormat>
struct CodeRows {
  const unsigned char* data;
  int pitch;  // bytes

  static constexpr bool kHasBlocks = is_block_format(kFormat);
  static constexpr int kBlockBytes = static_cast<int>(stored_bytes(kFormat, Dtype::kF32, 32));
  static constexpr int kScaleBytes = kHasBlocks ? 2 : 0;

  // Word `word` of the codes of 32 columns: of eight, or of four in four bits.
  __device__ __forceinline__ uint32_t word(int row, int block, int word) const {
    const unsigned char* const at =
        data + row * pitch + block * kBlockBytes + kScaleBytes + 4 * word;
    if constexpr (!kHasBlocks) return *reinterpret_cast<const uint32_t*>(at);
    // Every other block's codes lie two bytes off.
    const auto shift = static_cast<uint32_t>(block % 2 == 0 ? 2 : 0);
    const auto* const words = reinterpret_cast<const uint32_t*>(at - shift);
    return __funnelshift_r(words[0], words[1], 8 * shift);
  }
  // Four columns from 4 * `piece` on of a block, ready for widen_word().
  __device__ __forceinline__ uint32_t codes(int row, int block, int piece) const {
    if constexpr (kFormat != Quantised::kQ4_0) return word(row, block, piece);
    return word(row, block, piece % 4) >> (piece < 4 ? 0 : 4) & 0x0f0f0f0fu;
  }
  // Both halves of columns 4 * `piece` and 16 + 4 * `piece`.
  __device__ __forceinline__ void codes(int row, int block, int piece, uint32_t (&to)[2]) const {
    to[0] = word(row, block, piece);
    if constexpr (kFormat == Quantised::kQ4_0) {
      to[1] = to[0] >> 4 & 0x0f0f0f0fu;
      to[0] &= 0x0f0f0f0fu;
    } else {
      to[1] = word(row, block, piece + 4);
    }
  }
  __device__ __forceinline__ float scale(int row, int block) const {
    return __half2float(*reinterpret_cast<const __half*>(data + row * pitch + block * kBlockBytes));
  }
};

template <int kDimV, int kRows>
class CodeBlock {
 public:
  static constexpr CodeTile kTile{kDimV, kRows};

  __device__ __forceinline__ CodeBlock(const CodeTileArgs& args, const PackedItem& item,
                                       unsigned char* s_memory)
      : args_(args),
        p_(args.portable),
        a_(args.portable.attention),
        item_(item),
        s_q_(reinterpret_cast<__nv_bfloat16*>(s_memory)),
        s_ring_(s_memory + args.layout.queries_bytes(kRows)),
        scale_log2_((p_.scores == Scores::kPlain ? a_.scale : 1) * kLog2E) {
    const int warp = threadIdx.x / 32;
    columns_idx_ = warp % kTile.column_warps();
    const int rest = warp / kTile.column_warps();
    slice_ = kKeyWarps > 1 ? rest * kSliceKeys : 0;
    warp_row_ = kKeyWarps > 1 ? 0 : rest * 16 * kRowTiles;
    scale_k_ = shared_scale(p_.stored_k);
  }

  __device__ __forceinline__ void run(int32_t* s_dropped) {
    s_dropped_ = s_dropped;
    if (threadIdx.x == 0) *s_dropped_ = 0;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) o_[m][i] = 0;
    }
    if (item_.tile_begin < item_.tile_end) {
      clear_padding();
      load_queries();
      work_on_tiles();
    }
    if constexpr (kKeyWarps > 1) {
      merge_warps();
    } else {
      store_rows();
    }
    __syncthreads();
    if (*s_dropped_ != 0) restore();
  }

 private:
  static constexpr int kThreads = kTile.threads();
  static constexpr int kRowTiles = kTile.row_tiles();
  static constexpr int kKeyWarps = kTile.key_warps();
  static constexpr int kColumns = kTile.columns();
  static constexpr int kKeys = kTile.keys();
  static constexpr int kSliceKeys = kTile.slice_keys();
  static constexpr int kTiles = kSliceKeys / 8;
  static constexpr int kBlocks = kColumns / 32;  // of columns of V, a warp

  __device__ __forceinline__ PackedRow packed_row(int row) const {
    return {a_, p_.rows, item_, row};
  }
  __device__ __forceinline__ int thread_row(int m, int r) const {
    return warp_row_ + 16 * m + 8 * r + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ bool warp_has_rows() const { return warp_row_ < item_.rows; }
  __device__ __forceinline__ bool is_split() const { return p_.partials.splits > 1; }

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

  // Loads tiles ahead from one place in the code, which begins so many in front of the first.
  __device__ __forceinline__ void work_on_tiles() {
    const int ahead = args_.layout.stages - 1;
    int stage = 1;  // so that the first tile's is 0
#pragma unroll 1
    for (int32_t tile = item_.tile_begin - ahead; tile < item_.tile_end; ++tile) {
      const bool is_there = tile >= item_.tile_begin;
      if (is_there) {
        wait_for_tile();
        __syncthreads();  // all copies are here, and the stage in front has been read
      }
      load(tile + ahead, stage == 0 ? ahead : stage - 1);
      if (is_there) work_on(tile, stage);
      stage = stage == ahead ? 0 : stage + 1;
    }
  }

  __device__ __forceinline__ void work_on(int32_t tile, int stage) {
    float s[kRowTiles][4 * kTiles];
    if (warp_has_rows()) {
      scores(s, tile, stage);
      weigh(s);
    }
    if (!item_.tiles.is_clean(tile)) {
      clean_values(stage);
      __syncthreads();
    }
    if (!warp_has_rows()) return;
    if (corrects()) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) o_[m][i] *= softmax_[m].correction[i / 2 % 2];
      }
    }
    if (has_token_scales(p_.stored_v)) {
      const float* const scales = scales_of_stage(stage) + kKeys + slice_;
      scale_keys(s, scales);
    }
    with_format(p_.stored_v.format, [&]<Quantised kFormat>() {
      add_values<kFormat>(s, values_of_stage(stage) + slice_ * args_.layout.pitch_v);
    });
  }
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
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // rows past the last one follow it, and are not stored
        const PackedRow at = packed_row(min(thread_row(m, r), item_.rows - 1));
        rows[r] = score_row(a_, item_.sequence, at.head, at.query);
      }
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

  // Takes codes and scales that are not finite out of a tile of V.
  __device__ __forceinline__ void clean_values(int stage) const {
    unsigned char* const values = values_of_stage(stage);
    const int pitch = args_.layout.pitch_v;
    bool dropped = false;
    const auto clean = [&](auto& scale, float value) {
      if (is_finite(value)) return;
      scale = 0;
      dropped = true;
    };
    if (has_token_scales(p_.stored_v)) {
      float* const scales = scales_of_stage(stage) + kKeys;
      for (int i = threadIdx.x; i < kKeys; i += kThreads) clean(scales[i], scales[i]);
    }
    const Quantised format = p_.stored_v.format;
    if (is_block_format(format)) {
      constexpr int kBlocksOfRow = kDimV / 32;
      const int block_bytes = static_cast<int>(stored_bytes(format, Dtype::kF32, 32));
      for (int i = threadIdx.x; i < kKeys * kBlocksOfRow; i += kThreads) {
        auto& scale = *reinterpret_cast<uint16_t*>(values + i / kBlocksOfRow * pitch +
                                                   i % kBlocksOfRow * block_bytes);
        clean(scale, to_float(Half{scale}));
      }
    } else if (format == Quantised::kE4m3) {
      constexpr int kWordsOfRow = kDimV / 4;
      for (int i = threadIdx.x; i < kKeys * kWordsOfRow; i += kThreads) {
        auto& word =
            *reinterpret_cast<uint32_t*>(values + i / kWordsOfRow * pitch + i % kWordsOfRow * 4);
        const uint32_t nan = ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
        if (nan == 0) continue;
        word &= ~((nan >> 7) * 0xffu);
        dropped = true;
      }
    }
    if (dropped) *s_dropped_ = 1;
  }

  // Adds again what clean_values() took out to the rows that see it. Rare: speed does not matter.
  __device__ __forceinline__ void restore() const {
    const int32_t begin = max(item_.seen.begin, item_.tile_begin * kKeys);
    const int32_t end = min(item_.seen.end, item_.tile_end * kKeys);
#pragma unroll 1
    for (int row = 0; row < item_.rows; ++row) {
      const PackedRow at = packed_row(row);
      const ScoreRow mask = score_row(a_, item_.sequence, at.head, at.query);
#pragma unroll 1
      for (int column = threadIdx.x; column < a_.dim_v; column += kThreads) {
        float added = 0;
        bool has_dropped = false;
#pragma unroll 1
        for (int32_t key = begin; key < end; ++key) {
          const float value = p_.stored_v.element(place(key), column);
          if (is_finite(value) || item_.tiles.is_clean(key / kKeys) ||
              static_cast<uint32_t>(key - mask.first_key) >= mask.key_count ||
              bias_of_key(mask, key) == -INFINITY) {
            continue;
          }
          added += value;
          has_dropped = true;
        }
        if (has_dropped) add_to(at, column, added);
      }
    }
  }
  __device__ __forceinline__ float bias_of_key(const ScoreRow& mask, int32_t key) const {
    return p_.dtype_q == Dtype::kF16 ? mask_bias<__half>(a_, mask, key)
                                     : mask_bias<__nv_bfloat16>(a_, mask, key);
  }
  __device__ __forceinline__ void add_to(const PackedRow& at, int column, float added) const {
    if (is_split()) {
      partial_row(at)[column] += added;
      return;
    }
    const int64_t offset = at.offset(a_.stride_out, item_) + column * a_.stride_out[3];
    store(offset, load_element(a_.out, p_.dtype_q, offset) + added);
  }

  __device__ __forceinline__ float* partial_row(const PackedRow& at) const {
    const Partials& partials = p_.partials;
    return partials.sums + (item_.split * partials.rows + at.index(a_, item_)) * partials.columns;
  }
  // Where keys are not split, out has q's type.
  __device__ __forceinline__ void store(int64_t offset, float value) const {
    if (p_.dtype_q == Dtype::kF16) {
      static_cast<__half*>(a_.out)[offset] = __float2half_rn(value);
    } else {
      static_cast<__nv_bfloat16*>(a_.out)[offset] = __float2bfloat16_rn(value);
    }
  }
  __device__ __forceinline__ void store_pair(int64_t offset, float x, float y) const {
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(a_.out) + offset) =
        p_.dtype_q == Dtype::kF16 ? ptx::pack<__half>(x, y) : ptx::pack<__nv_bfloat16>(x, y);
  }
  __device__ __forceinline__ void store_weight(const PackedRow& at, RowWeight weight) const {
    const Partials& partials = p_.partials;
    if (is_split()) {
      partials.weights[at.index(a_, item_) * partials.splits + item_.split] = weight;
    } else if (a_.log_sum_exp != nullptr) {
      a_.log_sum_exp[at.index(a_, item_)] = log_sum_exp(weight);
    }
  }
  // Four columns of normalised sums over codes, from a multiple of four on; `is_empty`: of a row
  // that has seen nothing, whatever V's scale is.
  __device__ __forceinline__ void store_four(const PackedRow& at, int column, float4 sums,
                                             bool is_empty) const {
    const KvTensor& v = p_.stored_v;
    float x[4] = {sums.x, sums.y, sums.z, sums.w};
    const bool is_shared = v.scales != Scales::kNone && !has_token_scales(v);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (is_shared && column + i < a_.dim_v) {
        x[i] *= v.scale({0, item_.head_kv, 0, item_.sequence.batch_idx}, column + i);
      }
      if (is_empty) x[i] = 0;
    }
    if (is_split()) {
      if (column >= p_.partials.columns) return;  // combine.cu reads whole float4
      *reinterpret_cast<float4*>(partial_row(at) + column) = make_float4(x[0], x[1], x[2], x[3]);
      return;
    }
    const int64_t offset = at.offset(a_.stride_out, item_) + column * a_.stride_out[3];
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      if (p_.out_is_whole) {
        if (column + i < a_.dim_v) store_pair(offset + i, x[i], x[i + 1]);
        continue;
      }
      if (column + i < a_.dim_v) store(offset + i * a_.stride_out[3], x[i]);
      if (column + i + 1 < a_.dim_v) store(offset + (i + 1) * a_.stride_out[3], x[i + 1]);
    }
  }

  // The sums of columns of the warp from column_of() on.
  __device__ __forceinline__ float4 sums_of(int m, int r, int block, int half, float factor) const {
    const float* const o = o_[m] + 16 * block + 2 * r + half;
    return make_float4(o[0] * factor, o[4] * factor, o[8] * factor, o[12] * factor);
  }
  static __device__ __forceinline__ int column_of(int block, int half) {
    return 32 * block + threadIdx.x % 4 * 8 + 4 * half;
  }

  // By way of shared memory, eight rows of each warp at a time, over queries and ring: out is
  // written side by side, by code that is there once.
  __device__ __forceinline__ void store_rows() {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the ring has been read
    auto* const s_rows = reinterpret_cast<float*>(s_q_) + threadIdx.x / 32 * 8 * kColumns;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = thread_row(m, r);
        const PackedRow at = packed_row(min(row, item_.rows - 1));
        const RowWeight weight =
            softmax_[m].finish(r, scale_log2_, is_split() ? -INFINITY : sink_of(a_, at.head));
        const float factor = softmax_[m].correction[r];
        if (row < item_.rows && columns_idx_ == 0 && lane % 4 == 0) store_weight(at, weight);
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
          *reinterpret_cast<float4*>(s_rows + lane / 4 * kColumns + column_of(i / 2, i % 2)) =
              sums_of(m, r, i / 2, i % 2, factor);
        }
        __syncwarp();
        store_eight(s_rows, warp_row_ + 16 * m + 8 * r, factor);
        __syncwarp();
      }
    }
  }
  __device__ __forceinline__ void store_eight(const float* s_rows, int first_row,
                                              float factor) const {
    constexpr int kPieces = kColumns / 4;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < 8 * kPieces; i += 32) {
      const int row = i / kPieces;
      const bool is_empty = __shfl_sync(~0u, factor, 4 * row) == 0;
      if (first_row + row >= item_.rows) continue;
      store_four(packed_row(first_row + row), columns_idx_ * kColumns + i % kPieces * 4,
                 *reinterpret_cast<const float4*>(s_rows + 4 * i), is_empty);
    }
  }

  // What the warps of other keys leave in shared memory, over queries and ring.
  struct Shares {
    float o[kKeyWarps][kRows][kDimV];  // normalised
    RowWeight weights[kKeyWarps][kRows];
  };
  __device__ __forceinline__ void merge_warps() {
    static_assert(sizeof(Shares) == kTile.merge_bytes() || kKeyWarps == 1);
    static_assert(kRowTiles == 1 || kKeyWarps == 1);
    auto& shares = *reinterpret_cast<Shares*>(s_q_);
    ptx::cp_async_wait<0>();
    __syncthreads();  // the ring has been read
    const int share = slice_ / kSliceKeys;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = thread_row(0, r);
      const RowWeight weight = softmax_[0].finish(r, scale_log2_, -INFINITY);
      const float factor = softmax_[0].correction[r];
      if (row >= item_.rows) continue;
      if (columns_idx_ == 0 && threadIdx.x % 4 == 0) shares.weights[share][row] = weight;
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        *reinterpret_cast<float4*>(
            &shares.o[share][row][columns_idx_ * kColumns + column_of(i / 2, i % 2)]) =
            sums_of(0, r, i / 2, i % 2, factor);
      }
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < item_.rows * (kDimV / 4); i += kThreads) {
      merge(shares, i / (kDimV / 4), i % (kDimV / 4) * 4);
    }
  }
  __device__ __forceinline__ void merge(const Shares& shares, int row, int column) const {
    const PackedRow at = packed_row(row);
    const float sink = is_split() ? -INFINITY : sink_of(a_, at.head);
    float top = __fmul_rn(sink, kLog2E);
#pragma unroll
    for (int i = 0; i < kKeyWarps; ++i) top = fmaxf(top, shares.weights[i][row].largest);
    float total = sink == -INFINITY ? 0 : ptx::exp2_approx(exponent_of(sink, kLog2E, top));
    float4 sums = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kKeyWarps; ++i) {
      const RowWeight weight = shares.weights[i][row];
      if (weight.sum == 0) continue;  // its sums may be anything
      const float share = weight.sum * ptx::exp2_approx(weight.largest - top);
      const float4 part = *reinterpret_cast<const float4*>(&shares.o[i][row][column]);
      total += share;
      sums.x = fmaf(share, part.x, sums.x);
      sums.y = fmaf(share, part.y, sums.y);
      sums.z = fmaf(share, part.z, sums.z);
      sums.w = fmaf(share, part.w, sums.w);
    }
    if (column == 0) store_weight(at, total == 0 ? RowWeight{-INFINITY, 0} : RowWeight{top, total});
    const float factor = total == 0 ? 0 : 1 / total;
    store_four(at, column,
               make_float4(sums.x * factor, sums.y * factor, sums.z * factor, sums.w * factor),
               total == 0);
  }

  const CodeTileArgs& args_;
  const PortableArgs& p_;
  const AttentionArgs& a_;
  const PackedItem& item_;  // in shared memory
  __nv_bfloat16* s_q_;      // [parts, rows, pitch_q]
  unsigned char* s_ring_;
  int32_t* s_dropped_ = nullptr;
  const float scale_log2_;
  float scale_k_;
  int columns_idx_, slice_, warp_row_;  // of this warp
  OnlineSoftmax softmax_[kRowTiles];
  float o_[kRowTiles][kColumns / 2];
};

template <int kDimV, int kRows>
__global__ void __launch_bounds__(CodeTile{kDimV, kRows}.threads(),
                                  CodeTile{kDimV, kRows}.resident())
    code_tiles(const __grid_constant__ CodeTileArgs args) {
  extern __shared__ __align__(16) unsigned char s_code_tiles[];
  static_assert(sizeof(PackedItem) + sizeof(int32_t) <= CodeTile::kItemBytes);
  unsigned char* const s_item = s_code_tiles + args.layout.bytes - CodeTile::kItemBytes;
  auto* const item = reinterpret_cast<PackedItem*>(s_item);
  if (threadIdx.x == 0) {
    *item = PackedItem(args.portable.attention, args.portable.rows,
                       args.portable.last_item - static_cast<int32_t>(blockIdx.x), kRows,
                       CodeTile{kDimV, kRows}.keys());
  }
  __syncthreads();
  if (item->rows <= 0) return;  // packed queries have fewer
  CodeBlock<kDimV, kRows> block(args, *item, s_code_tiles);
  ptx::launch_dependents();
  block.run(reinterpret_cast<int32_t*>(s_item + sizeof(PackedItem)));
}

}  // namespace

template <int kDimV, int kRows>
const void* code_tiles_instance(bool) {
  return reinterpret_cast<const void*>(&code_tiles<kDimV, kRows>);
}

}  // namespace wh::cuda
