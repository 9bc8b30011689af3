#include "cuda/portable/backward/kernel.h"

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/steps.h"
#include "cuda/cuda_facts.h"
#include "cuda/portable/backward/config.h"
#include "cuda/portable/whole_rows.h"

namespace wh::cuda {
namespace {

// Blocks [first, end) of one side.
Status launch_side(PortableBackwardArgs args, const void* function, const BackwardTile& tile,
                   int64_t tiles, int64_t first, int64_t end, cudaStream_t stream) {
  if (first >= end) return {};
  args.tiles = static_cast<int32_t>(tiles);
  args.first_item = static_cast<int32_t>(first);
  void* parameters[] = {&args};
  return launch_kernel({.function = function,
                        .blocks = static_cast<int>(end - first),
                        .threads = kBackwardThreads,
                        .shared_bytes = tile.bytes,
                        .parameters = parameters,
                        .stream = stream});
}

}  // namespace

PortableBackwardArgs portable_backward_args(const Problem& p, const Tensors& t,
                                            const BackwardRows& rows) {
  PortableBackwardArgs args{};
  args.gradients = gradient_args(p, t);
  args.rows = rows;
  const Dtype dtype = p.dtype_q;
  const auto is_whole = [&](const void* data, const Strides& stride, int64_t dim) {
    return portable::is_whole(data, stride, dim, dtype, 16);
  };
  args.q_is_whole = is_whole(t.q, p.stride_q, p.dim_qk);
  args.k_is_whole = is_whole(t.k, p.stride_k, p.dim_qk);
  args.v_is_whole = is_whole(t.v, p.stride_v, p.dim_v);
  args.d_out_is_whole = is_whole(t.d_out, p.stride_d_out, p.dim_v);
  const auto has_pairs = [&](const void* data, const Strides& stride, int64_t dim) {
    return portable::is_whole(data, stride, dim, dtype, 2 * dtype_bytes(dtype));
  };
  args.dq_is_whole = has_pairs(t.dq, p.stride_dq, p.dim_qk);
  args.dk_is_whole = has_pairs(t.dk, p.stride_dk, p.dim_qk);
  args.dv_is_whole = has_pairs(t.dv, p.stride_dv, p.dim_v);
  return args;
}

Status launch_portable_backward(const PortableBackwardArgs& args,
                                const PortableBackwardVariant& variant,
                                const BackwardBlocks& blocks, int64_t first, int64_t end,
                                cudaStream_t stream) {
  WH_RETURN_IF_ERROR(launch_side(args, variant.queries(), variant.of_queries, blocks.query_tiles,
                                 first, std::min(end, blocks.queries), stream));
  return launch_side(args, variant.keys(), variant.of_keys, blocks.key_tiles,
                     std::max(first, blocks.queries) - blocks.queries, end - blocks.queries,
                     stream);
}

Status run_portable_backward(const Launch& launch) {
  const Problem& p = launch.problem;
  const PortableBackwardVariant* variant =
      portable_backward_variant(p, launch.config, cuda_facts(p.device_index).shared_bytes);
  if (variant == nullptr) {
    return invalid("the plan's tile fits no variant of cuda_portable_backward");
  }
  const BackwardBlocks blocks = variant->blocks(p);
  Carver carver(launch.tensors.workspace);
  const BackwardRows rows(carver, p);
  const PortableBackwardArgs args = portable_backward_args(p, launch.tensors, rows);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  WH_RETURN_IF_ERROR(cuda_status(cudaMemsetAsync(rows.dropped, 0, sizeof(*rows.dropped), stream),
                                 "cudaMemsetAsync"));
  // Without sequences, queries or keys nothing else is written.
  if ((p.batch == 0 || blocks.all() == 0) && p.has_sinks) {
    return launch_sink_gradients(args.gradients, rows.d_sink, stream);
  }
  return run_in_steps(launch, blocks.all(), [&](int64_t first, int64_t end) -> Status {
    WH_RETURN_IF_ERROR(launch_portable_backward(args, *variant, blocks, first, end, stream));
    if (end < blocks.all()) return {};
    if (p.has_sinks) {
      WH_RETURN_IF_ERROR(launch_sink_gradients(args.gradients, rows.d_sink, stream));
    }
    return launch_restore(args.gradients, p.dtype_q, rows.dropped, stream);
  });
}

}  // namespace wh::cuda
