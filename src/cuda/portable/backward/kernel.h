// cuda_portable_backward, the running side.
#pragma once

#include "core/status.h"
#include "cuda/gradients/gradients.h"
#include "cuda/gradients/items.h"
#include "cuda/portable/backward/tiles.h"

namespace wh {
struct Launch;
}

namespace wh::cuda {

struct PortableBackwardArgs {
  GradientArgs gradients;
  BackwardRows rows;
  // Rows that can be copied 16 bytes at a time; others are element by element.
  bool q_is_whole, k_is_whole, v_is_whole, d_out_is_whole;
  // Pairs of elements can be stored at once.
  bool dq_is_whole, dk_is_whole, dv_is_whole;
  int32_t tiles;           // of a head of the block's side
  int32_t first_item;      // of this launch
  const int32_t* only_if;  // blocks do nothing where it points to 0; null: they work
};

// The kernels compiled for these; instance.cu.in defines them.
template <Side kSide, int kDimQk, int kDimV, Dtype kDtype, SharedMemory kMemory>
const void* portable_backward_instance();

struct PortableBackwardVariant;

PortableBackwardArgs portable_backward_args(const Problem& problem, const Tensors& tensors,
                                            const BackwardRows& rows);
// Blocks [first, end) of both sides.
Status launch_portable_backward(const PortableBackwardArgs& args,
                                const PortableBackwardVariant& variant,
                                const BackwardBlocks& blocks, int64_t first, int64_t end,
                                cudaStream_t stream);

Status run_portable_backward(const Launch& launch);

}  // namespace wh::cuda
