// Rows of K or V of one kv head as few_rows.cuh reads them: four columns of a key at a time, which
// come into a slot of 16 bytes in shared memory well ahead and are f32 there when they are used. A
// lane uses what it has copied itself.
#pragma once

#include "cuda/common/kv_codes.h"
#include "cuda/portable/kernel.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace wh::cuda {
namespace {

// Four columns of a key, or of none: keys that do not exist are not read, they and columns past the
// dimension become 0.
struct Piece {
  int32_t key;           // one that exists
  KeyRows::Place place;  // of it, where keys have pages
  int column;
  bool exists;
};

// Rows of f32. Pages are compiled in: asked for beside dense keys, they take registers.
template <bool kIsPaged>
class F32Rows {
 public:
  static constexpr bool kHasPages = kIsPaged;

  __device__ __forceinline__ F32Rows(const KvTensor& tensor, bool is_whole,
                                     const AttentionArgs& args, const PackedItem& item)
      : first_(static_cast<const float*>(tensor.data) + item.head_kv * tensor.stride[1]),
        stride_page_(tensor.stride[0]),
        stride_(tensor.stride[2]),
        stride_dim_(tensor.stride[3]),
        dim_(static_cast<int>(tensor.dim)),
        is_whole_(is_whole) {
    if constexpr (!kIsPaged) {  // from the sequence's first key on
      first_ += item.key_rows(args).offset(tensor.stride[0], tensor.stride[2], 0);
    }
  }

  __device__ __forceinline__ void copy(float4* slot, const Piece& piece) const {
    const uint32_t address = ptx::shared_address(slot);
    const float* row = first_;
    if constexpr (kIsPaged) {
      row += piece.place.batch_idx * stride_page_ + piece.place.token_idx * stride_;
    } else {
      row += piece.key * stride_;
    }
    const int left = piece.exists ? dim_ - piece.column : 0;  // columns to read
    if (is_whole_) {
      ptx::cp_async<16>(address, left > 0 ? row + piece.column : row, left > 0 ? 16 : 0);
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      ptx::cp_async<4>(address + 4 * e, e < left ? row + (piece.column + e) * stride_dim_ : row,
                       e < left ? 4 : 0);
    }
  }

 private:
  const float* first_;
  int64_t stride_page_, stride_, stride_dim_;
  int dim_;
  bool is_whole_;
};

// Rows of anything: codes come as they lie, their scale beside them, and are widened in place
// before they are used, as are elements of 16 bits. What does not lie in whole words is widened on
// the way in. Loops over pieces, of K and of V, are not unrolled: with every format in every place
// of a step a kernel was 400 KB to 1 MB, which newer cards translated for 10 to 20 s.
class StoredRows {
 public:
  __device__ __forceinline__ StoredRows(const KvTensor& tensor, bool is_whole, const AttentionArgs&,
                                        const PackedItem& item)
      : tensor_(&tensor), item_(&item), is_whole_(is_whole) {}

  __device__ __forceinline__ void copy(float4* slot, const Piece& piece) const {
    const KvPlace at = this->at(piece.place);
    const bool is_there = piece.exists && piece.column < tensor_->dim;
    if (!is_whole_) {
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        x[e] = piece.exists && piece.column + e < tensor_->dim
                   ? tensor_->element(at, piece.column + e)
                   : 0;
      }
      *slot = make_float4(x[0], x[1], x[2], x[3]);
      return;
    }
    const uint32_t address = ptx::shared_address(slot);
    const auto* data = static_cast<const char*>(tensor_->data);
    const int64_t first = tensor_->offset(at);
    if (tensor_->format == Quantised::kNone) {
      const int64_t column = is_there ? first + piece.column : 0;
      if (tensor_->dtype == Dtype::kF32) {
        ptx::cp_async<16>(address, data + 4 * column, is_there ? 16 : 0);
      } else {
        ptx::cp_async<8>(address, data + 2 * column, is_there ? 8 : 0);
      }
      return;
    }
    const CodesAt codes = is_there ? codes_at(tensor_->format, first, piece.column) : CodesAt{0, 0};
    if (!is_block_format(tensor_->format)) {
      ptx::cp_async<4>(address, data + codes.codes, is_there ? 4 : 0);
      if (tensor_->scales == Scales::kTokenHead) {
        ptx::cp_async<4>(address + kScaleByte,
                         tensor_->scales_data + (is_there ? tensor_->scale_offset(at) : 0),
                         is_there ? 4 : 0);
      }
      return;
    }
    // Aligned words around what is aligned to 2 bytes alone; of the last one nothing past the codes
    // is read, and the scale's begins no earlier than the tensor.
    const bool is_low = codes.codes % 4 == 0;
    ptx::cp_async<4>(address, data + codes.codes / 4 * 4, is_there ? 4 : 0);
    ptx::cp_async<4>(address + 4, data + (is_low ? 0 : codes.codes / 4 * 4 + 4),
                     is_there && !is_low ? 2 : 0);
    const bool is_low_scale = codes.scale % 4 == 0;
    ptx::cp_async<4>(address + kScaleByte, data + codes.scale / 4 * 4,
                     !is_there ? 0 : (is_low_scale ? 2 : 4));
    reinterpret_cast<uint32_t*>(slot)[3] = (is_low ? 0 : 16) | (is_low_scale ? 0 : 0x100);
  }

  // What copy() has brought of kKeys keys, four columns each. slot(key): where that is.
  template <int kKeys, typename Slot>
  __device__ __forceinline__ void widen(int column, const Slot& slot) const {
    if (!is_whole_ || (tensor_->format == Quantised::kNone && tensor_->dtype == Dtype::kF32)) {
      return;  // it is there already
    }
    float4 x[kKeys];
#pragma unroll
    for (int key = 0; key < kKeys; ++key) x[key] = *slot(key);
    if (column >= tensor_->dim) {  // whatever the scale is
#pragma unroll
      for (int key = 0; key < kKeys; ++key) x[key] = make_float4(0, 0, 0, 0);
    } else {
      widen(column, x);
    }
#pragma unroll
    for (int key = 0; key < kKeys; ++key) *slot(key) = x[key];
  }

 private:
  static constexpr int kScaleByte = 8;  // in the slot

  template <int kKeys>
  __device__ __forceinline__ void widen(int column, float4 (&x)[kKeys]) const {
    switch (tensor_->format) {
      case Quantised::kNone:
        return tensor_->dtype == Dtype::kF16 ? widen_elements<Half>(x)
                                             : widen_elements<Bfloat16>(x);
      case Quantised::kE4m3:
        return widen_scaled<Quantised::kE4m3>(column, x);
      case Quantised::kInt8:
        return widen_scaled<Quantised::kInt8>(column, x);
      case Quantised::kQ8_0:
        return widen_blocks<Quantised::kQ8_0>(column, x);
      case Quantised::kQ4_0:
        return widen_blocks<Quantised::kQ4_0>(column, x);
    }
  }
  template <typename T, int kKeys>
  static __device__ __forceinline__ void widen_elements(float4 (&x)[kKeys]) {
#pragma unroll
    for (float4& four : x) {
      const uint32_t low = __float_as_uint(four.x), high = __float_as_uint(four.y);
      four = make_float4(
          to_float(T{static_cast<uint16_t>(low)}), to_float(T{static_cast<uint16_t>(low >> 16)}),
          to_float(T{static_cast<uint16_t>(high)}), to_float(T{static_cast<uint16_t>(high >> 16)}));
    }
  }
  template <Quantised kFormat, int kKeys>
  __device__ __forceinline__ void widen_scaled(int column, float4 (&x)[kKeys]) const {
    const bool is_token = tensor_->scales == Scales::kTokenHead;
    float shared[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) shared[e] = is_token ? 0 : tensor_->scale(at({0, 0}), column + e);
#pragma unroll
    for (float4& four : x) {
      const float token = four.z;
      float codes[4];
      widen_codes(kFormat, column, __float_as_uint(four.x), codes);
#pragma unroll
      for (int e = 0; e < 4; ++e) codes[e] *= is_token ? token : shared[e];
      four = make_float4(codes[0], codes[1], codes[2], codes[3]);
    }
  }
  template <Quantised kFormat, int kKeys>
  static __device__ __forceinline__ void widen_blocks(int column, float4 (&x)[kKeys]) {
#pragma unroll
    for (float4& four : x) {
      const uint32_t low = __float_as_uint(four.x), high = __float_as_uint(four.y);
      const uint32_t scales = __float_as_uint(four.z), shifts = __float_as_uint(four.w);
      float codes[4];
      widen_codes(kFormat, column, __funnelshift_r(low, high, shifts & 31), codes);
      const float scale =
          to_float(Half{static_cast<uint16_t>(shifts & 0x100 ? scales >> 16 : scales)});
      four = make_float4(codes[0] * scale, codes[1] * scale, codes[2] * scale, codes[3] * scale);
    }
  }
  // Scales of heads and channels are the sequence's: any place will do.
  __device__ __forceinline__ KvPlace at(const KeyRows::Place& place) const {
    return {place.batch_idx, item_->head_kv, place.token_idx, item_->sequence.batch_idx};
  }

  const KvTensor* tensor_;  // in the kernel's arguments
  const PackedItem* item_;
  bool is_whole_;
};

}  // namespace
}  // namespace wh::cuda
