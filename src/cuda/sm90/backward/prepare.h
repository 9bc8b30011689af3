// What comes before sm90_backward's products: numbers of the rows, and whether all is as usual.
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"
#include "cuda/gradients/gradients.h"
#include "cuda/gradients/items.h"

namespace wh::cuda {

// Writes shift, delta and d_sink of every row, and 1 to *is_unusual where an element of q, d_out or
// of a present key is not finite, or a row's log-sum-exp is so coarse that its weights' rounding
// would show in 16 bits. Needs rows that can be read 8 bytes at a time.
Status launch_prepare_gradients(const GradientArgs& args, Dtype dtype, const BackwardRows& rows,
                                int32_t* is_unusual, cudaStream_t stream);

}  // namespace wh::cuda
