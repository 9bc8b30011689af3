// Merges split keys by log-sum-exp.
//
// Schedule: a block for each row and 128 columns; each of its 8 warps takes every 8th split, a lane
// four columns, and the warps meet once in shared memory. All loads are issued before the first
// use: with one load at a time 66 splits would wait 66 times for L2 (15 us).
//
// Roofline: splits * columns * 4 bytes a row out of L2, which they have just been written to: about
// 1 us for 66 splits of 64 rows of 256; the launch and two trips to L2 are the other 1.5 us. The
// launch overlaps the kernel in front. The last block of that kernel to finish could merge instead,
// but then as many multiprocessors as there are kv heads would read what here all of them read.
#include <algorithm>

#include "cuda/combine/combine.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kColumns = 128;  // of a block
constexpr int kLoads = 9;      // splits a lane holds at once
constexpr int kWarpSplits = (kMostSplits + 31) / 32;

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// A weight; 0 exactly for a split that saw nothing, whatever `top` is.
__device__ __forceinline__ float weight(float log_sum, float top) {
  return log_sum == -INFINITY ? 0.0f : ptx::exp2_approx((log_sum - top) * kLog2E);
}

template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    combine(const AttentionArgs args, const Partials partials) {
  __shared__ __align__(16) float s_sums[kWarps][kColumns];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column_blocks = (args.dim_v + kColumns - 1) / kColumns;
  const int64_t row = blockIdx.x / column_blocks;
  const int column_block = blockIdx.x % column_blocks * kColumns;
  const int column = column_block + lane * 4;
  const int splits = partials.splits;
  ptx::launch_dependents();
  ptx::wait_for_dependency();

  const float* log_sums = partials.log_sum_exp + row;
  const float* sums = partials.sums + row * partials.columns + column;
  const bool has_columns = column < partials.columns;
  float4 part[kLoads];
  float part_log_sum[kLoads];
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t split = first + warp + kWarps * i;
      part[i] = make_float4(0, 0, 0, 0);
      part_log_sum[i] = -INFINITY;
      if (split >= splits || !has_columns) continue;
      part_log_sum[i] = log_sums[split * partials.rows];
      part[i] = *reinterpret_cast<const float4*>(sums + split * partials.rows * partials.columns);
    }
  };
  load(0);

  float all[kWarpSplits];
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kWarpSplits; ++i) {
    const int64_t split = lane + 32 * i;
    all[i] = split < splits ? log_sums[split * partials.rows] : -INFINITY;
    top = fmaxf(top, all[i]);
  }
  const int64_t head_row = row / args.len_q;
  const int head = static_cast<int>(head_row % args.heads_q);
  const float sink = args.sinks == nullptr ? -INFINITY : args.sinks[head];
  top = fmaxf(warp_max(top), sink);
  float total = 0;
#pragma unroll
  for (int i = 0; i < kWarpSplits; ++i) total += weight(all[i], top);
  total = warp_sum(total) + weight(sink, top);

  float4 sum = make_float4(0, 0, 0, 0);
  for (int first = 0;;) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (part_log_sum[i] == -INFINITY) continue;  // its sums may be anything
      const float w = weight(part_log_sum[i], top);
      sum.x = fmaf(w, part[i].x, sum.x);
      sum.y = fmaf(w, part[i].y, sum.y);
      sum.z = fmaf(w, part[i].z, sum.z);
      sum.w = fmaf(w, part[i].w, sum.w);
    }
    first += kLoads * kWarps;
    if (first >= splits) break;
    load(first);
  }
  *reinterpret_cast<float4*>(&s_sums[warp][lane * 4]) = sum;
  __syncthreads();
  const int mine = threadIdx.x;
  if (mine >= kColumns || column_block + mine >= args.dim_v) return;
  float merged = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) merged += s_sums[w][mine];
  merged = total == 0 ? 0 : merged / total;
  const int64_t batch_idx = head_row / args.heads_q;
  const int64_t query_idx = row % args.len_q;
  static_cast<T*>(args.out)[batch_idx * args.stride_out[0] + head * args.stride_out[1] +
                            query_idx * args.stride_out[2] + column_block + mine] =
      static_cast<T>(merged);
  if (args.log_sum_exp != nullptr && column_block + mine == 0) {
    args.log_sum_exp[row] = total == 0 ? -INFINITY : top + logf(total);
  }
}

template <typename T>
cudaError_t launch(const AttentionArgs& args, const Partials& partials, cudaStream_t stream) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const int64_t column_blocks = (args.dim_v + kColumns - 1) / kColumns;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<uint32_t>(partials.rows * column_blocks));
  config.blockDim = dim3(kWarps * 32);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, combine<T>, args, partials);
}

}  // namespace

cudaError_t launch_combine(const AttentionArgs& args, Dtype dtype, const Partials& partials,
                           cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kF32:
      return launch<float>(args, partials, stream);
    case Dtype::kF16:
      return launch<__half>(args, partials, stream);
    case Dtype::kBf16:
      return launch<__nv_bfloat16>(args, partials, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace wh::cuda
