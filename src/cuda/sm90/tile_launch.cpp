#include "cuda/sm90/tile_launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <numeric>

#include "cuda/common/launch.h"
#include "cuda/common/steps.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/common/panels.h"
#include "cuda/sm90/query_tiles.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

Result<CUtensorMap> query_map(const Problem& p, const void* q, const TileLaunch& tiles) {
  const Storage stored = query_storage(p);
  return make_tensor_map(
      q, {.name = "q",
          .dtype = p.dtype_q,
          .rank = 5,
          .extent = {p.dim_qk, p.group(), stored.length, p.heads_kv, stored.batch},
          .stride = {1, p.stride_q[1], p.stride_q[2], p.stride_q[1] * p.group(), p.stride_q[0]},
          .box = {kPanelColumns, tiles.order.packed_heads, tiles.block_queries, 1, 1}});
}

struct KeyTensor {
  const char* name;
  const void* data;
  const Strides& stride;
  int64_t dim;
};

Result<CUtensorMap> key_map(const Problem& p, const KeyTensor& tensor, int32_t rows) {
  const Strides& stride = tensor.stride;
  const Storage stored = key_storage(p);
  const int32_t columns = is_quantised(p) ? 2 * kPanelColumns : kPanelColumns;
  return make_tensor_map(tensor.data,
                         {.name = tensor.name,
                          .dtype = p.dtype_kv,
                          .rank = 4,
                          .extent = {tensor.dim, stored.length, p.heads_kv, stored.batch},
                          .stride = {1, stride[2], stride[1], stride[0]},
                          .box = {columns, rows, 1, 1},
                          .holds_codes = is_quantised(p)});
}

}  // namespace

Status run_tiles(const Launch& launch, const TileLaunch& tiles) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  if (tiles.order.tiles == 0) return {};
  if (Status status = check_alignment(p, t); !status.ok()) return status;
  const Result<CUtensorMap> q = query_map(p, t.q, tiles);
  if (!q.ok()) return q.status();
  AttentionArgs args = attention_args(p, t);
  const Storage keys = key_storage(p);
  if (keys.batch * keys.length == 0) args.len_k = 0;  // whatever lengths say
  // One size for K and V.
  const int32_t paged_box = box_keys(p, std::gcd(tiles.box_keys, tiles.box_values));
  const bool is_paged = p.key_layout == KeyLayout::kPaged;
  // Without keys, K and V are never read.
  PrefillMaps maps{*q, *q, *q, std::countr_zero(static_cast<uint32_t>(paged_box))};
  if (args.len_k > 0) {
    const Result<CUtensorMap> k =
        key_map(p, {"k", t.k, p.stride_k, p.dim_qk}, is_paged ? paged_box : tiles.box_keys);
    if (!k.ok()) return k.status();
    const Result<CUtensorMap> v =
        key_map(p, {"v", t.v, p.stride_v, p.dim_v}, is_paged ? paged_box : tiles.box_values);
    if (!v.ok()) return v.status();
    maps.k = *k;
    maps.v = *v;
  }
  StoredTensors stored{keys_of(p, t), values_of(p, t)};
  const auto stream = static_cast<cudaStream_t>(launch.stream);
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
    // Kernels over elements have three of them.
    void* parameters[] = {&maps, &args, &order, &stored};
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
