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

// The same of an output of any type, by strides.
void add_weighted_output(const OutputPart& part, int64_t offset, float weight, int64_t dim,
                         float* HWY_RESTRICT sum) {
  with_element_type(part.dtype, [&]<typename T>(T) {
    const T* out = static_cast<const T*>(part.out) + offset;
    const int64_t stride = part.stride_out[3];
    int64_t d = 0;
    if (stride == 1) {
      const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
      for (; d + lanes <= dim; d += lanes) {
        hn::StoreU(hn::MulAdd(load_f32(out + d), hn::Set(F32(), weight), hn::LoadU(F32(), sum + d)),
                   F32(), sum + d);
      }
    }
    for (; d < dim; ++d) sum[d] += to_float(out[d * stride]) * weight;
  });
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(store_scaled);
HWY_EXPORT(add_weighted);
HWY_EXPORT(add_weighted_output);

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A sum over keys of weight 0 may be NaN.
constexpr float kNoOutput[kMaxDim] = {kEmptyRowOut};

// Of a row or of a part of its keys: the largest score or what stands for it, and the sum of the
// weights in its units.
struct RowState {
  float m, l;
};

// The one rule of merging: what the parts' weights add up to, in the units of the largest. Calls
// add(part, weight) for every part that saw something; `exp` is of the base that m is in.
template <typename StateOf, typename Exp, typename Add>
RowState merge_states(int64_t parts, const StateOf& state_of, const Exp& exp, const Add& add) {
  float m = -kInfinity;
  for (int64_t i = 0; i < parts; ++i) m = std::fmax(m, state_of(i).m);
  const float shift = m == -kInfinity ? 0 : m;
  float l = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const RowState part = state_of(i);
    if (is_empty_row(part.l)) continue;  // it saw none of this row's keys
    const float weight = exp(part.m - shift);
    l += part.l * weight;
    add(i, weight);
  }
  return {m, l};
}

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
  const int64_t batch_idx = id.sequence.query_batch, token = id.sequence.first_query + query;
  const int64_t offset =
      batch_idx * p.stride_out[0] + head * p.stride_out[1] + token * p.stride_out[2];
  HWY_DYNAMIC_DISPATCH(store_scaled)
  (o, scale, p.dim_v, t.out, p.dtype_out(), offset, p.stride_out[3]);
  if (p.wants_log_sum_exp) {
    t.log_sum_exp[row_index(p.query_layout, p.heads_q, p.len_q, batch_idx, head, token)] =
        is_empty ? kEmptyRowLogSumExp : (m + std::log2(l)) * kLn2;
  }
}

void merge_rows(const Problem& p, const Tensors& t, const Partials& partials, int64_t begin,
                int64_t end, float* scratch) {
  const int64_t rows_per_head = p.len_q * p.group();
  for (int64_t row = begin; row < end; ++row) {
    const int64_t head = row / rows_per_head;
    const RowId id{sequence_at(p, t, head / p.heads_kv), head % p.heads_kv, row % rows_per_head};
    if (id.row >= id.sequence.len_q * p.group()) continue;
    for (int64_t d = 0; d < p.dim_v; ++d) scratch[d] = 0;
    const RowState merged = merge_states(
        partials.chunks,
        [&](int64_t c) {
          const int64_t i = c * partials.rows + row;
          return RowState{partials.m[i], partials.l[i]};
        },
        [](float x) { return std::exp2(x); },
        [&](int64_t c, float weight) {
          HWY_DYNAMIC_DISPATCH(add_weighted)
          (partials.o + (c * partials.rows + row) * p.dim_v, weight, p.dim_v, scratch);
        });
    store_row(p, t, id, merged.m, merged.l, scratch);
  }
}

void merge_outputs(const OutputMerge& merge, int64_t begin, int64_t end) {
  const int64_t heads = merge.extents[1], length = merge.extents[2], dim = merge.extents[3];
  const auto parts = static_cast<int64_t>(merge.parts.size());
  float sum[kMaxDim];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at[] = {row / length / heads, row / length % heads, row % length};
    const auto offset = [&](const auto& strides) {
      return at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2];
    };
    // A part counts as one key with its log-sum-exp for a score, and so does the sink, behind them.
    const auto state_of = [&](int64_t i) {
      const OutputPart* part = i < parts ? &merge.parts[i] : nullptr;
      const float m = part == nullptr ? sink_score(merge.sinks, at[1])
                                      : part->log_sum_exp[offset(part->stride_log_sum_exp)];
      return RowState{m, m == -kInfinity ? 0.0f : 1.0f};
    };
    const auto exp = [](float x) { return std::exp(x); };
    const RowState merged = merge_states(parts + 1, state_of, exp, [](int64_t, float) {});
    for (int64_t d = 0; d < dim; ++d) sum[d] = kEmptyRowOut;
    // Shares of the whole, not weights: where outputs are as large as floats go, a sum of weighted
    // ones would overflow.
    for (int64_t i = 0; i < parts; ++i) {
      const RowState state = state_of(i);
      if (is_empty_row(state.l)) continue;
      const OutputPart& part = merge.parts[i];
      const float share = std::exp(state.m - merged.m) / merged.l;
      HWY_DYNAMIC_DISPATCH(add_weighted_output)(part, offset(part.stride_out), share, dim, sum);
    }
    HWY_DYNAMIC_DISPATCH(store_scaled)
    (sum, 1, dim, merge.out, merge.dtype, offset(merge.stride_out), merge.stride_out[3]);
    if (merge.log_sum_exp != nullptr) {
      merge.log_sum_exp[offset(merge.stride_log_sum_exp)] =
          is_empty_row(merged.l) ? kEmptyRowLogSumExp : merged.m + std::log(merged.l);
    }
  }
}

}  // namespace wh::cpu
#endif
