// Where a worker is: one (batch, kv head) pair, and where its rows and keys lie in the tensors.
#pragma once

#include "core/key_range.h"
#include "core/problem.h"

namespace wh::cpu {

// Rows are numbered as in layout.h.
struct BackwardHead {
  int64_t idx = 0;  // batch_idx * heads_kv + head_kv
  int64_t batch_idx = 0;
  int64_t head_kv = 0;
  int64_t group = 1;
  KeyRange present{0, 0};

  static BackwardHead at(const Problem& p, const Tensors& t, int64_t idx) {
    const int64_t batch_idx = idx / p.heads_kv;
    return {idx, batch_idx, idx % p.heads_kv, p.group(), present_keys(p, t, batch_idx)};
  }

  int64_t query_of(int64_t row) const { return row / group; }
  int64_t head_of(int64_t row) const { return head_kv * group + row % group; }
  int64_t row_offset(const Strides& stride, int64_t row) const {
    return batch_idx * stride[0] + head_of(row) * stride[1] + query_of(row) * stride[2];
  }
  int64_t key_offset(const Strides& stride, int64_t key) const {
    return batch_idx * stride[0] + head_kv * stride[1] + key * stride[2];
  }
};

}  // namespace wh::cpu
