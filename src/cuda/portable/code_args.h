// What cuda_portable over codes on tensor cores is launched with.
#pragma once

#include "cuda/portable/code_tiles.h"
#include "cuda/portable/kernel.h"

namespace wh::cuda {

// How rows of codes, of K or V, come into shared memory: piece by piece, all threads side by side,
// over one row's end into the next, so that none waits for rows of 17 pieces.
struct CodeCopy {
  const unsigned char* data;
  int64_t stride[4];  // bytes between batch entries or pages, heads, keys, and bytes of a row
  Divisor pieces;     // of a row
  int piece_bytes;    // 4, 8 or 16; 1: byte by byte, wherever they are
  int row_step, piece_step;  // from a thread's piece to its next: rows, and pieces beside
  const float* scales;       // of tokens; null: they have none of their own
  int64_t stride_scales[3];
};

struct CodeTileArgs {
  PortableArgs portable;  // first, where other kernels take it alone
  CodeLayout layout;
  CodeCopy copy[2];  // of K and V
};

}  // namespace wh::cuda
