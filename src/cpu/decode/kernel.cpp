// cpu_decode: few query rows against a kv head.
//
// Schedule: an item is every row (query, head of the group) of one (batch, kv head) pair and one
// chunk of its keys. Tile by tile: scores (head dimension on SIMD lanes, up to kRowBlock rows
// against each key's vectors, so that K is converted once a block), softmax along the keys of a
// row, values. While scores run, V of the same keys is prefetched; while values run, the next K
// tile. The worker that finishes a pair's last chunk merges its chunks, in their order.
//
// Roofline: K and V stream from memory once; 2 * rows flops an element of them. Up to 4 rows the
// memory bounds it, from about 8 rows in f16 the multiply-adds do.
#include "cpu/decode/kernel.h"

#include <cmath>
#include <limits>

#include "core/array_mask.h"
#include "core/key_range.h"
#include "cpu/decode/config.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/decode/kernel.cpp"
#include <hwy/foreach_target.h>  // IWYU pragma: keep
#include <hwy/highway.h>

#include "cpu/tile-inl.h"
#include "cpu/vector_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wh::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 16 accumulators of 32 registers, or 8 of 16: the rest holds what is loaded.
constexpr int kAccumulators = 2 * kTileRows;
constexpr int kRowBlock = kTileRows;

// A matrix whose rows are read in place: K or V of one kv head, from its first key of the tile.
template <typename T>
struct Matrix {
  const T* data;
  ptrdiff_t row_stride;
};

// The four sums of lanes of four vectors, stored to to[0..4).
HWY_INLINE void store_sums(Vec a, Vec b, Vec c, Vec d, float* to) {
  const F32 f32;
#if HWY_TARGET == HWY_SCALAR
  hn::Store(a, f32, to);
  hn::Store(b, f32, to + 1);
  hn::Store(c, f32, to + 2);
  hn::Store(d, f32, to + 3);
#else
  const auto ac = hn::Add(hn::InterleaveLower(f32, a, c), hn::InterleaveUpper(f32, a, c));
  const auto bd = hn::Add(hn::InterleaveLower(f32, b, d), hn::InterleaveUpper(f32, b, d));
  // Each 128-bit block now holds its part of the four sums.
  const auto blocks = hn::Add(hn::InterleaveLower(f32, ac, bd), hn::InterleaveUpper(f32, ac, bd));
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86
  const hn::Half<F32> half;
  const hn::Half<decltype(half)> quarter;
  const auto halves = hn::Add(hn::LowerHalf(half, blocks), hn::UpperHalf(half, blocks));
  hn::StoreU(hn::Add(hn::LowerHalf(quarter, halves), hn::UpperHalf(quarter, halves)), quarter, to);
#elif HWY_TARGET == HWY_AVX2
  const hn::Half<F32> half;
  hn::StoreU(hn::Add(hn::LowerHalf(half, blocks), hn::UpperHalf(half, blocks)), half, to);
#else
  hn::StoreU(blocks, f32, to);
#endif
#endif
}

// s[r][i] = q[r] . k[i] for kRows rows and kAccumulators / kRows keys.
template <int kRows, typename T>
HWY_INLINE void score_block(Matrix<float> q, int64_t columns, Matrix<T> k, float* HWY_RESTRICT s,
                            int64_t s_stride) {
  constexpr int kKeys = kAccumulators / kRows;
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  Vec acc[kAccumulators];
  WH_UNROLL for (int i = 0; i < kAccumulators; ++i) acc[i] = hn::Zero(f32);
  for (int64_t d = 0; d < columns; d += lanes) {
    Vec key[kKeys];
    WH_UNROLL for (int i = 0; i < kKeys; ++i) key[i] = load_f32(k.data + i * k.row_stride + d);
    WH_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto query = hn::Load(f32, q.data + r * q.row_stride + d);
      WH_UNROLL for (int i = 0; i < kKeys; ++i) {
        acc[r * kKeys + i] = hn::MulAdd(query, key[i], acc[r * kKeys + i]);
      }
    }
  }
  HWY_ALIGN float sums[kAccumulators];
  WH_UNROLL for (int i = 0; i < kAccumulators; i += 4) {
    store_sums(acc[i], acc[i + 1], acc[i + 2], acc[i + 3], sums + i);
  }
  WH_UNROLL for (int r = 0; r < kRows; ++r) {
    WH_UNROLL for (int i = 0; i < kKeys; ++i) s[r * s_stride + i] = sums[r * kKeys + i];
  }
}

// One row, one key: what is left of a tile after whole blocks.
template <typename T>
HWY_INLINE float score_one(const float* HWY_RESTRICT q, int64_t columns, const T* k) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  auto sum = hn::Zero(f32);
  for (int64_t d = 0; d < columns; d += lanes) {
    sum = hn::MulAdd(hn::Load(f32, q + d), load_f32(k + d), sum);
  }
  return hn::GetLane(hn::SumOfLanes(f32, sum));
}

// o[r][0..kVectors) = alpha[r] * o[r] + sum_key p[r][key] * v[key], from column 0 of `v` and `o`.
template <int kRows, int kVectors, typename T>
HWY_INLINE void value_block(const float* HWY_RESTRICT p, int64_t p_stride, Matrix<T> v,
                            int64_t keys, const float* HWY_RESTRICT alpha, float* HWY_RESTRICT o,
                            int64_t o_stride) {
  const F32 f32;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
  Vec acc[kRows][kVectors];
  WH_UNROLL for (int r = 0; r < kRows; ++r) {
    const auto rescale = hn::Set(f32, alpha[r]);
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      acc[r][c] = hn::Mul(rescale, hn::Load(f32, o + r * o_stride + c * lanes));
    }
  }
  for (int64_t j = 0; j < keys; ++j) {
    Vec value[kVectors];
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      value[c] = load_f32(v.data + j * v.row_stride + c * lanes);
    }
    WH_UNROLL for (int r = 0; r < kRows; ++r) {
      const auto weight = hn::Set(f32, p[r * p_stride + j]);
      WH_UNROLL for (int c = 0; c < kVectors; ++c) {
        acc[r][c] = hn::MulAdd(weight, value[c], acc[r][c]);
      }
    }
  }
  WH_UNROLL for (int r = 0; r < kRows; ++r) {
    WH_UNROLL for (int c = 0; c < kVectors; ++c) {
      hn::Store(acc[r][c], f32, o + r * o_stride + c * lanes);
    }
  }
}

// Into L2: the next tile's lines must not evict this one's from L1.
HWY_INLINE void prefetch_rows(const std::byte* from, ptrdiff_t row_bytes, int64_t rows,
                              int64_t bytes) {
  for (int64_t i = 0; i < rows; ++i, from += row_bytes) {
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(from + b, 0, 2);
  }
}

class DecodeWorker {
 public:
  DecodeWorker(const Problem& p, const Tensors& t, const DecodeShape& shape,
               const DecodeScratch& scratch, const Partials& partials)
      : p_(p), t_(t), shape_(shape), w_(scratch), partials_(partials) {}

  void run(int64_t batch_idx, int64_t head_kv, int64_t chunk) {
    batch_idx_ = batch_idx;
    head_kv_ = head_kv;
    const KeyRange keys = load_rows(chunk);
    switch (p_.dtype_kv) {
      case Dtype::kF32:
        run_tiles<float>(keys);
        break;
      case Dtype::kF16:
        run_tiles<Half>(keys);
        break;
      case Dtype::kBf16:
        run_tiles<Bfloat16>(keys);
        break;
    }
    store(chunk);
  }

 private:
  int64_t head_of(int64_t row) const { return head_kv_ * p_.group() + row % p_.group(); }

  // The keys of this chunk that some row sees. A window's chunks start where its first query's
  // keys do: counting from key 0 would leave most of them empty.
  KeyRange load_rows(int64_t chunk) {
    const KeyRange present = present_keys(p_, t_, batch_idx_);
    const int64_t origin = std::clamp<int64_t>(visible_keys(p_, present, 0).begin, 0, p_.len_k);
    const int64_t begin = shape_.chunks == 1 ? 0 : origin + chunk * shape_.chunk_keys;
    const int64_t end = shape_.chunks == 1 ? p_.len_k : begin + shape_.chunk_keys;
    KeyRange keys{std::numeric_limits<int64_t>::max(), 0};
    const float scale = p_.softcap > 0 ? p_.scale / p_.softcap : p_.scale * 1.44269504f;
    for (int64_t row = 0; row < shape_.rows; ++row) {
      w_.m[row] = -std::numeric_limits<float>::infinity();
      w_.l[row] = 0;
      const int64_t query = row / p_.group();
      const KeyRange visible = visible_keys(p_, present, query);
      const int64_t last = std::clamp<int64_t>(visible.end, 0, end);
      const int64_t first = std::clamp<int64_t>(visible.begin, std::min(begin, last), last);
      w_.first[row] = static_cast<int32_t>(first);
      w_.last[row] = static_cast<int32_t>(last);
      if (first < last) {
        keys.begin = std::min(keys.begin, first);
        keys.end = std::max(keys.end, last);
      }
      const int64_t offset =
          batch_idx_ * p_.stride_q[0] + head_of(row) * p_.stride_q[1] + query * p_.stride_q[2];
      float* q = w_.q + row * shape_.columns_qk;
      switch (p_.dtype_q) {
        case Dtype::kF32:
          load_query(static_cast<const float*>(t_.q) + offset, scale, q);
          break;
        case Dtype::kF16:
          load_query(static_cast<const Half*>(t_.q) + offset, scale, q);
          break;
        case Dtype::kBf16:
          load_query(static_cast<const Bfloat16*>(t_.q) + offset, scale, q);
          break;
      }
    }
    for (int64_t i = 0; i < shape_.rows * shape_.columns_v; ++i) w_.o[i] = 0;
    return keys.empty() ? KeyRange{0, 0} : keys;
  }

  template <typename T>
  void load_query(const T* from, float scale, float* to) const {
    for (int64_t d = 0; d < p_.dim_qk; ++d) to[d] = to_float(from[d * p_.stride_q[3]]) * scale;
    for (int64_t d = p_.dim_qk; d < shape_.columns_qk; ++d) to[d] = 0;
  }

  template <typename T>
  Matrix<T> keys_at(int64_t key) const {
    return {static_cast<const T*>(t_.k) + batch_idx_ * p_.stride_k[0] + head_kv_ * p_.stride_k[1] +
                key * p_.stride_k[2],
            p_.stride_k[2]};
  }
  template <typename T>
  Matrix<T> values_at(int64_t key) const {
    return {static_cast<const T*>(t_.v) + batch_idx_ * p_.stride_v[0] + head_kv_ * p_.stride_v[1] +
                key * p_.stride_v[2],
            p_.stride_v[2]};
  }

  template <typename T>
  void run_tiles(KeyRange keys) {
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
    const bool k_in_place = p_.stride_k[3] == 1 && p_.dim_qk % lanes == 0;
    const bool v_in_place = p_.stride_v[3] == 1 && p_.dim_v % lanes == 0;
    const auto element = static_cast<int64_t>(sizeof(T));
    for (int64_t k0 = keys.begin; k0 < keys.end; k0 += shape_.tile_k) {
      tile_ = {k0, std::min(k0 + shape_.tile_k, keys.end)};
      const int64_t count = tile_.size();
      const Matrix<T> k = keys_at<T>(k0), v = values_at<T>(k0);
      const bool has_hidden = p_.mask != MaskKind::kNone || !all_rows_see_tile();
      if (v_in_place) {
        prefetch_rows(reinterpret_cast<const std::byte*>(v.data), v.row_stride * element, count,
                      p_.dim_v * element);
      }
      if (k_in_place) {
        scores(k, p_.dim_qk);
      } else {
        widen_rows(k.data, p_.stride_k, count, p_.dim_qk, shape_.columns_qk, w_.k);
        scores(Matrix<float>{w_.k, shape_.columns_qk}, shape_.columns_qk);
      }
      softmax();
      if (k_in_place && tile_.end < keys.end) {
        prefetch_rows(reinterpret_cast<const std::byte*>(keys_at<T>(tile_.end).data),
                      k.row_stride * element, std::min(shape_.tile_k, keys.end - tile_.end),
                      p_.dim_qk * element);
      }
      if (v_in_place && !has_hidden) {
        values(v);
        continue;
      }
      const bool is_finite =
          widen_rows(v.data, p_.stride_v, count, p_.dim_v, shape_.columns_v, w_.v);
      if (is_finite || !has_hidden) {
        values(Matrix<float>{w_.v, shape_.columns_v});
      } else {
        add_values_one_by_one();
      }
    }
  }

  bool all_rows_see_tile() const {
    for (int64_t row = 0; row < shape_.rows; ++row) {
      if (w_.first[row] > tile_.begin || w_.last[row] < tile_.end) return false;
    }
    return true;
  }

  template <typename T>
  void scores(Matrix<T> k, int64_t columns) {
    int64_t row = 0;
    for (; row + kRowBlock <= shape_.rows; row += kRowBlock) score_rows<kRowBlock>(row, k, columns);
    if (row + 4 <= shape_.rows && kRowBlock > 4) {
      score_rows<4>(row, k, columns);
      row += 4;
    }
    if (row + 2 <= shape_.rows) {
      score_rows<2>(row, k, columns);
      row += 2;
    }
    if (row < shape_.rows) score_rows<1>(row, k, columns);
  }

  template <int kRows, typename T>
  void score_rows(int64_t row, Matrix<T> k, int64_t columns) {
    constexpr int kKeys = kAccumulators / kRows;
    const float* q = w_.q + row * shape_.columns_qk;
    float* s = w_.s + row * shape_.tile_k;
    int64_t j = 0;
    for (; j + kKeys <= tile_.size(); j += kKeys) {
      score_block<kRows>(Matrix<float>{q, shape_.columns_qk}, columns,
                         Matrix<T>{k.data + j * k.row_stride, k.row_stride}, s + j, shape_.tile_k);
    }
    for (; j < tile_.size(); ++j) {
      for (int r = 0; r < kRows; ++r) {
        s[r * shape_.tile_k + j] =
            score_one(q + r * shape_.columns_qk, columns, k.data + j * k.row_stride);
      }
    }
  }

  bool is_hidden(int64_t row, int64_t key) const {
    return key < w_.first[row] || key >= w_.last[row] ||
           mask_bias(p_, t_.mask, batch_idx_, head_of(row), row / p_.group(), key) ==
               -std::numeric_limits<float>::infinity();
  }

  // Softcap, masks, and the online softmax of each row; leaves weights in s.
  void softmax() {
    const F32 f32;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(f32));
    constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
    const int64_t keys = tile_.size();
    const int64_t padded = (keys + lanes - 1) / lanes * lanes;  // tile_k is a multiple of lanes
    for (int64_t row = 0; row < shape_.rows; ++row) {
      float* s = w_.s + row * shape_.tile_k;
      if (p_.softcap > 0) {
        const auto cap = hn::Set(f32, p_.softcap * 1.44269504f);
        for (int64_t j = keys; j < padded; ++j) s[j] = 0;
        for (int64_t j = 0; j < padded; j += lanes) {
          hn::Store(hn::Mul(cap, tanh_vector(hn::Load(f32, s + j))), f32, s + j);
        }
      }
      if (p_.mask != MaskKind::kNone) {
        for (int64_t j = 0; j < keys; ++j) {
          const float bias =
              mask_bias(p_, t_.mask, batch_idx_, head_of(row), row / p_.group(), tile_.begin + j);
          s[j] = bias == kMinusInfinity ? bias : std::fma(bias, 1.44269504f, s[j]);
        }
      }
      for (int64_t key = tile_.begin; key < std::min<int64_t>(w_.first[row], tile_.end); ++key) {
        s[key - tile_.begin] = kMinusInfinity;
      }
      for (int64_t key = std::max<int64_t>(w_.last[row], tile_.begin); key < tile_.end; ++key) {
        s[key - tile_.begin] = kMinusInfinity;
      }
      for (int64_t j = keys; j < padded; ++j) s[j] = kMinusInfinity;

      auto largest = hn::Set(f32, w_.m[row]);
      for (int64_t j = 0; j < padded; j += lanes) largest = hn::Max(largest, hn::Load(f32, s + j));
      const float m = hn::GetLane(hn::MaxOfLanes(f32, largest));
      const auto shift = hn::Set(f32, m == kMinusInfinity ? 0 : m);
      auto sum = hn::Zero(f32);
      for (int64_t j = 0; j < padded; j += lanes) {
        const auto weight = exp2_nonpositive(hn::Sub(hn::Load(f32, s + j), shift));
        sum = hn::Add(sum, weight);
        hn::Store(weight, f32, s + j);
      }
      const float alpha = hn::GetLane(exp2_nonpositive(hn::Sub(hn::Set(f32, w_.m[row]), shift)));
      w_.alpha[row] = alpha;
      w_.l[row] = std::fma(w_.l[row], alpha, hn::GetLane(hn::SumOfLanes(f32, sum)));
      w_.m[row] = m;
    }
  }

  template <typename T>
  void values(Matrix<T> v) {
    int64_t row = 0;
    for (; row + kRowBlock <= shape_.rows; row += kRowBlock) value_rows<kRowBlock>(row, v);
    if (row + 4 <= shape_.rows && kRowBlock > 4) {
      value_rows<4>(row, v);
      row += 4;
    }
    if (row + 2 <= shape_.rows) {
      value_rows<2>(row, v);
      row += 2;
    }
    if (row < shape_.rows) value_rows<1>(row, v);
  }

  template <int kRows, typename T>
  void value_rows(int64_t row, Matrix<T> v) {
    constexpr int kVectors = kAccumulators / kRows < 8 ? kAccumulators / kRows : 8;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(F32()));
    const float* p = w_.s + row * shape_.tile_k;
    float* o = w_.o + row * shape_.columns_v;
    // Widened rows are padded to columns_v; those in place end at dim_v, a multiple of lanes then.
    const int64_t columns = std::is_same_v<T, float> && v.data == static_cast<const void*>(w_.v)
                                ? shape_.columns_v
                                : p_.dim_v;
    int64_t d = 0;
    for (; d + kVectors * lanes <= columns; d += kVectors * lanes) {
      value_block<kRows, kVectors>(p, shape_.tile_k, Matrix<T>{v.data + d, v.row_stride},
                                   tile_.size(), w_.alpha + row, o + d, shape_.columns_v);
    }
    for (; d < columns; d += lanes) {
      value_block<kRows, 1>(p, shape_.tile_k, Matrix<T>{v.data + d, v.row_stride}, tile_.size(),
                            w_.alpha + row, o + d, shape_.columns_v);
    }
  }

  // V holds an infinity or NaN and some key is hidden: a weight of zero would not hide it.
  void add_values_one_by_one() {
    for (int64_t row = 0; row < shape_.rows; ++row) {
      float* o = w_.o + row * shape_.columns_v;
      for (int64_t d = 0; d < p_.dim_v; ++d) o[d] *= w_.alpha[row];
      for (int64_t j = 0; j < tile_.size(); ++j) {
        if (is_hidden(row, tile_.begin + j)) continue;
        const float weight = w_.s[row * shape_.tile_k + j];
        for (int64_t d = 0; d < p_.dim_v; ++d) {
          o[d] = std::fma(weight, w_.v[j * shape_.columns_v + d], o[d]);
        }
      }
    }
  }

  void store(int64_t chunk) {
    for (int64_t row = 0; row < shape_.rows; ++row) {
      const float* o = w_.o + row * shape_.columns_v;
      if (partials_.chunks == 1) {
        store_row(p_, t_, {batch_idx_, head_kv_, row}, w_.m[row], w_.l[row], o);
        continue;
      }
      const int64_t i =
          chunk * partials_.rows + (batch_idx_ * p_.heads_kv + head_kv_) * shape_.rows + row;
      partials_.m[i] = w_.m[row];
      partials_.l[i] = w_.l[row];
      if (w_.l[row] == 0) continue;  // the merge skips it
      for (int64_t d = 0; d < p_.dim_v; ++d) partials_.o[i * p_.dim_v + d] = o[d];
    }
  }

  const Problem& p_;
  const Tensors& t_;
  const DecodeShape& shape_;
  const DecodeScratch& w_;
  const Partials& partials_;
  int64_t batch_idx_ = 0, head_kv_ = 0;
  KeyRange tile_{};
};

void run_item(const Problem& p, const Tensors& t, const DecodeWorkspace& workspace,
              const DecodeScratch& scratch, int64_t item) {
  const int64_t pair = item / workspace.shape.chunks;
  DecodeWorker(p, t, workspace.shape, scratch, workspace.partials)
      .run(pair / p.heads_kv, pair % p.heads_kv, item % workspace.shape.chunks);
}

}  // namespace wh::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wh::cpu {
HWY_EXPORT(run_item);

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
  progress.start(shape.items);
  std::atomic<int64_t> next{0};
  const auto run_item_here = HWY_DYNAMIC_DISPATCH(run_item);
  const auto workers = static_cast<int32_t>(std::min<int64_t>(launch.config.threads, shape.items));
  parallel(launch.executor, workers, [&](int32_t worker) {
    const DecodeScratch scratch = workspace.scratch(worker);
    for (int64_t item = next++; item < shape.items && !progress.is_cancelled(); item = next++) {
      run_item_here(p, t, workspace, scratch, item);
      const int64_t pair = item / shape.chunks;
      if (shape.chunks > 1 && --workspace.chunks_left[pair] == 0) {
        merge_rows(p, t, workspace.partials, pair * shape.rows, (pair + 1) * shape.rows, scratch.o);
      }
      progress.step_done();
    }
  });
  return progress.status("partly written");
}

}  // namespace wh::cpu
#endif
