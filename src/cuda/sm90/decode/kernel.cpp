#include "cuda/sm90/decode/kernel.h"

#include <algorithm>
#include <bit>

#include "cuda/common/launch.h"
#include "cuda/common/steps.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/common/panels.h"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

// K or V of a variant: how its tiles are read, and the map for that.
struct MappedTensor {
  const char* name;
  const Problem& problem;
  const Strides& stride;
  int64_t dim;          // of the problem
  int64_t variant_dim;  // columns that a tile has room for
  int32_t tile_k;
  int32_t box = box_keys(problem, tile_k);
  int64_t panel_columns = is_quantised(problem) ? 2 * kPanelColumns : kPanelColumns;

  // A box may hold all panels where they are whole and as long as the tile.
  bool is_one_box() const { return dim % panel_columns == 0 && box == tile_k; }
  MapUse use() const {
    return {stride[1] != 0, stride[0] != 0,
            is_one_box() ? 1 : static_cast<int32_t>(variant_dim / panel_columns)};
  }
  Result<CUtensorMap> map(const void* data) const {
    const Problem& p = problem;
    const Storage stored = key_storage(p);
    const int64_t heads = stride[1] != 0 ? p.heads_kv : 1;
    const int64_t batch = stride[0] != 0 ? stored.batch : 1;
    TensorMapShape shape{};
    shape.name = name;
    shape.dtype = p.dtype_kv;
    shape.holds_codes = is_quantised(p);
    shape.rank = 5;
    shape.stride = {1, stride[2], panel_columns, stride[1], stride[0]};
    const auto columns = static_cast<int32_t>(panel_columns);
    if (is_one_box()) {
      shape.extent = {panel_columns, stored.length, dim / panel_columns, heads, batch};
      shape.box = {columns, tile_k, static_cast<int32_t>(variant_dim) / columns, 1, 1};
    } else {
      shape.extent = {dim, stored.length, 1, heads, batch};
      shape.box = {columns, box, 1, 1, 1};
    }
    return make_tensor_map(data, shape);
  }
};

// Absorbed latent attention hands in the same memory twice. The planner counts that where the
// problem says so; the kernel sees it anyway.
Values place_of_values(const Problem& p, const Tensors& t) {
  const bool is_prefix =
      !is_quantised(p) && t.v == t.k && p.dim_v <= p.dim_qk && p.stride_v == p.stride_k;
  return is_prefix ? Values::kInKeys : Values::kOwn;
}

DecodeArgs decode_args(const Problem& p, const Tensors& t, const Config& config) {
  const PackedShape shape(p, config);
  DecodeArgs args{};
  args.attention = attention_args(p, t);
  args.q = t.q;
  args.k = t.k;
  std::copy_n(p.stride_q.begin(), 3, args.stride_q);
  std::copy_n(p.stride_k.begin(), 3, args.stride_k);
  args.scores = scores_of(p);
  args.values = place_of_values(p, t);
  args.fresh_keys = static_cast<int32_t>(std::min(config.fresh_keys, p.len_k));
  args.rows = PackedRows(p, shape);
  args.shares = share_rule(p, config);
  args.stored_k = keys_of(p, t);
  args.stored_v = wh::values_of(p, t);
  args.partials = Partials::at(t.workspace, p, static_cast<int32_t>(shape.splits));
  return args;
}

}  // namespace

Status run_decode(const Launch& launch) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  const PackedShape shape(p, launch.config);
  if (shape.items == 0) return {};
  if (Status status = check_alignment(p, t); !status.ok()) return status;
  const DecodeVariant& variant = decode_variant(launch.config);
  const HeadDims dims = variant.instance.dims;
  const MappedTensor k{"k", p, p.stride_k, p.dim_qk, dims.dim_qk, variant.tile_k};
  const MappedTensor v{"v", p, p.stride_v, p.dim_v, dims.dim_v, variant.tile_k};
  DecodeArgs args = decode_args(p, t, launch.config);
  args.use_k = k.use();
  args.use_v = v.use();
  args.box_keys_log2 = std::countr_zero(static_cast<uint32_t>(k.box));
  DecodeMaps maps{};
  const Storage keys = key_storage(p);
  if (keys.batch * keys.length == 0) args.attention.len_k = 0;  // whatever lengths say
  if (args.attention.len_k > 0) {
    const Result<CUtensorMap> map_k = k.map(t.k);
    if (!map_k.ok()) return map_k.status();
    const Result<CUtensorMap> map_v = v.map(t.v);
    if (!map_v.ok()) return map_v.status();
    maps = {*map_k, *map_v};
  }
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  // One launch: its blocks end together, and the merge waits for the kernel right in front of it.
  return run_in_steps(launch, 1, [&](int64_t, int64_t) -> Status {
    void* parameters[] = {&maps, &args};
    const bool is_balanced = args.shares.wave_shares > 0;
    const int64_t blocks =
        is_balanced ? p.heads_kv * args.shares.most_shares(args.attention.batch) : shape.blocks;
    Status status =
        launch_kernel({.function = variant.functions[static_cast<size_t>(layouts_of(p))](),
                       .blocks = static_cast<int>(blocks),
                       .threads = variant.threads,
                       .shared_bytes = variant.shared_bytes,
                       .overlaps_front = true,
                       .parameters = parameters,
                       .stream = stream});
    if (!status.ok() || shape.splits == 1) return status;
    return launch_combine(args.attention, p.dtype_out(), args.partials, stream);
  });
}

}  // namespace wh::cuda
