#include "cuda/sm90/prefill/kernel.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <array>
#include <iterator>
#include <utility>

#include "cuda/common/launch.h"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/refusal.h"

namespace wh::cuda {
namespace {

constexpr int kDimsCount = static_cast<int>(std::size(kPrefillDims));
constexpr Dtype kDtypes[] = {Dtype::kF16, Dtype::kBf16};
constexpr Scores kScores[] = {Scores::kPlain, Scores::kTransformed, Scores::kMasked};
constexpr int kVariants = 6;  // of each pair of dimensions

// Entry i: dimensions i / 6, type i / 3 % 2, scores i % 3.
template <size_t... kIndex>
constexpr auto instances(std::index_sequence<kIndex...>) {
  using Get = const void* (*)();
  return std::array<Get, sizeof...(kIndex)>{
      &prefill_instance<kPrefillDims[kIndex / kVariants].dim_qk,
                        kPrefillDims[kIndex / kVariants].dim_v, kDtypes[kIndex / 3 % 2],
                        kScores[kIndex % 3]>...};
}
constexpr auto kInstances = instances(std::make_index_sequence<kDimsCount * kVariants>());

Result<CUtensorMap> query_map(const Problem& p, const void* q, const TileOrder& order) {
  return make_tensor_map(
      q, {p.dtype_q,
          5,
          {p.dim_qk, p.group(), p.len_q, p.heads_kv, p.batch},
          {1, p.stride_q[1], p.stride_q[2], p.stride_q[1] * p.group(), p.stride_q[0]},
          {kPanelColumns, order.packed_heads, order.tile_queries, 1, 1}});
}

Result<CUtensorMap> key_map(const Problem& p, const void* data, const Strides& stride, int64_t dim,
                            int tile_k) {
  return make_tensor_map(data, {p.dtype_kv,
                                4,
                                {dim, p.len_k, p.heads_kv, p.batch},
                                {1, stride[2], stride[1], stride[0]},
                                {kPanelColumns, tile_k, 1, 1}});
}

}  // namespace

Status run_prefill(const Launch& launch) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  if (p.batch == 0 || p.len_q == 0) return {};
  if (Status status = check_alignment(p, t); !status.ok()) return status;
  const int dims_index = prefill_dims_index(p);
  const Scores scores = scores_of(p);
  const HeadDims dims = kPrefillDims[dims_index];
  const PrefillTile tile = prefill_tile(dims, scores);
  TileOrder order = prefill_order(p, tile);

  const Result<CUtensorMap> q = query_map(p, t.q, order);
  if (!q.ok()) return q.status();
  PrefillMaps maps{*q, *q, *q};  // without keys, K and V are never read
  if (p.len_k > 0) {
    const Result<CUtensorMap> k = key_map(p, t.k, p.stride_k, p.dim_qk, tile.tile_k);
    if (!k.ok()) return k.status();
    const Result<CUtensorMap> v = key_map(p, t.v, p.stride_v, p.dim_v, tile.tile_k);
    if (!v.ok()) return v.status();
    maps.k = *k;
    maps.v = *v;
  }
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  if (prefill_claims_tiles(p, order, launch.config.threads)) {
    order.next = static_cast<int32_t*>(t.workspace);
    if (Status status =
            cuda_status(cudaMemsetAsync(order.next, 0, sizeof(int32_t), stream), "cudaMemsetAsync");
        !status.ok()) {
      return status;
    }
  }
  AttentionArgs args = attention_args(p, t);
  void* parameters[] = {&maps, &args, &order};
  const int instance =
      dims_index * kVariants + (p.dtype_q == Dtype::kBf16 ? 3 : 0) + static_cast<int>(scores);
  return launch_kernel({.function = kInstances[static_cast<size_t>(instance)](),
                        .blocks = launch.config.threads,
                        .threads = tile.threads(),
                        .shared_bytes = PrefillMemory(dims, tile).bytes,
                        .parameters = parameters,
                        .stream = stream});
}

}  // namespace wh::cuda
