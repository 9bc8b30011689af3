// Merges split keys by log-sum-exp.
//
// Schedule: a block for each row and 128 columns; each of its 4 warps takes every 4th split, a lane
// four columns, and the warps meet once in shared memory. All loads are issued before the first
// use: with one load at a time 66 splits would wait 66 times for L2 (15 us).
//
// Roofline: splits * columns * 4 bytes a row out of L2, which they have just been written to: about
// 1 us for 66 splits of 64 rows of 256; the launch and two trips to L2 are the rest. The launch
// overlaps the kernel in front, and its blocks wait beside that kernel's: sm90_decode leaves 2.9 KB
// of shared memory, of which the system takes 1 KB a block. So the merge uses less than 1.9 KB and
// asks for the same division of L1 and shared memory. The last block of the kernel in front could
// merge instead, but then as many multiprocessors as there are kv heads would read what here all of
// them read.
#include "cuda/combine/combine.h"
#include "cuda/common/launch.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kColumns = 128;  // of a block
constexpr int kLoads = 17;     // splits a lane holds at once
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
  __shared__ __align__(16) float s_sums[kWarps - 1][kColumns];  // of all warps but the first
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column_blocks = (args.dim_v + kColumns - 1) / kColumns;
  const uint32_t row = blockIdx.x / column_blocks;
  const int column_block = (blockIdx.x - row * column_blocks) * kColumns;
  const int column = column_block + lane * 4;
  const uint32_t head_row = row / args.len_q;  // batch_idx * heads_q + head
  const uint32_t query_idx = row - head_row * args.len_q;
  const uint32_t batch_idx = head_row / args.heads_q;
  const uint32_t head = head_row - batch_idx * args.heads_q;
  const int splits = partials.splits;
  ptx::launch_dependents();
  ptx::wait_for_dependency();

  const float* log_sums = partials.log_sum_exp + row;
  const float* sums = partials.sums + int64_t{row} * partials.columns + column;
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
  if (warp > 0) *reinterpret_cast<float4*>(&s_sums[warp - 1][lane * 4]) = sum;
  __syncthreads();
  if (warp > 0 || column >= args.dim_v) return;
#pragma unroll
  for (int w = 0; w < kWarps - 1; ++w) {
    const float4 other = *reinterpret_cast<const float4*>(&s_sums[w][lane * 4]);
    sum.x += other.x;
    sum.y += other.y;
    sum.z += other.z;
    sum.w += other.w;
  }
  const float factor = total == 0 ? 0 : 1 / total;
  const float merged[4] = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
  T* out = static_cast<T*>(args.out) + batch_idx * args.stride_out[0] + head * args.stride_out[1] +
           query_idx * args.stride_out[2] + column;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < args.dim_v) out[i] = static_cast<T>(merged[i]);
  }
  if (args.log_sum_exp != nullptr && column == 0) {
    args.log_sum_exp[row] = total == 0 ? -INFINITY : top + logf(total);
  }
}

const void* instance(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return reinterpret_cast<const void*>(&combine<float>);
    case Dtype::kF16:
      return reinterpret_cast<const void*>(&combine<__half>);
    case Dtype::kBf16:
      return reinterpret_cast<const void*>(&combine<__nv_bfloat16>);
  }
  return nullptr;
}

}  // namespace

Status launch_combine(const AttentionArgs& args, Dtype dtype, const Partials& partials,
                      cudaStream_t stream) {
  const int64_t column_blocks = (args.dim_v + kColumns - 1) / kColumns;
  AttentionArgs args_copy = args;
  Partials partials_copy = partials;
  void* parameters[] = {&args_copy, &partials_copy};
  return launch_kernel({.function = instance(dtype),
                        .blocks = static_cast<int>(partials.rows * column_blocks),
                        .threads = kWarps * 32,
                        .shared_bytes = 0,
                        .overlaps_front = true,
                        .parameters = parameters,
                        .stream = stream});
}

}  // namespace wh::cuda
