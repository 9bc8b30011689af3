// What a kernel is compiled for.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "cuda/common/head_dims.h"

namespace wh::cuda {

// What one block may have, by card: 99 KB on 8.6, 8.9 and 12.0; 163 KB and more on 8.0, 9.0 and
// 10.0.
enum class SharedMemory : int32_t { kSmall = 101376, kLarge = 166912 };

// One that src/cuda/instances.json lists; the tables are in cuda/instances.h, which CMake writes.
struct Instance {
  HeadDims dims;
  Dtype dtype;
  SharedMemory memory;  // of its cards; kLarge too where small ones run the same code
  int rows;             // of queries, where they are compiled in; 0 elsewhere
  bool is_compiled;     // in this build (WIDEHEAD_CUDA_INSTANCES)
};

}  // namespace wh::cuda
