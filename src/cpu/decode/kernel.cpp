// cpu_decode: few query rows against a kv head.
//
// Schedule: an item is every row (query, head of the group) of one (batch, kv head) pair and one
// chunk of its keys, in tiles of 48. Rows go in blocks of 8, 4, 2 and 1, so that a converted vector
// of K or V serves the whole block. Scores: head dimension on SIMD lanes, 16 sums of (key, row)
// reduced by one transposing tree. A block's scores lie as [key][row], so that softmax has a row in
// every lane and needs no horizontal step but one fold of the maximum a tile. While scores run, V
// of the same keys is prefetched; while values run, K of the next tile: 70 % slower without.
//
// Roofline: K and V stream from memory once; 2 * rows flops an element of them. Up to 4 rows the
// memory bounds it, from about 8 rows in f16 the multiply-adds do.
#include "cpu/decode/kernel.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/array_mask.h"
#include "core/element.h"
#include "core/key_rows.h"
#include "core/kv_tensor.h"
#include "core/rounding.h"
#include "core/score_rules.h"
#include "cpu/common/steps.h"
#include "cpu/decode/config.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode/kernel.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/common/tile-inl.h"
#include "cpu/common/vector_math-inl.h"
#include "cpu/decode/block-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <int kRows>
using Rows = std::integral_constant<int, kRows>;

class DecodeWorker {
 public:
  DecodeWorker(const Problem& p, const Tensors& t, const DecodeShape& shape,
               const DecodeScratch& scratch, const Partials& partials, Steps& steps)
      : p_(p),
        t_(t),
        k_(keys_of(p, t)),
        v_(values_of(p, t)),
        shape_(shape),
        w_(scratch),
        partials_(partials),
        steps_(steps) {}

  // False: the caller wants to stop, and the item has left nothing behind.
  bool run(int64_t batch_idx, int64_t head_kv, int64_t chunk) {
    batch_idx_ = batch_idx;
    head_kv_ = head_kv;
    sequence_ = sequence_at(p_, t_, batch_idx);
    rows_ = sequence_.len_q * p_.group();
    if (rows_ == 0) return true;
    key_rows_ = key_rows(p_, t_, sequence_);
    const KeyRange keys = keys_of_chunk(p_, sequence_, shape_, chunk);
    load_rows(chunk);
    if (!run_tiles(keys) || !steps_.look()) return false;
    store(chunk);
    return steps_.done(store_work(p_, rows_));
  }

 private:
  static constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

  static int64_t vector_lanes() { return static_cast<int64_t>(hn::Lanes(F32())); }
  int64_t head_of(int64_t row) const { return head_kv_ * p_.group() + row % p_.group(); }

  // Calls body(Rows<n>(), first row) for blocks of rows, largest first.
  template <typename Body>
  void for_blocks(const Body& body) const {
    int64_t row = 0;
    for (; row + kRowBlock <= rows_; row += kRowBlock) body(Rows<kRowBlock>(), row);
    if (kRowBlock > 4 && row + 4 <= rows_) {
      body(Rows<4>(), row);
      row += 4;
    }
    if (row + 2 <= rows_) {
      body(Rows<2>(), row);
      row += 2;
    }
    if (row < rows_) body(Rows<1>(), row);
  }
  // A block's running values have a vector each, lane i holding row i % kRows.
  float* block_m(int64_t row) const { return w_.m + row * kLaneStride; }
  float* block_l(int64_t row) const { return w_.l + row * kLaneStride; }
  float* block_s(int64_t row) const { return w_.s + row * shape_.tile_k; }

  // Each row's query, and its visible keys within the chunk.
  void load_rows(int64_t chunk_idx) {
    const KeyRange chunk = chunk_range(p_, sequence_, shape_, chunk_idx);
    const float scale = scale_to_base_2(p_);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t query = row / p_.group();
      const KeyRange visible = visible_keys(p_, sequence_, query);
      const int64_t last = std::clamp<int64_t>(visible.end, 0, chunk.end);
      const int64_t first = std::clamp<int64_t>(visible.begin, std::min(chunk.begin, last), last);
      w_.first[row] = static_cast<int32_t>(first);
      w_.last[row] = static_cast<int32_t>(last);
      const int64_t offset = sequence_.query_batch * p_.stride_q[0] +
                             head_of(row) * p_.stride_q[1] +
                             (sequence_.first_query + query) * p_.stride_q[2];
      float* q = w_.q + row * shape_.columns_qk;
      widen_row(t_.q, p_.dtype_q, offset, p_.stride_q[3], p_.dim_qk, q);
      for (int64_t d = 0; d < p_.dim_qk; ++d) q[d] *= scale;
      std::fill(q + p_.dim_qk, q + shape_.columns_qk, 0.0f);
    }
    std::fill_n(w_.m, rows_ * kLaneStride, kMinusInfinity);
    std::fill_n(w_.l, rows_ * kLaneStride, 0.0f);
    std::fill_n(w_.o, rows_ * shape_.columns_v, 0.0f);
  }

  // Of the tile that begins there. Those of pages sit at multiples of tile_k, as pages do.
  int64_t tile_end(int64_t begin, int64_t keys_end) const {
    const int64_t first =
        p_.key_layout == KeyLayout::kPaged ? begin / shape_.tile_k * shape_.tile_k : begin;
    return std::min(first + shape_.tile_k, keys_end);
  }

  bool run_tiles(KeyRange keys) {
    const bool k_in_place = is_whole_vectors(k_), v_in_place = is_whole_vectors(v_);
    const Prefetch nothing{};
    for (int64_t k0 = keys.begin; k0 < keys.end; k0 = tile_.end) {
      tile_ = {k0, tile_end(k0, keys.end)};
      const int64_t count = tile_.size();
      const bool is_one_run = key_rows_.run(k0, tile_.end) == count;
      const bool reads_k = k_in_place && is_one_run, reads_v = v_in_place && is_one_run;
      const KvPlace first = place_of(key_rows_, sequence_, head_kv_, k0);
      const Prefetch ahead_v = reads_v ? Prefetch::of(v_, first, count) : nothing;
      if (reads_k) {
        with_rows(k_, first, [&](const auto& k) HWY_ATTR { scores(k, p_.dim_qk, ahead_v); });
      } else {
        widen_keys(k_, {key_rows_, sequence_, head_kv_, tile_}, shape_.columns_qk, w_.k);
        scores(Matrix<float>{w_.k, shape_.columns_qk}, shape_.columns_qk, ahead_v);
      }
      const Prefetch ahead_k = k_in_place ? keys_ahead(keys.end) : nothing;
      const bool is_edge = !all_rows_see_tile();
      for_blocks([&](auto rows, int64_t row) HWY_ATTR { softmax<rows()>(row, is_edge); });
      const bool has_hidden = is_edge || p_.mask != MaskKind::kNone;
      if (reads_v && (!has_hidden || is_finite(v_, first, count))) {
        with_rows(v_, first, [&](const auto& v) HWY_ATTR { values(v, p_.dim_v, ahead_k); });
      } else if (widen_keys(v_, {key_rows_, sequence_, head_kv_, tile_}, shape_.columns_v, w_.v) ||
                 !has_hidden) {
        values(Matrix<float>{w_.v, shape_.columns_v}, shape_.columns_v, ahead_k);
      } else {
        add_values_one_by_one();
      }
      if (!steps_.done(tile_work(p_, rows_, tile_))) return false;
    }
    return true;
  }

  // The next tile's, as far as they follow each other.
  Prefetch keys_ahead(int64_t keys_end) const {
    const int64_t begin = tile_.end;
    if (begin >= keys_end) return {};
    const int64_t run = key_rows_.run(begin, tile_end(begin, keys_end));
    return Prefetch::of(k_, place_of(key_rows_, sequence_, head_kv_, begin), run);
  }

  static bool is_finite(const KvTensor& tensor, const KvPlace& first, int64_t count) {
    bool finite = false;
    with_rows(tensor, first,
              [&](const auto& rows) HWY_ATTR { finite = all_finite(rows, count, tensor.dim); });
    return finite;
  }

  bool all_rows_see_tile() const {
    for (int64_t row = 0; row < rows_; ++row) {
      if (w_.first[row] > tile_.begin || w_.last[row] < tile_.end) return false;
    }
    return true;
  }

  template <typename Keys>
  void scores(Keys k, int64_t columns, Prefetch ahead) {
    for_blocks([&](auto rows, int64_t row) HWY_ATTR {
      const Matrix<float> q{w_.q + row * shape_.columns_qk, shape_.columns_qk};
      score_rows<rows()>(q, columns, k, tile_.size(), ahead, block_s(row));
      ahead.rows = 0;  // the first block has fetched it all
    });
  }

  // Softcap, masks, and the online softmax of a block; leaves weights in s.
  template <int kRows>
  void softmax(int64_t row, bool is_edge) {
    const F32 f32;
    const int64_t lanes = vector_lanes();
    float* s = block_s(row);
    const int64_t count = tile_.size() * kRows;
    const int64_t padded = round_up(count, lanes);
    if (p_.softcap > 0) {
      const auto cap = hn::Set(f32, p_.softcap * kLog2E);
      std::fill(s + count, s + padded, 0.0f);
      for (int64_t i = 0; i < padded; i += lanes) {
        hn::Store(hn::Mul(cap, tanh_vector(hn::Load(f32, s + i))), f32, s + i);
      }
    }
    if (p_.mask != MaskKind::kNone) add_mask<kRows>(row, s);
    if (is_edge) hide_keys<kRows>(row, s);
    std::fill(s + count, s + padded, kMinusInfinity);

    const auto m_old = hn::Load(f32, block_m(row));
    auto m = m_old;
    for (int64_t i = 0; i < padded; i += lanes) m = hn::Max(m, hn::Load(f32, s + i));
    m = fold_max<kRows>(m);
    const auto shift = hn::IfThenZeroElse(hn::Eq(m, hn::Set(f32, kMinusInfinity)), m);
    auto sum = hn::Zero(f32);
    for (int64_t i = 0; i < padded; i += lanes) {
      const auto weight = exp2_nonpositive(hn::Sub(hn::Load(f32, s + i), shift));
      sum = hn::Add(sum, weight);
      hn::Store(weight, f32, s + i);
    }
    const auto alpha = exp2_nonpositive(hn::Sub(m_old, shift));
    hn::Store(alpha, f32, w_.alpha + row * kLaneStride);
    hn::Store(hn::MulAdd(hn::Load(f32, block_l(row)), alpha, sum), f32, block_l(row));
    hn::Store(m, f32, block_m(row));
  }

  template <int kRows>
  void add_mask(int64_t row, float* s) {
    for (int64_t r = 0; r < kRows; ++r) {
      load_mask_row(p_, t_.mask, batch_idx_, head_of(row + r), (row + r) / p_.group(), tile_.begin,
                    tile_.size(), w_.bias);
      for (int64_t j = 0; j < tile_.size(); ++j) {
        float& score = s[j * kRows + r];
        score = w_.bias[j] == kMinusInfinity ? kMinusInfinity : score + w_.bias[j];
      }
    }
  }

  template <int kRows>
  void hide_keys(int64_t row, float* s) const {
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t first = std::min<int64_t>(w_.first[row + r], tile_.end) - tile_.begin;
      const int64_t last = std::max<int64_t>(w_.last[row + r], tile_.begin) - tile_.begin;
      for (int64_t j = 0; j < first; ++j) s[j * kRows + r] = kMinusInfinity;
      for (int64_t j = last; j < tile_.size(); ++j) s[j * kRows + r] = kMinusInfinity;
    }
  }

  template <typename Values>
  void values(Values v, int64_t columns, Prefetch ahead) {
    for_blocks([&](auto rows, int64_t row) HWY_ATTR {
      value_rows<rows()>(block_s(row), v, tile_.size(), columns, w_.alpha + row * kLaneStride,
                         ahead, w_.o + row * shape_.columns_v, shape_.columns_v);
      ahead.rows = 0;
    });
  }

  // V holds an infinity or NaN and some key is hidden: a weight of zero would not hide it.
  void add_values_one_by_one() {
    for_blocks([&](auto rows, int64_t block) HWY_ATTR {
      for (int64_t r = 0; r < rows(); ++r) {
        const int64_t row = block + r;
        float* o = w_.o + row * shape_.columns_v;
        for (int64_t d = 0; d < p_.dim_v; ++d) o[d] *= w_.alpha[block * kLaneStride + r];
        for (int64_t key = std::max<int64_t>(tile_.begin, w_.first[row]);
             key < std::min<int64_t>(tile_.end, w_.last[row]); ++key) {
          if (mask_bias(p_, t_.mask, batch_idx_, head_of(row), row / p_.group(), key) ==
              kMinusInfinity) {
            continue;
          }
          const int64_t j = key - tile_.begin;
          const float weight = block_s(block)[j * rows() + r];
          const float* v = w_.v + j * shape_.columns_v;
          for (int64_t d = 0; d < p_.dim_v; ++d) o[d] = std::fma(weight, v[d], o[d]);
        }
      }
    });
  }

  void store(int64_t chunk) {
    if (partials_.chunks == 1) steps_.writing_out();
    for_blocks([&](auto rows, int64_t block) HWY_ATTR {
      const auto sum = fold_sum<rows()>(hn::Load(F32(), block_l(block)));
      hn::Store(sum, F32(), block_l(block));
      for (int64_t r = 0; r < rows(); ++r)
        store_one(chunk, block + r, block_m(block)[r], block_l(block)[r]);
    });
  }

  void store_one(int64_t chunk, int64_t row, float m, float l) const {
    const float* o = w_.o + row * shape_.columns_v;
    if (partials_.chunks == 1) return store_row(p_, t_, {sequence_, head_kv_, row}, m, l, o);
    const int64_t i =
        chunk * partials_.rows + (batch_idx_ * p_.heads_kv + head_kv_) * shape_.rows + row;
    partials_.m[i] = m;
    partials_.l[i] = l;
    if (!is_empty_row(l))
      std::copy_n(o, p_.dim_v, partials_.o + i * p_.dim_v);  // else the merge skips it
  }

  const Problem& p_;
  const Tensors& t_;
  const KvTensor k_, v_;
  const DecodeShape& shape_;
  const DecodeScratch& w_;
  const Partials& partials_;
  Steps& steps_;
  Sequence sequence_{};
  KeyRows key_rows_{};
  int64_t batch_idx_ = 0, head_kv_ = 0, rows_ = 0;
  KeyRange tile_{};
};

bool run_item(const Problem& p, const Tensors& t, const DecodeWorkspace& workspace,
              const DecodeScratch& scratch, int64_t item, Steps& steps) {
  const int64_t pair = item / workspace.shape.chunks;
  return DecodeWorker(p, t, workspace.shape, scratch, workspace.partials, steps)
      .run(pair / p.heads_kv, pair % p.heads_kv, item % workspace.shape.chunks);
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(run_item);

namespace {

// Merges the chunks of one (batch, kv head) pair.
void merge_pair(const Problem& p, const Tensors& t, const DecodeWorkspace& workspace, int64_t pair,
                float* row_scratch, Steps& steps) {
  const int64_t begin = pair * workspace.shape.rows;
  const int64_t end = begin + sequence_at(p, t, pair / p.heads_kv).len_q * p.group();
  for (int64_t row = begin; row < end; row += kRowsPerMerge) {
    const int64_t rows = std::min(kRowsPerMerge, end - row);
    steps.writing_out();
    merge_rows(p, t, workspace.partials, row, row + rows, row_scratch);
    if (!steps.done(merge_work(workspace.partials, rows))) return;
  }
}

}  // namespace

Status run_decode(const Launch& launch) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  const DecodeWorkspace workspace(p, launch.config, t.workspace);
  const DecodeShape& shape = workspace.shape;
  if (workspace.chunks_left != nullptr) {
    for (int64_t i = 0; i < p.batch * p.heads_kv; ++i) {
      new (workspace.chunks_left + i) std::atomic<int32_t>(static_cast<int32_t>(shape.chunks));
    }
  }
  Progress& progress = launch.progress;
  progress.start(workspace.work(p, t));
  std::atomic<int64_t> next{0};
  const auto run_item_here = HWY_DYNAMIC_DISPATCH(run_item);
  parallel(launch.executor, workspace.workers, [&](int32_t worker) {
    const DecodeScratch scratch = workspace.scratch(worker);
    Steps steps(progress);
    for (int64_t item = next++; item < shape.items && !progress.is_cancelled(); item = next++) {
      if (!run_item_here(p, t, workspace, scratch, item, steps)) return;
      const int64_t pair = item / shape.chunks;
      if (shape.chunks > 1 && --workspace.chunks_left[pair] == 0) {
        merge_pair(p, t, workspace, pair, scratch.o, steps);
      }
    }
  });
  return progress.finish();
}

}  // namespace wh::cpu
#endif
