#include "cpu/prefill/layout.h"

#include <algorithm>

#include "core/rounding.h"
#include "cpu/common/simd.h"
#include "cpu/common/steps.h"

namespace wh::cpu {

PrefillShape::PrefillShape(const Problem& p, const Config& config, int64_t simd_floats)
    : lanes(kPanelVectors * simd_floats),
      rows_per_head(p.len_q * p.group()),
      tile_q(config.tile_q),
      tile_k(config.tile_k),
      q_tiles(divide_up(rows_per_head, tile_q)),
      chunks(config.chunk_keys > 0 ? std::max<int64_t>(1, divide_up(p.len_k, config.chunk_keys))
                                   : 1),
      chunk_keys(chunks > 1 ? config.chunk_keys : p.len_k),
      items(p.batch * p.heads_kv * q_tiles * chunks),
      len_k(p.len_k) {}

PrefillItem PrefillShape::item(int64_t batch_idx, int64_t head_kv, int64_t q_tile,
                               int64_t chunk) const {
  const int64_t row_begin = q_tile * tile_q;
  return {batch_idx,
          head_kv,
          row_begin,
          std::min(row_begin + tile_q, rows_per_head),
          {chunk * chunk_keys, std::min(len_k, (chunk + 1) * chunk_keys)},
          chunk};
}

PrefillItem item_of(const Problem& p, const Sequence& sequence, PrefillItem item) {
  item.row_end = std::clamp(sequence.len_q * p.group(), item.row_begin, item.row_end);
  return item;
}

// Ranges move with the query and leave no gaps: the first query begins and the last one ends.
KeyRange keys_of_item(const Problem& p, const Sequence& sequence, const PrefillItem& item) {
  const KeyRange first = visible_keys(p, sequence, item.row_begin / p.group());
  const KeyRange last = visible_keys(p, sequence, (item.row_end - 1) / p.group());
  const KeyRange keys{std::max(first.begin, item.keys.begin), std::min(last.end, item.keys.end)};
  return keys.empty() ? KeyRange{0, 0} : keys;
}

PrefillScratch::PrefillScratch(Carver& carver, const Problem& p, const PrefillShape& shape,
                               Arithmetic arithmetic) {
  const bool is_bf16 = arithmetic != Arithmetic::kF32;
  const int64_t panels = divide_up(shape.tile_q, shape.lanes);
  // One register tile more than the keys: the last one may run past them.
  const int64_t keys = round_up(shape.tile_k, kMostBroadcastRows) + kMostBroadcastRows;
  q_rows = is_bf16 ? divide_up(p.dim_qk, 2) : p.dim_qk;
  k_columns = round_up(q_rows, 16) + 16;
  v_columns = round_up(p.dim_v, 16) + 16;
  staged_columns = round_up(std::max({p.dim_qk, p.dim_v, keys}), 16);
  q = carver.take<float>(panels * q_rows * shape.lanes);
  o = carver.take<float>(panels * round_up(p.dim_v, kMostBroadcastRows) * shape.lanes);
  k = carver.take<float>(keys * k_columns);
  v = carver.take<float>((is_bf16 ? keys / 2 : keys) * v_columns);
  s = carver.take<float>(keys * shape.lanes);
  p_low =
      arithmetic == Arithmetic::kBf16High ? carver.take<float>(keys / 2 * shape.lanes) : nullptr;
  bias = p.mask == MaskKind::kNone ? nullptr : carver.take<float>(keys * shape.lanes);
  staged = carver.take<float>(4 * staged_columns);
  m = carver.take<float>(panels * shape.lanes);
  l = carver.take<float>(panels * shape.lanes);
  alpha = carver.take<float>(shape.lanes);
  first = carver.take<int32_t>(panels * shape.lanes);
  last = carver.take<int32_t>(panels * shape.lanes);
}

PrefillWorkspace::PrefillWorkspace(const Problem& p, const Config& config, void* base)
    : shape(p, config, simd_floats()),
      workers(static_cast<int32_t>(std::min<int64_t>(config.workers, shape.items))),
      problem_(p),
      arithmetic_(config.arithmetic),
      base_(static_cast<std::byte*>(base)) {
  Carver carver(base);
  partials.chunks = shape.chunks;
  if (shape.chunks > 1) {
    partials.rows = p.batch * p.heads_kv * shape.rows_per_head;
    partials.dim_v = p.dim_v;
    partials.carve(carver);
  }
  Carver measure(nullptr);
  PrefillScratch(measure, p, shape, arithmetic_);
  scratches_ = {carver, measure};
}

int64_t PrefillWorkspace::work(const Tensors& t) const {
  const Problem& p = problem_;
  int64_t work = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = sequence_at(p, t, b);
    for (int64_t q_tile = 0; q_tile < shape.q_tiles; ++q_tile) {
      for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) {
        const PrefillItem item = item_of(p, sequence, shape.item(b, 0, q_tile, chunk));
        if (item.rows() == 0) continue;
        work +=
            tile_work(p, item.rows(), keys_of_item(p, sequence, item)) + store_work(p, item.rows());
      }
    }
  }
  return work * p.heads_kv + merge_work(partials, partials.rows);
}

PrefillScratch PrefillWorkspace::scratch(int32_t worker) const {
  Carver carver(scratches_.at(base_, worker));
  return PrefillScratch(carver, problem_, shape, arithmetic_);
}

}  // namespace wh::cpu
