#include "cpu/partial.h"

#include <cmath>
#include <limits>

#include "core/float16.h"

namespace wh::cpu {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <typename T>
void store_scaled(T* out, int64_t out_stride, const float* o, int64_t o_stride, int64_t dim,
                  float factor) {
  for (int64_t d = 0; d < dim; ++d) {
    out[d * out_stride] = from_float<T>(o[d * o_stride] * factor);
  }
}

}  // namespace

void store_row(const Problem& p, const Tensors& t, RowId id, float m, float l, const float* o,
               int64_t o_stride) {
  const int64_t group = p.group();
  const int64_t query = id.row / group;
  const int64_t head = id.head_kv * group + id.row % group;
  float factor = 1;  // of o: what joining the sink leaves of it
  if (p.has_sinks) {
    const float sink = t.sinks[head] * kLog2e;
    const float largest = m < sink ? sink : m;
    const float shift = largest == -kInfinity ? 0 : largest;
    factor = std::exp2(m - shift);
    l = l * factor + std::exp2(sink - shift);
    m = largest;
  }
  const bool is_empty = l == 0;  // NaN is not empty
  const float scale = is_empty ? 0 : factor / l;
  const int64_t offset =
      id.batch_idx * p.stride_out[0] + head * p.stride_out[1] + query * p.stride_out[2];
  switch (p.dtype_q) {
    case Dtype::kF32:
      store_scaled(static_cast<float*>(t.out) + offset, p.stride_out[3], o, o_stride, p.dim_v,
                   scale);
      break;
    case Dtype::kF16:
      store_scaled(static_cast<Half*>(t.out) + offset, p.stride_out[3], o, o_stride, p.dim_v,
                   scale);
      break;
    case Dtype::kBf16:
      store_scaled(static_cast<Bfloat16*>(t.out) + offset, p.stride_out[3], o, o_stride, p.dim_v,
                   scale);
      break;
  }
  if (p.wants_log_sum_exp) {
    t.log_sum_exp[(id.batch_idx * p.heads_q + head) * p.len_q + query] =
        is_empty ? -kInfinity : (m + std::log2(l)) * kLn2;
  }
}

void merge_rows(const Problem& p, const Tensors& t, const Partials& partials, int64_t begin,
                int64_t end, float* scratch) {
  const int64_t rows_per_head = p.len_q * p.group();
  for (int64_t row = begin; row < end; ++row) {
    float m = -kInfinity;
    for (int64_t c = 0; c < partials.chunks; ++c) {
      m = std::fmax(m, partials.m[c * partials.rows + row]);
    }
    const float shift = m == -kInfinity ? 0 : m;
    float l = 0;
    for (int64_t d = 0; d < p.dim_v; ++d) scratch[d] = 0;
    for (int64_t c = 0; c < partials.chunks; ++c) {
      const int64_t i = c * partials.rows + row;
      if (partials.l[i] == 0) continue;  // the chunk saw none of this row's keys
      const float weight = std::exp2(partials.m[i] - shift);
      l += partials.l[i] * weight;
      const float* o = partials.o + i * p.dim_v;
      for (int64_t d = 0; d < p.dim_v; ++d) scratch[d] += o[d] * weight;
    }
    const int64_t head = row / rows_per_head;
    const RowId id{head / p.heads_kv, head % p.heads_kv, row % rows_per_head};
    store_row(p, t, id, m, l, scratch, 1);
  }
}

}  // namespace wh::cpu
