#include "cuda/portable/kernel.h"

#include <algorithm>

#include "cuda/common/kv_codes.h"
#include "cuda/common/launch.h"
#include "cuda/common/steps.h"
#include "cuda/cuda_facts.h"
#include "cuda/portable/config.h"
#include "cuda/portable/whole_rows.h"

namespace wh::cuda {
namespace {

// By 16 bytes, or where one of K and V is quantised by four columns.
bool is_whole(const KvTensor& tensor, bool is_by_columns) {
  if (tensor.format != Quantised::kNone) return is_whole_words(tensor);
  const size_t bytes = is_by_columns ? 4 * dtype_bytes(tensor.dtype) : 16;
  return portable::is_whole(tensor.data, tensor.stride, tensor.dim, tensor.dtype, bytes);
}

PortableArgs portable_args(const Problem& p, const Tensors& t, const PackedShape& shape,
                           const PortableVariant& variant) {
  PortableArgs args{};
  args.attention = attention_args(p, t);
  args.q = t.q;
  args.k = t.k;
  std::copy_n(p.stride_q.begin(), 4, args.stride_q);
  std::copy_n(p.stride_k.begin(), 4, args.stride_k);
  args.stored_k = keys_of(p, t);
  args.stored_v = values_of(p, t);
  args.dtype_q = p.dtype_q;
  args.dtype_out = p.dtype_out();
  args.scores = scores_of(p);
  const Dtype dtype = p.dtype_q;
  args.q_is_whole = portable::is_whole(t.q, p.stride_q, p.dim_qk, dtype, 16);
  args.k_is_whole = is_whole(args.stored_k, is_quantised(p));
  args.v_is_whole = is_whole(args.stored_v, is_quantised(p));
  args.out_is_whole =
      portable::is_whole(t.out, p.stride_out, p.dim_v, dtype, 2 * dtype_bytes(dtype));
  // On the CUDA cores a team's keys are found one by one.
  args.pages_cut_tiles = p.key_layout == KeyLayout::kPaged &&
                         (variant.cores == Cores::kCuda || p.page_size % variant.keys != 0);
  args.rows = PackedRows(p, shape);
  args.partials = Partials::at(t.workspace, p, static_cast<int32_t>(shape.splits));
  return args;
}

}  // namespace

Status run_portable(const Launch& launch) {
  const Problem& p = launch.problem;
  const PortableVariant* variant =
      portable_variant(p, launch.config, cuda_facts(p.device_index).shared_bytes);
  if (variant == nullptr) return invalid("the plan's tile fits no variant of cuda_portable");
  const PackedShape shape(p, launch.config);
  if (shape.items == 0) return {};
  PortableArgs args = portable_args(p, launch.tensors, shape, *variant);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return run_in_steps(launch, shape.blocks, [&](int64_t first, int64_t end) -> Status {
    args.last_item = static_cast<int32_t>(shape.blocks - 1 - first);
    void* parameters[] = {&args};
    Status status = launch_kernel({.function = variant->function(args.pages_cut_tiles),
                                   .blocks = static_cast<int>(end - first),
                                   .threads = variant->threads,
                                   .shared_bytes = variant->shared_bytes,
                                   .parameters = parameters,
                                   .stream = stream});
    if (!status.ok() || shape.splits == 1 || end < shape.blocks) return status;
    return launch_combine(args.attention, p.dtype_out(), args.partials, stream);
  });
}

}  // namespace wh::cuda
