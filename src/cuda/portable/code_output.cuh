// What a block over codes writes: rows of out or of partial results, merged where its warps took
// shares of the keys; and NaN in V, taken out and put back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/portable/code_products.cuh"

namespace wh::cuda {
namespace {

template <int kDimV, int kRows>
class CodeOutput : protected CodeProducts<kDimV, kRows> {
  using Products = CodeProducts<kDimV, kRows>;

 public:
  using Products::Products;

 protected:
  using Products::args_, Products::p_, Products::a_, Products::item_, Products::s_q_;
  using Products::kRowTiles, Products::kKeyWarps, Products::kColumns, Products::kBlocks;
  using Products::kTile, Products::kThreads, Products::kKeys, Products::kSliceKeys;
  using Products::packed_row, Products::place, Products::thread_row, Products::has_token_scales;
  using Products::scale_log2_, Products::columns_idx_, Products::slice_, Products::warp_row_;
  using Products::softmax_, Products::o_;
  using Products::values_of_stage, Products::scales_of_stage;

  __device__ __forceinline__ bool is_split() const { return p_.partials.splits > 1; }

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

  int32_t* s_dropped_ = nullptr;
};

}  // namespace
}  // namespace wh::cuda
