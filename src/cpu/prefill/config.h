// cpu_prefill, the planner's side. docs/cpu-prefill.md describes the kernel.
#pragma once

#include "cpu/partial.h"
#include "plan/kernel.h"

namespace wh::cpu {

extern const Kernel kPrefill;

// How a problem is laid over items, panels and chunks; the same for planning and running.
struct PrefillShape {
  int64_t lanes;          // query rows of a full panel
  int64_t rows_per_head;  // len_q * group: the query rows that share a kv head
  int64_t tile_q;         // rows of an item
  int64_t tile_k;
  int64_t q_tiles;  // items a (batch, kv head) pair has
  int64_t chunks;   // 1: keys are not split
  int64_t chunk_keys;
  int64_t items;  // batch * heads_kv * q_tiles * chunks

  PrefillShape(const Problem& problem, const Config& config, int64_t simd_floats);
};

// One worker's scratch.
struct PrefillScratch {
  float* q;        // [panels, dim_qk, lanes], scale folded in
  float* o;        // [panels, dim_v rounded up, lanes], unnormalised
  float* k;        // [keys, k_columns], widened; keys: tile_k rounded up and a register tile
  float* v;        // [keys, v_columns], widened
  float* s;        // [keys, lanes]
  float* bias;     // [keys, lanes], only with an array mask
  float* m;        // [panels, lanes], base 2
  float* l;        // [panels, lanes]
  float* alpha;    // [lanes]
  int32_t* first;  // [panels, lanes]: first visible key of each row
  int32_t* last;   // [panels, lanes]: one past its last

  int64_t k_columns, v_columns;  // row strides, padded against set conflicts

  PrefillScratch(Carver& carver, const Problem& problem, const PrefillShape& shape);
};

}  // namespace wh::cpu
