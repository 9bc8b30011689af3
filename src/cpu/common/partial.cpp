#include "cpu/common/partial.h"

#include <cmath>
#include <limits>

#include "core/array_mask.h"
#include "core/element.h"
#include "core/score_rules.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/common/partial.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/common/tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// sum[d] += o[d] * weight.
void add_weighted(const float* HWY_RESTRICT o, float weight, int64_t dim, float* HWY_RESTRICT sum) {
  for (int64_t d = 0; d < dim; ++d) sum[d] += o[d] * weight;
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(store_scaled);
HWY_EXPORT(add_weighted);

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A sum over keys of weight 0 may be NaN.
constexpr float kNoOutput[kMaxDim] = {kEmptyRowOut};

}  // namespace

void store_row(const Problem& p, const Tensors& t, RowId id, float m, float l, const float* o) {
  const int64_t group = p.group();
  const int64_t query = id.row / group;
  const int64_t head = id.head_kv * group + id.row % group;
  float factor = 1;  // of o: what joining the sink leaves of it
  if (p.has_sinks) {
    // Volatile: rounded before `shift`, which may be it, is subtracted. Compilers fuse the two
    // where the baseline has multiply-adds (64-bit ARM), and the sink's own exponent would not be
    // 0.
    const volatile float rounded_sink = sink_score(t.sinks, head) * kLog2E;
    const float sink = rounded_sink;
    const float largest = m < sink ? sink : m;
    const float shift = largest == -kInfinity ? 0 : largest;
    factor = std::exp2(m - shift);
    l = l * factor + std::exp2(sink - shift);
    m = largest;
  }
  const bool is_empty = is_empty_row(l);
  if (is_empty) o = kNoOutput;
  const float scale = is_empty ? 1 : factor / l;
  const int64_t offset =
      id.batch_idx * p.stride_out[0] + head * p.stride_out[1] + query * p.stride_out[2];
  HWY_DYNAMIC_DISPATCH(store_scaled)
  (o, scale, p.dim_v, t.out, p.dtype_q, offset, p.stride_out[3]);
  if (p.wants_log_sum_exp) {
    t.log_sum_exp[(id.batch_idx * p.heads_q + head) * p.len_q + query] =
        is_empty ? kEmptyRowLogSumExp : (m + std::log2(l)) * kLn2;
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
      if (is_empty_row(partials.l[i])) continue;  // the chunk saw none of this row's keys
      const float weight = std::exp2(partials.m[i] - shift);
      l += partials.l[i] * weight;
      HWY_DYNAMIC_DISPATCH(add_weighted)(partials.o + i * p.dim_v, weight, p.dim_v, scratch);
    }
    const int64_t head = row / rows_per_head;
    const RowId id{head / p.heads_kv, head % p.heads_kv, row % rows_per_head};
    store_row(p, t, id, m, l, scratch);
  }
}

}  // namespace wh::cpu
#endif
