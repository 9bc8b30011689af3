// cuda_unfused, the planner's side. docs/cuda-unfused.md describes the route.
#pragma once

#include "plan/kernel.h"

namespace wh::cuda {

extern const Kernel kUnfused;

// What one pass of products covers. An item is one kv head with every row of its group, or one
// query head where the group's scores would be too many; a pass takes several items at once.
struct UnfusedShape {
  int64_t heads;                  // query heads of an item: the whole group, or 1
  int64_t rows;                   // of an item: heads * len_q
  int64_t items;                  // of the problem
  int64_t items_at_once;          // of a pass
  int64_t columns_qk, columns_v;  // padded to what cuBLASLt takes on its fast paths
  int64_t keys;                   // padded likewise

  explicit UnfusedShape(const Problem& problem);
  int64_t passes() const { return (items + items_at_once - 1) / items_at_once; }
};

// With precision high, 16-bit tensors are packed to f32, and so the weights are too.
struct UnfusedTypes {
  Dtype tensors;  // of q, k, v and out
  Dtype packed;   // of both products' factors

  UnfusedTypes(const Problem& problem, const Config& config);
};

// Where the pieces of a workspace lie; measured with a null base.
struct UnfusedWorkspace {
  void* q;               // [items, rows, columns_qk] of the packed type
  void* k;               // [items, keys, columns_qk]
  void* v;               // [items, keys, columns_v], hidden keys' values 0
  float* s;              // [items, rows, keys]
  void* p;               // [items, rows, keys] of the packed type; s itself in f32
  float* o;              // [items, rows, columns_v]
  float* m;              // [items, rows]: the largest score
  float* l;              // [items, rows]: the sum of weights
  int32_t* has_special;  // [1]: whether a present V holds an infinity or NaN
  void* gemm;            // cuBLASLt's own
  size_t bytes;

  static constexpr size_t kGemmBytes = size_t{32} << 20;

  UnfusedWorkspace(void* base, Dtype packed, const UnfusedShape& shape);
};

}  // namespace wh::cuda
