#include "cuda/sm90/backward/kernel.h"

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/steps.h"
#include "cuda/common/tensor_map.h"
#include "cuda/cuda_facts.h"
#include "cuda/portable/backward/config.h"
#include "cuda/portable/backward/kernel.h"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/prepare.h"
#include "cuda/sm90/backward/run.h"
#include "cuda/sm90/common/panels.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

// A tensor of either side, as boxes of `rows` rows of 64 columns.
struct SideTensor {
  const char* name;
  const void* data;
  const Strides& stride;
  Storage stored;
  int64_t heads, dim;
};
Result<CUtensorMap> panel_map(const Problem& p, const SideTensor& tensor, int32_t rows) {
  const Strides& stride = tensor.stride;
  return make_tensor_map(tensor.data,
                         {tensor.name,
                          p.dtype_q,
                          4,
                          {tensor.dim, tensor.stored.length, tensor.heads, tensor.stored.batch},
                          {1, stride[2], stride[1], stride[0]},
                          {kPanelColumns, rows, 1, 1}});
}

struct SideTensors {
  SideTensor qk, v;
};
SideTensors tensors_of(Side side, const Problem& p, const Tensors& t) {
  if (side == Side::kQueries) {
    const Storage stored = query_storage(p);
    return {{"q", t.q, p.stride_q, stored, p.heads_q, p.dim_qk},
            {"d_out", t.d_out, p.stride_d_out, stored, p.heads_q, p.dim_v}};
  }
  const Storage stored = key_storage(p);
  return {{"k", t.k, p.stride_k, stored, p.heads_kv, p.dim_qk},
          {"v", t.v, p.stride_v, stored, p.heads_kv, p.dim_v}};
}

// Without rows on the other side its maps are never read.
Result<GradientMaps> gradient_maps(Side side, GradientTile tile, const Problem& p,
                                   const Tensors& t) {
  const Side other = side == Side::kQueries ? Side::kKeys : Side::kQueries;
  const SideTensors own = tensors_of(side, p, t), past = tensors_of(other, p, t);
  const Result<CUtensorMap> own_qk = panel_map(p, own.qk, tile.rows);
  if (!own_qk.ok()) return own_qk.status();
  const Result<CUtensorMap> own_v = panel_map(p, own.v, tile.rows);
  if (!own_v.ok()) return own_v.status();
  GradientMaps maps{*own_qk, *own_v, *own_qk, *own_v};
  if (past.qk.stored.length == 0) return maps;
  const Result<CUtensorMap> qk = panel_map(p, past.qk, tile.columns);
  if (!qk.ok()) return qk.status();
  const Result<CUtensorMap> v = panel_map(p, past.v, tile.columns);
  if (!v.ok()) return v.status();
  maps.qk = *qk;
  maps.v = *v;
  return maps;
}

Status check_gradient_alignment(const Problem& p, const Tensors& t) {
  WH_RETURN_IF_ERROR(check_alignment(p, t));
  if (query_storage(p).length > 0) {
    WH_RETURN_IF_ERROR(check_alignment("d_out", t.d_out, 16));
    WH_RETURN_IF_ERROR(check_alignment("dq", t.dq, 8));
  }
  if (key_storage(p).length == 0) return {};
  WH_RETURN_IF_ERROR(check_alignment("dk", t.dk, 8));
  return check_alignment("dv", t.dv, 8);
}

}  // namespace

Status launch_gradients(const Launch& launch, GradientBlockArgs args, const GradientRange& range,
                        const GradientLaunch& of) {
  Result<GradientMaps> maps = gradient_maps(range.side, of.tile, launch.problem, launch.tensors);
  if (!maps.ok()) return maps.status();
  args.tiles = static_cast<int32_t>(range.tiles);
  args.first_item = static_cast<int32_t>(range.first);
  void* parameters[] = {&*maps, &args};
  return launch_kernel({.function = of.function,
                        .blocks = static_cast<int>(range.end - range.first) * of.cluster,
                        .threads = kGradientThreads,
                        .shared_bytes = of.shared_bytes,
                        .cluster = of.cluster,
                        .parameters = parameters,
                        .stream = static_cast<cudaStream_t>(launch.stream)});
}

Status run_gradients(const Launch& launch, const BackwardBlocks& blocks,
                     const LaunchRange& launch_range) {
  const Problem& p = launch.problem;
  const PortableBackwardVariant* careful = portable_backward_variant(p, cuda_facts(p.device_index));
  if (careful == nullptr)
    return invalid("this build has no cuda_portable_backward for the problem");
  WH_RETURN_IF_ERROR(check_gradient_alignment(p, launch.tensors));
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  Carver carver(launch.tensors.workspace);
  const GradientWorkspace workspace(carver, p);
  for (int32_t* flag : {workspace.rows.dropped, workspace.is_unusual}) {
    WH_RETURN_IF_ERROR(
        cuda_status(cudaMemsetAsync(flag, 0, sizeof(*flag), stream), "cudaMemsetAsync"));
  }
  PortableBackwardArgs careful_args = portable_backward_args(p, launch.tensors, workspace.rows);
  careful_args.only_if = workspace.is_unusual;
  const GradientArgs& gradients = careful_args.gradients;
  const BackwardBlocks again = careful->blocks(p);
  // Without sequences, queries or keys nothing else is written.
  if ((p.batch == 0 || blocks.all() == 0) && p.has_sinks) {
    return launch_sink_gradients(gradients, workspace.rows.d_sink, stream);
  }
  const GradientBlockArgs args{gradients, workspace.rows, 0, 0};
  // Blocks of queries, those of keys, and once more those of cuda_portable_backward, which do
  // nothing but where something is unusual.
  const int64_t all = blocks.all() + again.all();
  return run_in_steps(launch, all, [&](int64_t first, int64_t end) -> Status {
    if (first == 0) {
      WH_RETURN_IF_ERROR(launch_prepare_gradients(gradients, p.dtype_q, workspace.rows,
                                                  workspace.is_unusual, stream));
    }
    const auto within = [&](int64_t begin, int64_t count) {
      return std::pair{std::clamp<int64_t>(first - begin, 0, count),
                       std::clamp<int64_t>(end - begin, 0, count)};
    };
    const auto [first_query, end_query] = within(0, blocks.queries);
    if (first_query < end_query) {
      WH_RETURN_IF_ERROR(
          launch_range(args, {Side::kQueries, blocks.query_tiles, first_query, end_query}));
    }
    const auto [first_key, end_key] = within(blocks.queries, blocks.keys);
    if (first_key < end_key) {
      WH_RETURN_IF_ERROR(launch_range(args, {Side::kKeys, blocks.key_tiles, first_key, end_key}));
    }
    const auto [first_again, end_again] = within(blocks.all(), again.all());
    WH_RETURN_IF_ERROR(
        launch_portable_backward(careful_args, *careful, again, first_again, end_again, stream));
    if (end < all) return {};
    if (p.has_sinks) {
      WH_RETURN_IF_ERROR(launch_sink_gradients(gradients, workspace.rows.d_sink, stream));
    }
    return launch_restore(gradients, p.dtype_q, workspace.rows.dropped, stream);
  });
}

Status run_sm90_backward(const Launch& launch) {
  const Problem& p = launch.problem;
  const GradientVariant& variant = gradient_variant(launch.config);
  const HeadDims dims = variant.instance.dims;
  const auto scores = static_cast<size_t>(scores_of(p));
  return run_gradients(
      launch, variant.blocks(p), [&](const GradientBlockArgs& args, const GradientRange& range) {
        const auto& functions = range.side == Side::kQueries ? variant.queries : variant.keys;
        return launch_gradients(launch, args, range,
                                {.tile = gradient_tile(dims, range.side),
                                 .function = functions[scores](),
                                 .shared_bytes = GradientMemory(dims, range.side).bytes});
      });
}

}  // namespace wh::cuda
