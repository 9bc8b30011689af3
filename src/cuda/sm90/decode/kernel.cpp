#include "cuda/sm90/decode/kernel.h"

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

bool is_step(int64_t stride) { return stride != 0; }

// K or V: one box is a panel of `tile_k` keys.
Result<CUtensorMap> map_of(const void* data, const Problem& p, const Strides& stride, int64_t dim,
                           int32_t tile_k) {
  TensorMapShape shape{};
  shape.dtype = p.dtype_kv;
  shape.rank = 4;
  shape.extent = {dim, p.len_k, is_step(stride[1]) ? p.heads_kv : 1,
                  is_step(stride[0]) ? p.batch : 1};
  shape.stride = {1, stride[2], stride[1], stride[0]};
  shape.box = {kPanelColumns, tile_k, 1, 1};
  return make_tensor_map(data, shape);
}

// Absorbed latent attention hands in the same memory twice.
Values values_of(const Problem& p, const Tensors& t) {
  const bool is_prefix = t.v == t.k && p.dim_v <= p.dim_qk && p.stride_v == p.stride_k;
  return is_prefix ? Values::kInKeys : Values::kOwn;
}

DecodeArgs decode_args(const Problem& p, const Tensors& t, const Config& config) {
  const DecodeShape shape(p, config);
  DecodeArgs args{};
  args.attention = attention_args(p, t);
  args.q = t.q;
  args.k = t.k;
  std::copy_n(p.stride_q.begin(), 3, args.stride_q);
  std::copy_n(p.stride_k.begin(), 3, args.stride_k);
  args.scores = scores_of(p);
  args.values = values_of(p, t);
  args.k_batch_step = is_step(p.stride_k[0]);
  args.k_head_step = is_step(p.stride_k[1]);
  args.v_batch_step = is_step(p.stride_v[0]);
  args.v_head_step = is_step(p.stride_v[1]);
  args.fresh_keys = static_cast<int32_t>(std::min(config.fresh_keys, p.len_k));
  args.group = Divisor(p.group());
  args.heads_kv = Divisor(p.heads_kv);
  args.row_tiles = Divisor(shape.row_tiles);
  args.splits = Divisor(shape.splits);
  args.partials = Partials::at(t.workspace, p, static_cast<int32_t>(shape.splits));
  return args;
}

}  // namespace

Status run_decode(const Launch& launch) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  const DecodeShape shape(p, launch.config);
  if (shape.items == 0) return {};
  if (Status status = check_alignment(p, t); !status.ok()) return status;
  const DecodeVariant& variant = *decode_variant(p);
  DecodeArgs args = decode_args(p, t, launch.config);
  DecodeMaps maps{};
  if (p.len_k > 0) {
    const Result<CUtensorMap> k = map_of(t.k, p, p.stride_k, p.dim_qk, variant.tile_k);
    if (!k.ok()) return k.status();
    const Result<CUtensorMap> v = map_of(t.v, p, p.stride_v, p.dim_v, variant.tile_k);
    if (!v.ok()) return v.status();
    maps = {*k, *v};
  }
  void* parameters[] = {&maps, &args};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  Status status = launch_kernel(
      {.function = p.dtype_q == Dtype::kBf16 ? variant.instance_bf16() : variant.instance_f16(),
       .blocks = static_cast<int>(shape.blocks),
       .threads = variant.threads,
       .shared_bytes = variant.shared_bytes,
       .overlaps_front = true,
       .parameters = parameters,
       .stream = stream});
  if (!status.ok() || shape.splits == 1) return status;
  return launch_combine(args.attention, p.dtype_q, args.partials, stream);
}

}  // namespace wh::cuda
