#include "cuda/sm90/tile_launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/steps.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/common/panels.h"
#include "cuda/sm90/query_tiles.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

Result<CUtensorMap> query_map(const Problem& p, const void* q, const TileLaunch& tiles) {
  return make_tensor_map(
      q, {"q",
          p.dtype_q,
          5,
          {p.dim_qk, p.group(), p.len_q, p.heads_kv, p.batch},
          {1, p.stride_q[1], p.stride_q[2], p.stride_q[1] * p.group(), p.stride_q[0]},
          {kPanelColumns, tiles.order.packed_heads, tiles.block_queries, 1, 1}});
}

struct KeyTensor {
  const char* name;
  const void* data;
  const Strides& stride;
  int64_t dim;
};

Result<CUtensorMap> key_map(const Problem& p, const KeyTensor& tensor, int32_t rows) {
  const Strides& stride = tensor.stride;
  return make_tensor_map(tensor.data, {tensor.name,
                                       p.dtype_kv,
                                       4,
                                       {tensor.dim, p.len_k, p.heads_kv, p.batch},
                                       {1, stride[2], stride[1], stride[0]},
                                       {kPanelColumns, rows, 1, 1}});
}

}  // namespace

Status run_tiles(const Launch& launch, const TileLaunch& tiles) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  if (p.batch == 0 || p.len_q == 0) return {};
  if (Status status = check_alignment(p, t); !status.ok()) return status;
  const Result<CUtensorMap> q = query_map(p, t.q, tiles);
  if (!q.ok()) return q.status();
  PrefillMaps maps{*q, *q, *q};  // without keys, K and V are never read
  if (p.len_k > 0) {
    const Result<CUtensorMap> k = key_map(p, {"k", t.k, p.stride_k, p.dim_qk}, tiles.box_keys);
    if (!k.ok()) return k.status();
    const Result<CUtensorMap> v = key_map(p, {"v", t.v, p.stride_v, p.dim_v}, tiles.box_values);
    if (!v.ok()) return v.status();
    maps.k = *k;
    maps.v = *v;
  }
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  AttentionArgs args = attention_args(p, t);
  return run_in_steps(launch, tiles.order.tiles, [&](int64_t first, int64_t end) -> Status {
    TileOrder order = tiles.order;
    order.begin = static_cast<int32_t>(first);
    order.end = static_cast<int32_t>(end);
    if (claims_tiles(p, end - first, tiles.workers)) {
      // One counter for all launches: each is cleared when the one before has ended.
      order.next = static_cast<int32_t*>(t.workspace);
      const Status status = cuda_status(cudaMemsetAsync(order.next, 0, sizeof(*order.next), stream),
                                        "cudaMemsetAsync");
      if (!status.ok()) return status;
    }
    void* parameters[] = {&maps, &args, &order};
    const auto workers = static_cast<int32_t>(std::min<int64_t>(tiles.workers, end - first));
    return launch_kernel({.function = tiles.function,
                          .blocks = workers * tiles.cluster,
                          .threads = tiles.threads,
                          .shared_bytes = tiles.shared_bytes,
                          .cluster = tiles.cluster,
                          .parameters = parameters,
                          .stream = stream});
  });
}

}  // namespace wh::cuda
