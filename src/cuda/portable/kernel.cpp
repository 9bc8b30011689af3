#include "cuda/portable/kernel.h"

#include <algorithm>

#include "cuda/common/kv_codes.h"
#include "cuda/common/launch.h"
#include "cuda/common/steps.h"
#include "cuda/cuda_facts.h"
#include "cuda/portable/code_args.h"
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

CodeCopy code_copy(const KvTensor& tensor, int threads) {
  CodeCopy copy{};
  copy.data = static_cast<const unsigned char*>(tensor.data);
  const bool is_block = is_block_format(tensor.format);
  for (size_t i = 0; i < 3; ++i) copy.stride[i] = tensor.bytes(tensor.stride[i]);
  copy.stride[3] = is_block ? 1 : tensor.stride[3];
  const auto row_bytes = static_cast<int>(tensor.bytes(tensor.dim));
  const auto takes = [&](int bytes) {
    const auto is_whole = [&](int64_t of) { return of % bytes == 0; };
    return copy.stride[3] == 1 && is_whole(row_bytes) &&
           reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(bytes) == 0 &&
           std::all_of(copy.stride, copy.stride + 3, is_whole);
  };
  copy.piece_bytes = takes(16) ? 16 : takes(8) ? 8 : takes(4) ? 4 : 1;
  const int pieces = row_bytes / copy.piece_bytes;
  copy.pieces = Divisor(pieces);
  copy.row_step = threads / pieces;
  copy.piece_step = threads % pieces;
  if (tensor.scales == Scales::kTokenHead) copy.scales = tensor.scales_data;
  std::copy_n(tensor.stride_scales.begin(), 3, copy.stride_scales);
  return copy;
}

}  // namespace

Status run_portable(const Launch& launch) {
  const Problem& p = launch.problem;
  const PortableVariant* variant =
      portable_variant(p, launch.config, cuda_facts(p.device_index).shared_bytes);
  if (variant == nullptr) return invalid("the plan's tile fits no variant of cuda_portable");
  const PackedShape shape(p, launch.config);
  if (shape.items == 0) return {};
  CodeTileArgs all{};
  PortableArgs& args = all.portable;
  args = portable_args(p, launch.tensors, shape, *variant);
  int shared_bytes = variant->shared_bytes;
  if (variant->reads_code_tiles()) {
    all.layout = code_layout(p, variant->code_tile(), cuda_facts(p.device_index).shared_bytes);
    all.copy[0] = code_copy(args.stored_k, variant->threads);
    all.copy[1] = code_copy(args.stored_v, variant->threads);
    shared_bytes = all.layout.bytes;
  }
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  return run_in_steps(launch, shape.blocks, [&](int64_t first, int64_t end) -> Status {
    args.last_item = static_cast<int32_t>(shape.blocks - 1 - first);
    void* parameters[] = {&all};  // of which others than tiles of codes take the first
    Status status = launch_kernel({.function = variant->function(args.pages_cut_tiles),
                                   .blocks = static_cast<int>(end - first),
                                   .threads = variant->threads,
                                   .shared_bytes = shared_bytes,
                                   .parameters = parameters,
                                   .stream = stream});
    if (!status.ok() || shape.splits == 1 || end < shape.blocks) return status;
    return launch_combine(args.attention, p.dtype_out(), args.partials, stream);
  });
}

}  // namespace wh::cuda
