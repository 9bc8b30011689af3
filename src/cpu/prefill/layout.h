// How a prefill problem is laid over items, panels, chunks and scratch: the same for planning and
// running, and for both prefill kernels.
#pragma once

#include "core/sequence.h"
#include "cpu/common/partial.h"
#include "plan/kernel.h"

namespace wh::cpu {

constexpr int64_t kPanelVectors = 3;       // SIMD vectors of query rows in a full panel
constexpr int64_t kMostBroadcastRows = 8;  // register tiles cover 4 or 8 broadcast rows

// What a worker takes from the counter.
struct PrefillItem {
  int64_t batch_idx, head_kv;
  int64_t row_begin, row_end;  // within the head's len_q * group rows, of the most queries
  KeyRange keys;               // of its chunk
  int64_t chunk;

  int64_t rows() const { return row_end - row_begin; }
};

struct PrefillShape {
  int64_t lanes;          // query rows of a full panel
  int64_t rows_per_head;  // len_q * group: the query rows that share a kv head
  int64_t tile_q;         // rows of an item
  int64_t tile_k;
  int64_t q_tiles;  // items a (batch, kv head) pair has
  int64_t chunks;   // 1: keys are not split
  int64_t chunk_keys;
  int64_t items;  // batch * heads_kv * q_tiles * chunks
  int64_t len_k;

  PrefillShape(const Problem& problem, const Config& config, int64_t simd_floats);

  PrefillItem item(int64_t batch_idx, int64_t head_kv, int64_t q_tile, int64_t chunk) const;
};

// The item without the rows that its sequence does not have.
PrefillItem item_of(const Problem& problem, const Sequence& sequence, PrefillItem item);
// The keys of an item's chunk that some row of it sees.
KeyRange keys_of_item(const Problem& problem, const Sequence& sequence, const PrefillItem& item);

// One worker's scratch. A dword is an f32 or a pair of bf16: in f32 arithmetic everything is
// widened, else queries, keys, values and weights lie in pairs.
struct PrefillScratch {
  float* q;        // [panels, q_rows, lanes] dwords: the queries of an item, transposed
  float* o;        // [panels, dim_v rounded up, lanes], unnormalised
  float* k;        // [keys, k_columns] dwords: a tile that cannot be read in place
  float* v;        // [keys or pairs of them, v_columns] dwords
  float* s;        // [keys, lanes]: scores, then weights
  float* p_low;    // [pairs of keys, lanes]: what rounding took from the weights;
                   // Arithmetic::kBf16High only
  float* bias;     // [keys, lanes], only with an array mask
  float* staged;   // [4, staged_columns]: rows on their way into or out of a panel
  float* m;        // [panels, lanes], base 2
  float* l;        // [panels, lanes]
  float* alpha;    // [lanes]
  int32_t* first;  // [panels, lanes]: first visible key of each row
  int32_t* last;   // [panels, lanes]: one past its last

  int64_t q_rows;                // dwords of a query
  int64_t k_columns, v_columns;  // row strides, padded against set conflicts
  int64_t staged_columns;

  PrefillScratch(Carver& carver, const Problem& problem, const PrefillShape& shape,
                 Arithmetic arithmetic);
};

// Where the pieces of a workspace lie: partial rows first, then one scratch for each worker.
class PrefillWorkspace {
 public:
  PrefillWorkspace(const Problem& problem, const Config& config, void* base);

  PrefillScratch scratch(int32_t worker) const;
  size_t bytes() const { return scratches_.bytes(workers); }

  PrefillShape shape;
  Partials partials;
  int32_t workers;  // that an item is left for

  int64_t work(const Tensors& tensors) const;  // of the whole run: see cpu/common/steps.h

 private:
  const Problem& problem_;
  Arithmetic arithmetic_;
  std::byte* base_;
  WorkerScratches scratches_;
};

}  // namespace wh::cpu
