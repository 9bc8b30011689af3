// cpu_decode, the planner's side. docs/cpu-decode.md describes the kernel.
#pragma once

#include <atomic>

#include "core/sequence.h"
#include "cpu/common/partial.h"
#include "plan/kernel.h"

namespace wh::cpu {

extern const Kernel kDecode;

constexpr int64_t kLaneStride = 16;  // the most f32 lanes of a vector

// How a problem is cut into items; the same for planning and running. An item is all rows of one
// (batch, kv head) pair and one chunk of the keys that any of them may see.
struct DecodeShape {
  int64_t rows;  // of an item: len_q * group, of the most queries
  int64_t tile_k;
  int64_t chunks;  // a (batch, kv head) pair has; 1: keys are not split
  int64_t chunk_keys;
  int64_t items;       // batch * heads_kv * chunks
  int64_t columns_qk;  // dim_qk rounded up to whole vectors
  int64_t columns_v;
  bool has_mask;  // an array

  DecodeShape(const Problem& problem, const Config& config);
};

// Where a chunk lies, and the keys of it that some row sees.
KeyRange chunk_range(const Problem& problem, const Sequence& sequence, const DecodeShape& shape,
                     int64_t chunk);
KeyRange keys_of_chunk(const Problem& problem, const Sequence& sequence, const DecodeShape& shape,
                       int64_t chunk);

// One worker's scratch.
struct DecodeScratch {
  float* q;        // [rows, columns_qk], scale folded in
  float* o;        // [rows, columns_v], unnormalised
  float* k;        // [tile_k, columns_qk]: a tile that is no whole vectors, widened
  float* v;        // [tile_k, columns_v]
  float* s;        // [rows, tile_k]: scores, then weights, of each block as [key, row]
  float* bias;     // [tile_k]: a row of the array mask, only where there is one
  float* m;        // [rows, kLaneStride], base 2; a block of rows uses its first vector
  float* l;        // [rows, kLaneStride]
  float* alpha;    // [rows, kLaneStride]
  int32_t* first;  // [rows]: first visible key
  int32_t* last;   // [rows]: one past the last

  DecodeScratch(Carver& carver, const DecodeShape& shape);
};

// Where the pieces of a workspace lie.
class DecodeWorkspace {
 public:
  DecodeWorkspace(const Problem& problem, const Config& config, void* base);

  DecodeScratch scratch(int32_t worker) const;
  size_t bytes() const { return scratches_.bytes(workers); }
  int64_t work(const Problem& problem, const Tensors& tensors) const;  // see cpu/common/steps.h

  DecodeShape shape;
  Partials partials;
  int32_t workers;                    // that an item is left for
  std::atomic<int32_t>* chunks_left;  // [batch * heads_kv]; only with several chunks

 private:
  std::byte* base_;
  WorkerScratches scratches_;
};

}  // namespace wh::cpu
