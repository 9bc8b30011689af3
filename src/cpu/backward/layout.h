// How a backward problem is laid over items, row tiles, panels and scratch: the same for planning
// and running.
#pragma once

#include "core/carver.h"
#include "core/key_range.h"
#include "core/rounding.h"
#include "cpu/backward/head.h"
#include "plan/kernel.h"

namespace wh::cpu {

constexpr int64_t kBackwardPanelVectors = 3;  // SIMD vectors of keys in a full panel

// Register tiles of dk and dv cover 4 or 8 dimensions.
constexpr int64_t padded_dim(int64_t dim) { return round_up(dim, 8); }

// Rows that register tiles take at once: those of a sequence's last row tile are rounded up to it.
constexpr int64_t kBackwardRowStep = 8;

// Rows are numbered within a (sequence, kv head) pair: row = query_idx * group + head in the group.
// What workers share about them follows the tokens of q and has no room for the most of each
// sequence: those of packed queries begin where their tokens do, and a step of padding a sequence
// further on.
struct BackwardShape {
  int64_t lanes;    // keys of a full panel
  int64_t tile_q;   // rows of a row tile
  int64_t tile_k;   // keys of an item
  int64_t q_tiles;  // row tiles of a sequence's head, at most
  int64_t k_tiles;  // items of one, at most
  int64_t heads;    // batch * heads_kv

  BackwardShape(const Problem& problem, const Config& config, int64_t simd_floats);

  int64_t items() const { return heads * k_tiles; }
  int64_t tiles_of(const BackwardHead& head) const { return divide_up(head.rows(), tile_q); }
  // Of all sequences and kv heads.
  int64_t shared_rows() const { return heads_kv_ * head_rows_; }
  int64_t shared_tiles() const { return heads_kv_ * head_tiles_; }
  // The head's first one among them.
  int64_t first_row(const BackwardHead& head) const {
    return head.head_kv * head_rows_ + rows_before(head) +
           head.sequence.batch_idx * (kBackwardRowStep - 1);
  }
  int64_t first_tile(const BackwardHead& head) const {
    return head.head_kv * head_tiles_ + rows_before(head) / tile_q + head.sequence.batch_idx;
  }

 private:
  int64_t rows_before(const BackwardHead& head) const {
    return (head.sequence.query_batch * len_q_ + head.sequence.first_query) * head.group;
  }

  int64_t len_q_, heads_kv_;
  int64_t head_rows_, head_tiles_;  // of a kv head in all sequences
};

// The keys that some of the rows [begin, end) of a head see.
KeyRange keys_of_rows(const Problem& problem, const BackwardHead& head, int64_t begin, int64_t end);

// One worker's scratch: what belongs to the keys of its item, and to the row tile that meets them.
struct BackwardScratch {
  float* k;         // [keys, k_columns], infinities and NaN as 0
  float* k_lanes;   // [panels, dim_qk, lanes]
  float* v_lanes;   // [panels, dim_v, lanes]
  float* dk_lanes;  // [panels, dim_qk rounded up, lanes]
  float* dv_lanes;  // [panels, dim_v rounded up, lanes]
  float* q;         // [tile_q, q_columns], scaled
  float* d_out;     // [tile_q, d_out_columns]
  float* weights;   // [tile_q, lanes] of one panel: scores, then weights
  float* d_scores;  // [panels, tile_q, lanes]: d_out v, then the gradients of the scores
  float* bias;      // [tile_q, lanes], only with an array mask
  float* staged;    // [4, staged_columns]: rows on their way into or out of lanes
  float* ones;      // [lanes]
  float* largest;   // [tile_q]: of rows whose softmax is done once more, their largest score
  float* sums;      // [tile_q]: and the sum of their weights; -1: not such a row
  int32_t* first;   // [tile_q]: first visible key of each row
  int32_t* last;    // [tile_q]: one past its last

  int64_t k_columns, q_columns, d_out_columns;  // row strides, padded against set conflicts
  int64_t staged_columns;

  BackwardScratch(Carver& carver, const Problem& problem, const BackwardShape& shape);
};

// Where the pieces of a workspace lie: what all share first, then one scratch for each worker.
//
// A key weighs 2^(score - shift) * factor in its row, with scores in base 2.
class BackwardWorkspace {
 public:
  BackwardWorkspace(const Problem& problem, const Config& config, void* base);

  BackwardScratch scratch(int32_t worker) const;
  size_t bytes() const { return scratches_.bytes(workers); }
  int64_t work(const Tensors& tensors) const;  // of the whole run: see cpu/common/steps.h

  BackwardShape shape;
  int32_t workers;  // that there is something left for
  int64_t dq_columns;
  float* shift;    // [shared_rows]; minus infinity: the row sees nothing
  float* factor;   // [shared_rows]
  float* delta;    // [shared_rows]: d_out times out
  float* dq;       // [shared_rows, dq_columns]: sums over keys
  int32_t* turns;  // [shared_tiles]: the item that adds to the row tile's dq next

 private:
  const Problem& problem_;
  std::byte* base_;
  WorkerScratches scratches_;
};

// In multiply-adds: a row against keys, and a row that is read or written.
inline int64_t backward_work(const Problem& p, int64_t rows, int64_t keys) {
  return rows * keys * (3 * p.dim_qk + 2 * p.dim_v);
}

}  // namespace wh::cpu
