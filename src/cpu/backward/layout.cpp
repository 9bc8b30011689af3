#include "cpu/backward/layout.h"

#include <algorithm>

#include "cpu/common/simd.h"

namespace wh::cpu {
namespace {

// The stride of rows that are read down a column: 64 bytes off a power of two.
int64_t padded_columns(int64_t dim) { return round_up(dim, 16) + 16; }

}  // namespace

BackwardShape::BackwardShape(const Problem& p, const Config& config, int64_t simd_floats)
    : lanes(kBackwardPanelVectors * simd_floats),
      tile_q(config.tile_q),
      tile_k(config.tile_k),
      q_tiles(divide_up(p.len_q * p.group(), tile_q)),
      k_tiles(divide_up(p.len_k, tile_k)),
      heads(p.batch * p.heads_kv),
      len_q_(p.len_q),
      heads_kv_(p.heads_kv) {
  const int64_t rows = query_storage(p).batch * query_storage(p).length * p.group();
  head_rows_ = rows + p.batch * (kBackwardRowStep - 1);
  head_tiles_ = rows / tile_q + p.batch;
}

// Ranges move with the query and leave no gaps: the first query begins and the last one ends.
KeyRange keys_of_rows(const Problem& p, const BackwardHead& head, int64_t begin, int64_t end) {
  const KeyRange keys{visible_keys(p, head.sequence, head.query_of(begin)).begin,
                      visible_keys(p, head.sequence, head.query_of(end - 1)).end};
  return keys.empty() ? KeyRange{0, 0} : keys;
}

BackwardScratch::BackwardScratch(Carver& carver, const Problem& p, const BackwardShape& shape)
    : k_columns(padded_columns(p.dim_qk)),
      q_columns(padded_columns(p.dim_qk)),
      d_out_columns(padded_columns(p.dim_v)),
      staged_columns(padded_columns(std::max({p.dim_qk, p.dim_v, shape.lanes}))) {
  const int64_t keys = round_up(shape.tile_k, shape.lanes);
  k = carver.take<float>(keys * k_columns);
  k_lanes = carver.take<float>(keys * p.dim_qk);
  v_lanes = carver.take<float>(keys * p.dim_v);
  dk_lanes = carver.take<float>(keys * padded_dim(p.dim_qk));
  dv_lanes = carver.take<float>(keys * padded_dim(p.dim_v));
  q = carver.take<float>(shape.tile_q * q_columns);
  d_out = carver.take<float>(shape.tile_q * d_out_columns);
  weights = carver.take<float>(shape.tile_q * shape.lanes);
  d_scores = carver.take<float>(shape.tile_q * keys);
  bias = p.mask == MaskKind::kNone ? nullptr : carver.take<float>(shape.tile_q * shape.lanes);
  staged = carver.take<float>(4 * staged_columns);
  ones = carver.take<float>(shape.lanes);
  largest = carver.take<float>(shape.tile_q);
  sums = carver.take<float>(shape.tile_q);
  first = carver.take<int32_t>(shape.tile_q);
  last = carver.take<int32_t>(shape.tile_q);
}

BackwardWorkspace::BackwardWorkspace(const Problem& p, const Config& config, void* base)
    : shape(p, config, simd_floats()),
      workers(static_cast<int32_t>(
          std::min<int64_t>(config.workers, shape.heads * std::max(shape.q_tiles, shape.k_tiles)))),
      dq_columns(round_up(p.dim_qk, 16)),
      problem_(p),
      base_(static_cast<std::byte*>(base)) {
  Carver carver(base);
  const int64_t rows = shape.shared_rows();
  shift = carver.take<float>(rows);
  factor = carver.take<float>(rows);
  delta = carver.take<float>(rows);
  dq = carver.take<float>(rows * dq_columns);
  turns = carver.take<int32_t>(shape.shared_tiles());
  Carver measure(nullptr);
  BackwardScratch(measure, p, shape);
  scratches_ = {carver, measure};
}

BackwardScratch BackwardWorkspace::scratch(int32_t worker) const {
  Carver carver(scratches_.at(base_, worker));
  return BackwardScratch(carver, problem_, shape);
}

int64_t BackwardWorkspace::work(const Tensors& t) const {
  const Problem& p = problem_;
  int64_t work = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const BackwardHead head = BackwardHead::at(p, t, b * p.heads_kv);
    for (int64_t begin = 0; begin < head.rows(); begin += shape.tile_q) {
      const int64_t rows = std::min(shape.tile_q, head.rows() - begin);
      work += backward_work(p, rows, keys_of_rows(p, head, begin, begin + rows).size()) +
              rows * p.dim_v;
    }
    work += head.keys * (p.dim_qk + p.dim_v);
  }
  return p.heads_kv * work;
}

}  // namespace wh::cpu
