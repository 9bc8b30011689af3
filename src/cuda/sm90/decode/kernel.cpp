#include "cuda/sm90/decode/kernel.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <atomic>

#include "cuda/common/tensor_map.h"
#include "cuda/sm90/decode/config.h"

namespace wh::cuda {
namespace {

Status cuda_status(const char* call, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return {Code::kDeviceError, fmt::format("{}: {}", call, cudaGetErrorString(error))};
}

// Whether every row of a tensor starts at a multiple of `elements` of them.
bool rows_are_aligned(const void* data, const Strides& stride, int64_t elements) {
  const auto is_multiple = [elements](int64_t s) { return s % elements == 0; };
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(elements * 2) == 0 &&
         std::all_of(stride.begin(), stride.begin() + 3, is_multiple);
}

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

DecodeArgs decode_args(const Problem& p, const Tensors& t, const DecodeShape& shape) {
  DecodeArgs args{};
  args.attention = attention_args(p, t);
  args.q = t.q;
  args.k = t.k;
  std::copy_n(p.stride_q.begin(), 3, args.stride_q);
  std::copy_n(p.stride_k.begin(), 3, args.stride_k);
  args.q_is_aligned = rows_are_aligned(t.q, p.stride_q, 8);
  args.out_is_aligned = rows_are_aligned(t.out, p.stride_out, 2);
  args.scores = scores_of(p);
  args.values = values_of(p, t);
  args.k_batch_step = is_step(p.stride_k[0]);
  args.k_head_step = is_step(p.stride_k[1]);
  args.v_batch_step = is_step(p.stride_v[0]);
  args.v_head_step = is_step(p.stride_v[1]);
  args.heads_kv = static_cast<int32_t>(p.heads_kv);
  args.row_tiles = static_cast<int32_t>(shape.row_tiles);
  args.partials = Partials::at(t.workspace, p, static_cast<int32_t>(shape.splits));
  return args;
}

// The dynamic limit of shared memory is a property of a function on a device: set once for each.
cudaError_t allow_shared_memory(const DecodeVariant& variant, const void* instance, Dtype dtype,
                                int32_t device_index) {
  static std::atomic<uint64_t> allowed[2][16];  // a bit for each device below 64
  const auto slot = static_cast<size_t>(&variant - decode_variants().data());
  std::atomic<uint64_t>& devices = allowed[dtype == Dtype::kBf16][slot];
  const uint64_t bit = device_index < 64 ? uint64_t{1} << device_index : 0;
  if ((devices.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(
      instance, cudaFuncAttributeMaxDynamicSharedMemorySize, variant.shared_bytes);
  if (error == cudaSuccess) devices.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

Status check_alignment(const char* name, const void* data) {
  if (reinterpret_cast<uintptr_t>(data) % 16 == 0) return {};
  return invalid(
      fmt::format("{} is {}; sm90_decode needs it aligned to 16 bytes", name, fmt::ptr(data)));
}

}  // namespace

Status run_decode(const Launch& launch) {
  const Problem& p = launch.problem;
  const Tensors& t = launch.tensors;
  const DecodeShape shape(p, launch.config);
  if (shape.items == 0) return {};
  if (Status status = check_alignment("k", t.k); !status.ok()) return status;
  if (Status status = check_alignment("v", t.v); !status.ok()) return status;
  if (Status status = check_alignment("workspace", t.workspace); !status.ok()) return status;

  const DecodeVariant& variant = *decode_variant(p);
  const void* instance =
      p.dtype_q == Dtype::kBf16 ? variant.instance_bf16() : variant.instance_f16();
  DecodeArgs args = decode_args(p, t, shape);
  DecodeMaps maps{};
  if (p.len_k > 0) {
    const Result<CUtensorMap> k = map_of(t.k, p, p.stride_k, p.dim_qk, variant.tile_k);
    if (!k.ok()) return k.status();
    const Result<CUtensorMap> v = map_of(t.v, p, p.stride_v, p.dim_v, variant.tile_k);
    if (!v.ok()) return v.status();
    maps = {*k, *v};
  }

  cudaError_t error = allow_shared_memory(variant, instance, p.dtype_q, p.device_index);
  if (error != cudaSuccess) return cuda_status("cudaFuncSetAttribute", error);
  // Its blocks may start while the kernel in front still runs; they wait before they read.
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(shape.blocks));
  config.blockDim = dim3(static_cast<uint32_t>(variant.threads));
  config.dynamicSmemBytes = static_cast<size_t>(variant.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  void* parameters[] = {&maps, &args};
  error = cudaLaunchKernelExC(&config, instance, parameters);
  if (error != cudaSuccess) return cuda_status("launching sm90_decode", error);
  if (shape.splits == 1) return {};
  return cuda_status("launching combine",
                     launch_combine(args.attention, p.dtype_q, args.partials, config.stream));
}

}  // namespace wh::cuda
