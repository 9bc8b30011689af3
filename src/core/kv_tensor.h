// K or V of a run as they are stored: type or format, scales and strides in one place, so that
// kernels, of the host and the device, and the reference ask one thing what an element is.
#pragma once

#include "core/element.h"
#include "core/key_rows.h"
#include "core/problem.h"
#include "core/quantised.h"

namespace wh {

// A row is found by where it is stored, as is the scale of a token; the scale of a head or channel
// by the sequence.
struct KvPlace {
  int64_t batch_idx, head_kv,
      key_idx;  // of the tensor: a page and a token in it, where it has them
  int64_t sequence_idx;
};
template <typename Int>
constexpr KvPlace place_of(const KeyRowsOf<Int>& rows, const SequenceOf<Int>& sequence, Int head_kv,
                           Int key) {
  const auto at = rows.place(key);
  return {at.batch_idx, head_kv, at.token_idx, sequence.batch_idx};
}

struct KvTensor {
  const void* data;
  const float* scales_data;  // null: there are none
  Dtype dtype;               // where it is not quantised
  Quantised format;
  Scales scales;
  Strides stride, stride_scales;
  int64_t dim;

  constexpr int64_t bytes(int64_t elements) const { return stored_bytes(format, dtype, elements); }
  // In elements.
  constexpr int64_t offset(const KvPlace& at) const {
    return at.batch_idx * stride[0] + at.head_kv * stride[1] + at.key_idx * stride[2];
  }
  // Of the first column. Strides of what shares a scale are not stepped over.
  constexpr int64_t scale_offset(const KvPlace& at) const {
    switch (scales) {
      case Scales::kNone:
      case Scales::kTensor:
        return 0;
      case Scales::kHead:
      case Scales::kChannel:
        return at.sequence_idx * stride_scales[0] + at.head_kv * stride_scales[1];
      case Scales::kTokenHead:
        return at.batch_idx * stride_scales[0] + at.head_kv * stride_scales[1] +
               at.key_idx * stride_scales[2];
    }
    __builtin_unreachable();
  }
  constexpr float scale(const KvPlace& at, int64_t column) const {
    if (scales_data == nullptr) return 1;
    const int64_t along = scales == Scales::kChannel ? column * stride_scales[3] : 0;
    return scales_data[scale_offset(at) + along];
  }
  // One element as f32. For code that is not hot.
  constexpr float element(const KvPlace& at, int64_t column) const {
    const int64_t first = offset(at);
    switch (format) {
      case Quantised::kNone:
        return load_element(data, dtype, first + column * stride[3]);
      case Quantised::kE4m3:
        return to_float(static_cast<const E4m3*>(data)[first + column * stride[3]]) *
               scale(at, column);
      case Quantised::kInt8:
        return to_float(static_cast<const Int8*>(data)[first + column * stride[3]]) *
               scale(at, column);
      case Quantised::kQ8_0:
        return to_float(static_cast<const Q8_0*>(data)[(first + column) / kBlockElements],
                        column % kBlockElements);
      case Quantised::kQ4_0:
        return to_float(static_cast<const Q4_0*>(data)[(first + column) / kBlockElements],
                        column % kBlockElements);
    }
    __builtin_unreachable();  // validate() knows no other
  }
};

inline KvTensor keys_of(const Problem& p, const Tensors& t) {
  return {t.k,        t.scales_k, p.dtype_kv,        p.quantised_k,
          p.scales_k, p.stride_k, p.stride_scales_k, p.dim_qk};
}
inline KvTensor values_of(const Problem& p, const Tensors& t) {
  if (p.values_in_keys) {
    KvTensor values = keys_of(p, t);
    values.dim = p.dim_v;
    return values;
  }
  return {t.v,        t.scales_v, p.dtype_kv,        p.quantised_v,
          p.scales_v, p.stride_v, p.stride_scales_v, p.dim_v};
}

}  // namespace wh
