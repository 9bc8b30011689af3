// What both prefill kernels do with an item: load queries, walk over tiles of keys, softcap, masks,
// online softmax, store. The products of a tile, and how their operands lie, are the kernel's own:
// it hands in a class with
//
//   void load_query(const void* row, float* to)          one query as dwords, contiguous
//   bool load_tile(sequence, key_rows, head_kv, tile)    false: V holds infinities or NaN, and the
//                                                        products read 0 in their place
//   void scores<kVectors>(q_panel, key, keys, s)         base 2, of keys [key, key + keys)
//   Vec  keep<kVectors>(even, odd, row, vector)          stores weights of two keys; returns what
//                                                        they add to the row's sum
//   void values<kVectors>(key, keys, o)                  `key` is even
//   float weight(row, lane, width)                       one, for the rare path
#if defined(WH_CPU_PREFILL_WORKER_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef WH_CPU_PREFILL_WORKER_INL_H_
#undef WH_CPU_PREFILL_WORKER_INL_H_
#else
#define WH_CPU_PREFILL_WORKER_INL_H_
#endif

#include <hwy/highway.h>

#include <atomic>
#include <cmath>
#include <limits>

#include "core/array_mask.h"
#include "core/element.h"
#include "core/key_rows.h"
#include "core/kv_tensor.h"
#include "core/rounding.h"
#include "cpu/common/steps.h"
#include "cpu/common/tile-inl.h"
#include "cpu/common/vector_math-inl.h"
#include "cpu/prefill/layout.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <typename Products>
class PrefillWorker {
 public:
  PrefillWorker(const Problem& p, const Tensors& t, const PrefillShape& shape,
                const PrefillScratch& scratch, const Partials& partials, Progress& progress)
      : p_(p),
        t_(t),
        shape_(shape),
        w_(scratch),
        partials_(partials),
        products_(p, t, scratch),
        steps_(progress) {}

  // False: the caller wants to stop, and the item has left nothing behind.
  bool run(const PrefillItem& planned) {
    sequence_ = sequence_at(p_, t_, planned.batch_idx);
    item_ = item_of(p_, sequence_, planned);
    rows_ = item_.rows();
    if (rows_ == 0) return true;
    key_rows_ = key_rows(p_, t_, sequence_);
    panels_ = divide_up(rows_, shape_.lanes);
    const KeyRange keys = keys_of_item(p_, sequence_, item_);
    load_ranges();
    load_queries();
    // Tiles sit at multiples of tile_k, so a row meets the same tiles whatever item it is in.
    for (int64_t k0 = keys.begin / shape_.tile_k * shape_.tile_k; k0 < keys.end;
         k0 += shape_.tile_k) {
      tile_ = {std::max(k0, keys.begin), std::min(k0 + shape_.tile_k, keys.end)};
      v_is_finite_ = products_.load_tile(sequence_, key_rows_, item_.head_kv, tile_);
      for (int64_t panel = 0; panel < panels_; ++panel) {
        with_vectors(panel_vectors(panel),
                     [&](auto vectors) HWY_ATTR { run_panel<vectors()>(panel); });
      }
      if (!steps_.done(tile_work(p_, rows_, tile_))) return false;
    }
    if (!steps_.look()) return false;
    store();
    return steps_.done(store_work(p_, rows_));
  }

 private:
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

  static int64_t vector_lanes() { return static_cast<int64_t>(hn::Lanes(F32())); }
  // Panels are full but for the last, which takes as few vectors as hold its rows.
  int64_t panel_rows(int64_t panel) const {
    return std::min(shape_.lanes, rows_ - panel * shape_.lanes);
  }
  int64_t panel_vectors(int64_t panel) const {
    return divide_up(panel_rows(panel), vector_lanes());
  }
  int64_t padded_dim_v() const { return round_up(p_.dim_v, 8); }
  float* q_panel(int64_t panel) const { return w_.q + panel * w_.q_rows * shape_.lanes; }
  float* o_panel(int64_t panel) const { return w_.o + panel * padded_dim_v() * shape_.lanes; }
  int64_t query_of(int64_t slot) const { return (item_.row_begin + slot) / p_.group(); }
  int64_t head_of(int64_t slot) const {
    return item_.head_kv * p_.group() + (item_.row_begin + slot) % p_.group();
  }

  // Each row's visible keys within the chunk; an empty lane sees nothing. One store an element: GCC
  // 12 moved a first store of zeros behind the second one (loop distribution, at -O3 with AVX-512
  // and on 64-bit ARM), and every row came out as 0.
  void load_ranges() {
    for (int64_t slot = 0; slot < panels_ * shape_.lanes; ++slot) {
      const KeyRange visible =
          slot < rows_ ? visible_keys(p_, sequence_, query_of(slot)) : KeyRange{0, 0};
      const int64_t end = std::max<int64_t>(std::min(visible.end, item_.keys.end), 0);
      const int64_t begin = std::min(std::max(visible.begin, item_.keys.begin), end);
      w_.m[slot] = kMinusInfinity;
      w_.l[slot] = 0;
      w_.first[slot] = static_cast<int32_t>(begin);
      w_.last[slot] = static_cast<int32_t>(end);
    }
  }

  void load_queries() {
    const auto bytes = static_cast<int64_t>(dtype_bytes(p_.dtype_q));
    const auto* q =
        static_cast<const std::byte*>(t_.q) +
        (sequence_.query_batch * p_.stride_q[0] + sequence_.first_query * p_.stride_q[2]) * bytes;
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t width = panel_vectors(panel) * vector_lanes();
      for (int64_t lane = 0; lane < width; lane += 4) {
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t slot = panel * shape_.lanes + lane + i;
          float* staged = w_.staged + i * w_.staged_columns;
          if (slot < rows_) {
            const int64_t offset = head_of(slot) * p_.stride_q[1] + query_of(slot) * p_.stride_q[2];
            products_.load_query(q + offset * bytes, staged);
          } else {
            std::fill_n(staged, w_.q_rows, 0.0f);
          }
        }
        transpose_into_lanes(w_.staged, w_.staged_columns, w_.q_rows, q_panel(panel) + lane, width);
      }
      std::fill_n(o_panel(panel), padded_dim_v() * width, 0.0f);
    }
  }

  // The keys of the tile that rows of a panel see.
  struct PanelKeys {
    int64_t begin, end;                // that some row sees; begin is even
    int64_t common_begin, common_end;  // that every row sees
  };

  PanelKeys panel_keys(int64_t panel) const {
    const int64_t slot = panel * shape_.lanes;
    PanelKeys keys{tile_.end, 0, 0, tile_.end};
    for (int64_t i = slot; i < slot + panel_rows(panel); ++i) {
      keys.common_begin = std::max<int64_t>(keys.common_begin, w_.first[i]);
      keys.common_end = std::min<int64_t>(keys.common_end, w_.last[i]);
      if (w_.first[i] >= w_.last[i]) continue;
      keys.begin = std::min<int64_t>(keys.begin, w_.first[i]);
      keys.end = std::max<int64_t>(keys.end, w_.last[i]);
    }
    keys.begin = std::max(tile_.begin, keys.begin);
    keys.end = std::min(tile_.end, keys.end);
    // Sums run over pairs of keys. Pairs start at even keys wherever the range starts, so that a
    // row's bits do not depend on the rows that share its panel.
    if (keys.begin % 2 != 0) keys.common_begin = std::max(keys.common_begin, keys.begin--);
    return keys;
  }

  template <int kVectors>
  void run_panel(int64_t panel) {
    const int64_t width = kVectors * vector_lanes();
    const PanelKeys range = panel_keys(panel);
    if (range.begin >= range.end) return;
    const int64_t keys = range.end - range.begin;
    const int64_t absent = range.begin < tile_.begin ? 1 : 0;  // the first half of a pair
    if (p_.mask != MaskKind::kNone) prefetch_mask(panel, range.begin, keys);
    products_.template scores<kVectors>(q_panel(panel), range.begin + absent, keys - absent,
                                        w_.s + absent * width);
    if (p_.softcap > 0) apply_softcap<kVectors>(keys);
    if (p_.mask != MaskKind::kNone) apply_array_mask<kVectors>(panel, range.begin, keys);
    const bool is_edge = range.common_begin > range.begin || range.common_end < range.end;
    if (is_edge) apply_key_range<kVectors>(panel, range);
    if (keys % 2 != 0) std::fill_n(w_.s + keys * width, width, kMinusInfinity);
    softmax<kVectors>(panel * shape_.lanes, keys);
    products_.template values<kVectors>(range.begin, keys, o_panel(panel));
    if (!v_is_finite_) add_special_values<kVectors>(panel, range.begin, keys);
  }

  template <int kVectors>
  void apply_softcap(int64_t keys) {
    const F32 f32;
    const auto cap = hn::Set(f32, p_.softcap * kLog2E);
    for (float* s = w_.s; s < w_.s + keys * kVectors * vector_lanes(); s += vector_lanes()) {
      hn::Store(hn::Mul(cap, tanh_vector(hn::Load(f32, s))), f32, s);
    }
  }

  // Mask rows lie pages apart: without this each of them costs a miss, 15 % of the time at dim 64.
  void prefetch_mask(int64_t panel, int64_t begin, int64_t keys) const {
    if (p_.stride_mask[3] != 1) return;
    const int64_t element = mask_element_bytes(p_);
    for (int64_t r = 0; r < panel_rows(panel); ++r) {
      const int64_t slot = panel * shape_.lanes + r;
      if (r > 0 && p_.stride_mask[1] == 0 && query_of(slot) == query_of(slot - 1)) continue;
      const char* row = static_cast<const char*>(t_.mask) +
                        (item_.batch_idx * p_.stride_mask[0] + head_of(slot) * p_.stride_mask[1] +
                         query_of(slot) * p_.stride_mask[2] + begin) *
                            element;
      for (int64_t b = 0; b < keys * element; b += 64) __builtin_prefetch(row + b);
    }
  }

  template <int kVectors>
  void apply_array_mask(int64_t panel, int64_t begin, int64_t keys) {
    const int64_t width = kVectors * vector_lanes();
    const auto stage = [&](int64_t slot, float* staged) {
      if (slot >= rows_) {
        std::fill_n(staged, keys, 0.0f);
      } else {
        load_mask_row(p_, t_.mask, item_.batch_idx, head_of(slot), query_of(slot), begin, keys,
                      staged);
      }
    };
    for (int64_t lane = 0; lane < width; lane += 4) {
      const int64_t slot = panel * shape_.lanes + lane;
      if (p_.stride_mask[1] == 0 && query_of(slot) == query_of(slot + 3)) {
        // Four heads of a group share the mask's row.
        stage(slot, w_.staged);
        broadcast_into_lanes(w_.staged, keys, w_.bias + lane, width);
        continue;
      }
      for (int64_t i = 0; i < 4; ++i) stage(slot + i, w_.staged + i * w_.staged_columns);
      transpose_into_lanes(w_.staged, w_.staged_columns, keys, w_.bias + lane, width);
    }
    // A bias of minus infinity hides the key whatever its score is.
    const F32 f32;
    const auto masked = hn::Set(f32, kMinusInfinity);
    for (int64_t i = 0; i < keys * width; i += vector_lanes()) {
      const auto bias = hn::Load(f32, w_.bias + i);
      const auto sum = hn::Add(hn::Load(f32, w_.s + i), bias);
      hn::Store(hn::IfThenElse(hn::Eq(bias, masked), masked, sum), f32, w_.s + i);
    }
  }

  // Hides keys outside each row's range, touching only keys that some row does not see.
  template <int kVectors>
  void apply_key_range(int64_t panel, const PanelKeys& range) {
    const F32 f32;
    const I32 i32;
    const auto masked = hn::Set(f32, kMinusInfinity);
    const int64_t slot = panel * shape_.lanes;
    const auto hide = [&](int64_t begin, int64_t end) {
      for (int64_t key = begin; key < end; ++key) {
        const auto key_vector = hn::Set(i32, static_cast<int32_t>(key));
        float* s = w_.s + (key - range.begin) * kVectors * vector_lanes();
        for (int64_t c = 0; c < kVectors; ++c, s += vector_lanes()) {
          const auto first = hn::Load(i32, w_.first + slot + c * vector_lanes());
          const auto last = hn::Load(i32, w_.last + slot + c * vector_lanes());
          const auto is_before = hn::RebindMask(f32, hn::Gt(first, key_vector));
          const auto is_visible = hn::RebindMask(f32, hn::Gt(last, key_vector));
          const auto score = hn::IfThenElse(is_visible, hn::Load(f32, s), masked);
          hn::Store(hn::IfThenElse(is_before, masked, score), f32, s);
        }
      }
    };
    const int64_t head_end = std::min(range.common_begin, range.end);
    hide(range.begin, head_end);
    hide(std::max({range.common_end, head_end, range.begin}), range.end);
  }

  // Turns scores into weights, updates m and l, leaves the rescale factor of O in alpha.
  template <int kVectors>
  void softmax(int64_t slot, int64_t keys) {
    const F32 f32;
    const ptrdiff_t lanes = vector_lanes(), width = kVectors * lanes;
    for (int c = 0; c < kVectors; ++c) {
      const float* column = w_.s + c * lanes;
      const auto m_old = hn::Load(f32, w_.m + slot + c * lanes);
      auto m_even = m_old, m_odd = m_old;
      for (int64_t j = 0; j < keys; j += 2) {
        m_even = hn::Max(m_even, hn::Load(f32, column + j * width));
        m_odd = hn::Max(m_odd, hn::Load(f32, column + (j + 1) * width));
      }
      const auto m_new = hn::Max(m_even, m_odd);
      // A row that has seen nothing yet subtracts 0: minus infinity less itself would be NaN.
      const auto shift = hn::IfThenZeroElse(hn::Eq(m_new, hn::Set(f32, kMinusInfinity)), m_new);
      const auto alpha = exp2_nonpositive(hn::Sub(m_old, shift));
      auto sum = hn::Zero(f32);
      for (int64_t j = 0; j < keys; j += 2) {
        const auto even = exp2_nonpositive(hn::Sub(hn::Load(f32, column + j * width), shift));
        const auto odd = exp2_nonpositive(hn::Sub(hn::Load(f32, column + (j + 1) * width), shift));
        sum = hn::Add(sum, products_.template keep<kVectors>(even, odd, j, c));
      }
      float* l = w_.l + slot + c * lanes;
      hn::Store(hn::MulAdd(hn::Load(f32, l), alpha, sum), f32, l);
      hn::Store(m_new, f32, w_.m + slot + c * lanes);
      hn::Store(alpha, f32, w_.alpha + c * lanes);
    }
  }

  // The rare tile where V holds infinities or NaN: a weight of zero would not hide them, so the
  // products have read 0 there, and the rows that see such a key get it here. What the products sum
  // is the same in every tile and panel: taking another way for all keys would let a row's bits
  // depend on the keys and rows around it, which follow the number of threads.
  template <int kVectors>
  void add_special_values(int64_t panel, int64_t begin, int64_t keys) {
    const int64_t width = kVectors * vector_lanes();
    const KvTensor v = values_of(p_, t_);
    for (int64_t key = std::max(begin, tile_.begin); key < begin + keys; ++key) {
      const KvPlace place = place_of(key_rows_, sequence_, item_.head_kv, key);
      for (int64_t d = 0; d < p_.dim_v; ++d) {
        const float value = v.element(place, d);
        if (std::isfinite(value)) continue;
        for (int64_t r = 0; r < panel_rows(panel); ++r) {
          if (!sees(panel * shape_.lanes + r, key)) continue;
          o_panel(panel)[d * width + r] += products_.weight(key - begin, r, width) * value;
        }
      }
    }
  }

  bool sees(int64_t slot, int64_t key) const {
    return w_.first[slot] <= key && key < w_.last[slot] &&
           mask_bias(p_, t_.mask, item_.batch_idx, head_of(slot), query_of(slot), key) !=
               kMinusInfinity;
  }

  void store() {
    if (partials_.chunks == 1) steps_.writing_out();
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t width = panel_vectors(panel) * vector_lanes();
      for (int64_t lane = 0; lane < panel_rows(panel); lane += 4) {
        transpose_from_lanes(o_panel(panel) + lane, width, p_.dim_v, w_.staged, w_.staged_columns);
        for (int64_t i = 0; i < std::min<int64_t>(4, panel_rows(panel) - lane); ++i) {
          store_staged(panel * shape_.lanes + lane + i, w_.staged + i * w_.staged_columns);
        }
      }
    }
  }

  void store_staged(int64_t slot, const float* o) {
    const RowId id{sequence_, item_.head_kv, item_.row_begin + slot};
    if (partials_.chunks == 1) return store_row(p_, t_, id, w_.m[slot], w_.l[slot], o);
    const int64_t row =
        (item_.batch_idx * p_.heads_kv + id.head_kv) * shape_.rows_per_head + id.row;
    const int64_t i = item_.chunk * partials_.rows + row;
    partials_.m[i] = w_.m[slot];
    partials_.l[i] = w_.l[slot];
    std::copy_n(o, p_.dim_v, partials_.o + i * p_.dim_v);
  }

  const Problem& p_;
  const Tensors& t_;
  const PrefillShape& shape_;
  const PrefillScratch& w_;
  const Partials& partials_;
  Products products_;
  Steps steps_;
  Sequence sequence_{};
  KeyRows key_rows_{};
  PrefillItem item_{};
  int64_t rows_ = 0, panels_ = 0;
  KeyRange tile_{};
  bool v_is_finite_ = true;
};

// Takes items from the counter until there are none.
template <typename Products>
void run_prefill_worker(const Problem& p, const Tensors& t, const PrefillWorkspace& workspace,
                        int32_t worker_idx, std::atomic<int64_t>& next, Progress& progress) {
  const PrefillShape& shape = workspace.shape;
  const PrefillScratch scratch = workspace.scratch(worker_idx);
  PrefillWorker<Products> worker(p, t, shape, scratch, workspace.partials, progress);
  for (int64_t i = next++; i < shape.items && !progress.is_cancelled(); i = next++) {
    // Last query tiles first: with causal they see the most keys, and the longest work should not
    // start last. Heads vary fastest so that neighbours differ in memory, not in length.
    const int64_t heads = p.batch * p.heads_kv;
    const int64_t head = i % heads;
    const int64_t q_tile = shape.q_tiles - 1 - i / heads / shape.chunks;
    if (!worker.run(
            shape.item(head / p.heads_kv, head % p.heads_kv, q_tile, i / heads % shape.chunks))) {
      return;
    }
  }
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
