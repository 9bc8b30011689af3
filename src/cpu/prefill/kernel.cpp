// cpu_prefill: many query rows against a kv head.
//
// Schedule: an item is up to tile_q rows of one (batch, kv head) pair (every head of the group, so
// that a widened K/V tile serves them all), optionally one chunk of the keys. For each tile of keys
// the item's panels of `lanes` rows run scores -> online softmax -> values; scores of one panel and
// tile (18 KB) never leave L1, Q and O panels stay in L2.
//
// Roofline: 2 * (dim_qk + dim_v) flops a pair at the FMA peak. Softmax costs about 12 vector
// operations a pair, so at dim 64 it is 9 % and at 256 2.5 % of the time; widening K and V 3-4 %.
#include "cpu/prefill/kernel.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "core/array_mask.h"
#include "core/key_range.h"
#include "cpu/prefill/config.h"
#include "cpu/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/prefill/kernel.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/tile-inl.h"
#include "cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

struct Item {
  int64_t batch_idx, head_kv;
  int64_t row_begin, row_end;  // within the head's len_q * group rows
  KeyRange keys;               // of its chunk
  int64_t chunk;
};

class PrefillWorker {
 public:
  PrefillWorker(const Problem& p, const Tensors& t, const PrefillShape& shape,
                const PrefillScratch& scratch, const Partials& partials)
      : p_(p), t_(t), shape_(shape), w_(scratch), partials_(partials) {}

  void run(const Item& item) {
    item_ = item;
    panels_ = (item.row_end - item.row_begin + shape_.lanes - 1) / shape_.lanes;
    load_queries();
    const KeyRange keys = item_keys();
    // Tiles sit at multiples of tile_k, so a row meets the same tiles whatever item it is in.
    for (int64_t k0 = keys.begin / shape_.tile_k * shape_.tile_k; k0 < keys.end;
         k0 += shape_.tile_k) {
      tile_ = {std::max(k0, keys.begin), std::min(k0 + shape_.tile_k, keys.end)};
      run_tile();
    }
    store();
  }

 private:
  // Panels are full but for the last, which takes as few vectors as hold its rows.
  int64_t panel_rows(int64_t panel) const {
    return std::min(shape_.lanes, item_.row_end - item_.row_begin - panel * shape_.lanes);
  }
  int64_t panel_vectors(int64_t panel) const {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
    return (panel_rows(panel) + lanes - 1) / lanes;
  }
  int64_t padded_dim_v() const { return (p_.dim_v + 7) / 8 * 8; }
  float* q_panel(int64_t panel) const { return w_.q + panel * p_.dim_qk * shape_.lanes; }
  float* o_panel(int64_t panel) const { return w_.o + panel * padded_dim_v() * shape_.lanes; }

  void load_queries() {
    switch (p_.dtype_q) {
      case Dtype::kF32:
        return load_queries_as<float>();
      case Dtype::kF16:
        return load_queries_as<Half>();
      case Dtype::kBf16:
        return load_queries_as<Bfloat16>();
    }
  }

  template <typename T>
  void load_queries_as() {
    const int64_t lanes_per_vector = static_cast<int64_t>(hn::Lanes(F32()));
    const KeyRange present = present_keys(p_, t_, item_.batch_idx);
    const int64_t group = p_.group();
    // Scores are kept in base 2. With a softcap the conversion must wait until after tanh.
    const float scale = p_.softcap > 0 ? p_.scale / p_.softcap : p_.scale * 1.44269504f;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t width = panel_vectors(panel) * lanes_per_vector;
      float* q = q_panel(panel);
      for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t slot = panel * shape_.lanes + lane;
        w_.m[slot] = -std::numeric_limits<float>::infinity();
        w_.l[slot] = 0;
        const int64_t row = item_.row_begin + slot;
        if (row >= item_.row_end) {  // an empty lane sees nothing
          w_.first[slot] = w_.last[slot] = 0;
          for (int64_t d = 0; d < p_.dim_qk; ++d) q[d * width + lane] = 0;
          continue;
        }
        const int64_t query = row / group;
        const KeyRange visible = visible_keys(p_, present, query);
        const int64_t end = std::max<int64_t>(std::min(visible.end, item_.keys.end), 0);
        w_.last[slot] = static_cast<int32_t>(end);
        w_.first[slot] =
            static_cast<int32_t>(std::min(std::max(visible.begin, item_.keys.begin), end));
        const T* from = static_cast<const T*>(t_.q) + item_.batch_idx * p_.stride_q[0] +
                        (item_.head_kv * group + row % group) * p_.stride_q[1] +
                        query * p_.stride_q[2];
        for (int64_t d = 0; d < p_.dim_qk; ++d) {
          q[d * width + lane] = to_float(from[d * p_.stride_q[3]]) * scale;
        }
      }
      float* o = o_panel(panel);
      for (int64_t i = 0; i < padded_dim_v() * width; ++i) o[i] = 0;
    }
  }

  KeyRange item_keys() const {
    KeyRange keys{std::numeric_limits<int64_t>::max(), 0};
    for (int64_t slot = 0; slot < item_.row_end - item_.row_begin; ++slot) {
      if (w_.first[slot] >= w_.last[slot]) continue;
      keys.begin = std::min<int64_t>(keys.begin, w_.first[slot]);
      keys.end = std::max<int64_t>(keys.end, w_.last[slot]);
    }
    if (keys.empty()) keys = {0, 0};
    return keys;
  }

  void run_tile() {
    switch (p_.dtype_kv) {
      case Dtype::kF32:
        widen_tile<float>();
        break;
      case Dtype::kF16:
        widen_tile<Half>();
        break;
      case Dtype::kBf16:
        widen_tile<Bfloat16>();
        break;
    }
    for (int64_t panel = 0; panel < panels_; ++panel) {
      switch (panel_vectors(panel)) {
        case 1:
          run_panel<1>(panel);
          break;
        case 2:
          run_panel<2>(panel);
          break;
        default:
          run_panel<3>(panel);
          break;
      }
    }
  }

  template <typename T>
  void widen_tile() {
    const int64_t keys = tile_.size();
    const T* k = static_cast<const T*>(t_.k) + item_.batch_idx * p_.stride_k[0] +
                 item_.head_kv * p_.stride_k[1] + tile_.begin * p_.stride_k[2];
    widen_rows(k, p_.stride_k[2], p_.stride_k[3], keys, p_.dim_qk, w_.k_columns, w_.k);
    // score_tile takes whole register tiles: rows past the last key are computed and ignored.
    for (int64_t i = keys * w_.k_columns; i < (keys + kTileRows) * w_.k_columns; ++i) w_.k[i] = 0;
    const T* v = static_cast<const T*>(t_.v) + item_.batch_idx * p_.stride_v[0] +
                 item_.head_kv * p_.stride_v[1] + tile_.begin * p_.stride_v[2];
    v_is_finite_ =
        widen_rows(v, p_.stride_v[2], p_.stride_v[3], keys, p_.dim_v, w_.v_columns, w_.v);
  }

  template <int kVectors>
  void run_panel(int64_t panel) {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
    const int64_t width = kVectors * lanes;
    const int64_t slot = panel * shape_.lanes;
    int64_t first_max = 0, last_min = tile_.end, first_min = tile_.end, last_max = 0;
    for (int64_t r = 0; r < panel_rows(panel); ++r) {
      const int64_t first = w_.first[slot + r], last = w_.last[slot + r];
      first_max = std::max(first_max, first);
      last_min = std::min(last_min, last);
      if (first >= last) continue;
      first_min = std::min(first_min, first);
      last_max = std::max(last_max, last);
    }
    // Only the keys that some row of this panel sees.
    const int64_t begin = std::max(tile_.begin, first_min) - tile_.begin;
    const int64_t end = std::min(tile_.end, last_max) - tile_.begin;
    if (begin >= end) return;
    const bool is_edge = first_max > tile_.begin + begin || last_min < tile_.begin + end;

    const float* k = w_.k + begin * w_.k_columns;
    const int64_t keys = end - begin;
    for (int64_t j = 0; j < keys; j += kTileRows) {
      score_tile<kVectors>(q_panel(panel), k + j * w_.k_columns, w_.k_columns, p_.dim_qk,
                           w_.s + j * width);
    }
    if (p_.softcap > 0) apply_softcap<kVectors>(keys);
    if (p_.mask != MaskKind::kNone) apply_array_mask<kVectors>(panel, begin, keys);
    if (is_edge) apply_key_range<kVectors>(slot, begin, keys);
    const bool has_masked = is_edge || p_.mask != MaskKind::kNone;
    if (has_masked && !v_is_finite_) {
      add_values_one_by_one<kVectors>(panel, begin, keys);
      return;
    }
    softmax<kVectors>(slot, keys);
    const float* v = w_.v + begin * w_.v_columns;
    float* o = o_panel(panel);
    for (int64_t d = 0; d < padded_dim_v(); d += kTileRows) {
      value_tile<kVectors>(w_.s, v + d, w_.v_columns, keys, w_.alpha, o + d * width);
    }
  }

  template <int kVectors>
  void apply_softcap(int64_t keys) {
    const F32 f32;
    const auto cap = hn::Set(f32, p_.softcap * 1.44269504f);
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
    for (int64_t i = 0; i < keys * kVectors; ++i) {
      float* s = w_.s + i * lanes;
      hn::Store(hn::Mul(cap, tanh_vector(hn::Load(f32, s))), f32, s);
    }
  }

  template <int kVectors>
  void apply_array_mask(int64_t panel, int64_t begin, int64_t keys) {
    const F32 f32;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
    const int64_t width = kVectors * lanes;
    const int64_t group = p_.group();
    for (int64_t r = 0; r < width; ++r) {
      const int64_t row = item_.row_begin + panel * shape_.lanes + r;
      if (row >= item_.row_end) {
        for (int64_t j = 0; j < keys; ++j) w_.bias[j * width + r] = 0;
        continue;
      }
      for (int64_t j = 0; j < keys; ++j) {
        w_.bias[j * width + r] =
            mask_bias(p_, t_.mask, item_.batch_idx, item_.head_kv * group + row % group,
                      row / group, tile_.begin + begin + j);
      }
    }
    const auto log2e = hn::Set(f32, 1.44269504f);
    const auto masked = hn::Set(f32, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < keys * kVectors; ++i) {
      float* s = w_.s + i * lanes;
      const auto bias = hn::Load(f32, w_.bias + i * lanes);
      const auto sum = hn::MulAdd(bias, log2e, hn::Load(f32, s));
      hn::Store(hn::IfThenElse(hn::Eq(bias, masked), masked, sum), f32, s);
    }
  }

  template <int kVectors>
  void apply_key_range(int64_t slot, int64_t begin, int64_t keys) {
    const F32 f32;
    const I32 i32;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
    const auto masked = hn::Set(f32, -std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < keys; ++j) {
      const auto key = hn::Set(i32, static_cast<int32_t>(tile_.begin + begin + j));
      for (int c = 0; c < kVectors; ++c) {
        const auto first = hn::Load(i32, w_.first + slot + c * lanes);
        const auto last = hn::Load(i32, w_.last + slot + c * lanes);
        float* s = w_.s + (j * kVectors + c) * lanes;
        const auto hidden = hn::Or(hn::Gt(first, key), hn::Not(hn::Lt(key, last)));
        hn::Store(hn::IfThenElse(hn::RebindMask(f32, hidden), masked, hn::Load(f32, s)), f32, s);
      }
    }
  }

  // Turns scores into weights, updates m and l, leaves the rescale factor of O in alpha.
  template <int kVectors>
  void softmax(int64_t slot, int64_t keys) {
    const F32 f32;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
    const auto minus_infinity = hn::Set(f32, -std::numeric_limits<float>::infinity());
    for (int c = 0; c < kVectors; ++c) {
      float* column = w_.s + c * lanes;
      const auto m_old = hn::Load(f32, w_.m + slot + c * lanes);
      auto m_even = m_old, m_odd = m_old;
      int64_t j = 0;
      for (; j + 2 <= keys; j += 2) {
        m_even = hn::Max(m_even, hn::Load(f32, column + j * kVectors * lanes));
        m_odd = hn::Max(m_odd, hn::Load(f32, column + (j + 1) * kVectors * lanes));
      }
      if (j < keys) m_even = hn::Max(m_even, hn::Load(f32, column + j * kVectors * lanes));
      const auto m_new = hn::Max(m_even, m_odd);
      // A row that has seen nothing yet subtracts 0: minus infinity less itself would be NaN.
      const auto shift = hn::IfThenZeroElse(hn::Eq(m_new, minus_infinity), m_new);
      const auto alpha = exp2_nonpositive(hn::Sub(m_old, shift));
      auto sum_even = hn::Zero(f32), sum_odd = hn::Zero(f32);
      for (j = 0; j + 2 <= keys; j += 2) {
        float* even = column + j * kVectors * lanes;
        float* odd = even + kVectors * lanes;
        const auto p_even = exp2_nonpositive(hn::Sub(hn::Load(f32, even), shift));
        const auto p_odd = exp2_nonpositive(hn::Sub(hn::Load(f32, odd), shift));
        sum_even = hn::Add(sum_even, p_even);
        sum_odd = hn::Add(sum_odd, p_odd);
        hn::Store(p_even, f32, even);
        hn::Store(p_odd, f32, odd);
      }
      if (j < keys) {
        float* even = column + j * kVectors * lanes;
        const auto p_even = exp2_nonpositive(hn::Sub(hn::Load(f32, even), shift));
        sum_even = hn::Add(sum_even, p_even);
        hn::Store(p_even, f32, even);
      }
      float* l = w_.l + slot + c * lanes;
      hn::Store(hn::MulAdd(hn::Load(f32, l), alpha, hn::Add(sum_even, sum_odd)), f32, l);
      hn::Store(m_new, f32, w_.m + slot + c * lanes);
      hn::Store(alpha, f32, w_.alpha + c * lanes);
    }
  }

  // The rare tile where V holds an infinity or NaN and some key is masked: a weight of zero would
  // not hide it, so masked keys are skipped one by one.
  template <int kVectors>
  void add_values_one_by_one(int64_t panel, int64_t begin, int64_t keys) {
    const int64_t width = kVectors * static_cast<int64_t>(hn::Lanes(F32()));
    const int64_t slot = panel * shape_.lanes;
    float* o = o_panel(panel);
    const auto is_masked = [&](int64_t j, int64_t r) {
      const int64_t key = tile_.begin + begin + j;
      return key < w_.first[slot + r] || key >= w_.last[slot + r] ||
             (p_.mask != MaskKind::kNone &&
              w_.bias[j * width + r] == -std::numeric_limits<float>::infinity());
    };
    softmax<kVectors>(slot, keys);
    for (int64_t r = 0; r < panel_rows(panel); ++r) {
      for (int64_t d = 0; d < p_.dim_v; ++d) o[d * width + r] *= w_.alpha[r];
      for (int64_t j = 0; j < keys; ++j) {
        if (is_masked(j, r)) continue;
        const float* v = w_.v + (begin + j) * w_.v_columns;
        for (int64_t d = 0; d < p_.dim_v; ++d) {
          o[d * width + r] = std::fma(w_.s[j * width + r], v[d], o[d * width + r]);
        }
      }
    }
  }

  void store() {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t width = panel_vectors(panel) * lanes;
      for (int64_t r = 0; r < panel_rows(panel); ++r) {
        const int64_t slot = panel * shape_.lanes + r;
        const RowId id{item_.batch_idx, item_.head_kv, item_.row_begin + slot};
        const float* o = o_panel(panel) + r;
        if (partials_.chunks == 1) {
          store_row(p_, t_, id, w_.m[slot], w_.l[slot], o, width);
          continue;
        }
        const int64_t row =
            (id.batch_idx * p_.heads_kv + id.head_kv) * shape_.rows_per_head + id.row;
        const int64_t i = item_.chunk * partials_.rows + row;
        partials_.m[i] = w_.m[slot];
        partials_.l[i] = w_.l[slot];
        for (int64_t d = 0; d < p_.dim_v; ++d) partials_.o[i * p_.dim_v + d] = o[d * width];
      }
    }
  }

  const Problem& p_;
  const Tensors& t_;
  const PrefillShape& shape_;
  const PrefillScratch& w_;
  const Partials& partials_;
  Item item_{};
  int64_t panels_ = 0;
  KeyRange tile_{};
  bool v_is_finite_ = true;
};

void run_worker(const Problem& p, const Tensors& t, const PrefillShape& shape,
                const PrefillScratch& scratch, const Partials& partials, std::atomic<int64_t>& next,
                Progress& progress) {
  PrefillWorker worker(p, t, shape, scratch, partials);
  for (int64_t i = next++; i < shape.items && !progress.is_cancelled(); i = next++) {
    // Last query tiles first: with causal they see the most keys, and the longest work should not
    // start last. Heads vary fastest so that neighbours differ in memory, not in length.
    const int64_t heads = p.batch * p.heads_kv;
    const int64_t head = i % heads;
    const int64_t chunk = i / heads % shape.chunks;
    const int64_t q_tile = shape.q_tiles - 1 - i / heads / shape.chunks;
    Item item;
    item.batch_idx = head / p.heads_kv;
    item.head_kv = head % p.heads_kv;
    item.row_begin = q_tile * shape.tile_q;
    item.row_end = std::min(item.row_begin + shape.tile_q, shape.rows_per_head);
    item.keys = {chunk * shape.chunk_keys, std::min(p.len_k, (chunk + 1) * shape.chunk_keys)};
    item.chunk = chunk;
    worker.run(item);
    progress.step_done();
  }
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(run_worker);

namespace {

constexpr int64_t kRowsPerMerge = 64;

// Where the pieces of a workspace lie: partial rows first, then one scratch for each worker.
struct PrefillWorkspace {
  PrefillWorkspace(const Problem& p, const Config& config, void* base)
      : shape(p, config, simd_floats()), base_(static_cast<std::byte*>(base)) {
    Carver carver(base);
    partials.chunks = shape.chunks;
    if (shape.chunks > 1) {
      partials.rows = p.batch * p.heads_kv * shape.rows_per_head;
      partials.dim_v = p.dim_v;
      partials.carve(carver);
    }
    partials_bytes_ = carver.used_bytes();
    Carver measure(nullptr);
    PrefillScratch(measure, p, shape);
    worker_bytes_ = measure.used_bytes();
  }

  PrefillScratch scratch(const Problem& p, int32_t worker) const {
    Carver carver(base_ + partials_bytes_ + worker_bytes_ * static_cast<size_t>(worker));
    return PrefillScratch(carver, p, shape);
  }
  size_t bytes(int32_t workers) const {
    return partials_bytes_ + worker_bytes_ * static_cast<size_t>(workers);
  }

  PrefillShape shape;
  Partials partials;

 private:
  std::byte* base_;
  size_t partials_bytes_ = 0;
  size_t worker_bytes_ = 0;
};

}  // namespace

size_t prefill_workspace_bytes(const Problem& p, const Config& config) {
  return PrefillWorkspace(p, config, nullptr).bytes(config.threads);
}

Status run_prefill(const Launch& launch) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  const PrefillWorkspace workspace(p, launch.config, t.workspace);
  Progress& progress = launch.progress;
  progress.start(workspace.shape.items);
  std::atomic<int64_t> next{0};
  parallel(launch.executor, launch.config.threads, [&](int32_t i) {
    HWY_DYNAMIC_DISPATCH(run_worker)
    (p, t, workspace.shape, workspace.scratch(p, i), workspace.partials, next, progress);
  });
  if (workspace.partials.chunks == 1) return progress.status("partly written");
  if (progress.is_cancelled()) return progress.status("untouched");
  std::atomic<int64_t> next_row{0};
  parallel(launch.executor, launch.config.threads, [&](int32_t i) {
    float* row_scratch = workspace.scratch(p, i).o;
    for (int64_t row = next_row.fetch_add(kRowsPerMerge); row < workspace.partials.rows;
         row = next_row.fetch_add(kRowsPerMerge)) {
      merge_rows(p, t, workspace.partials, row,
                 std::min(row + kRowsPerMerge, workspace.partials.rows), row_scratch);
    }
  });
  return {};
}

}  // namespace wh::cpu
#endif
