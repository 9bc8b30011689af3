// Merges split keys by log-sum-exp.
//
// Schedule: a block for each row and 128 columns; each of its 8 warps takes every 8th split, a lane
// four columns, and the warps meet once in shared memory. All loads are issued before the first
// use: with one load at a time 66 splits would wait 66 times for L2 (15 us).
//
// Roofline: splits * columns * 4 bytes a row out of L2, which they have just been written to: about
// 1 us for 66 splits of 64 rows of 256; the launch and two trips to L2 are the rest. The launch
// overlaps the kernel in front. The last block of that kernel to finish could merge instead, but
// then as many multiprocessors as there are kv heads would read what here all of them read. Blocks
// small enough to wait beside that kernel's start no earlier: its end is what they wait for.
#include "cuda/combine/combine.h"
#include "cuda/common/launch.h"
#include "cuda/common/online_softmax.cuh"
#include "cuda/common/scores.cuh"
#include "cuda/ptx/sync.cuh"

namespace wh::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kColumns = 128;  // of a block
constexpr int kLoads = 12;     // splits that a lane holds at once
constexpr int kRoundSplits = kWarps * kLoads;
constexpr int kRounds = (kMostSplits + kRoundSplits - 1) / kRoundSplits;
static_assert(kRoundSplits % 32 == 0 && 32 % kWarps == 0);

// Of a warp, by the integer unit's reduction: floats compare as these integers do. NaN with a clear
// sign is the largest of all.
__device__ __forceinline__ float warp_max(float x) {
  const auto ordered = [](int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); };
  return __int_as_float(ordered(__reduce_max_sync(~0u, ordered(__float_as_int(x)))));
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

struct Row {
  int32_t query_batch, head, query_idx;
};
// query_row() of core/sequence.h in 32 bits.
__device__ __forceinline__ Row device_row(const AttentionArgs& args, uint32_t row) {
  const uint32_t heads_q = args.heads_q, len_q = args.len_q;
  if (args.query_offsets != nullptr) {
    const uint32_t token = row / heads_q;
    return {0, static_cast<int32_t>(row - token * heads_q), static_cast<int32_t>(token)};
  }
  const uint32_t head_row = row / len_q;  // query_batch * heads_q + head
  const uint32_t batch_idx = head_row / heads_q;
  return {static_cast<int32_t>(batch_idx), static_cast<int32_t>(head_row - batch_idx * heads_q),
          static_cast<int32_t>(row - head_row * len_q)};
}

constexpr float kUnseen = -1;  // the share of a split that saw nothing

// In units of 2^top.
__device__ __forceinline__ float share_of(RowWeight weight, float top) {
  return weight.sum == 0 ? kUnseen : weight.sum * ptx::exp2_approx(weight.largest - top);
}

// Whether splits may follow the total of keys (sm90/decode/share_rule.h).
__device__ __forceinline__ bool may_have_fewer(const AttentionArgs& args) {
  return args.query_offsets != nullptr || args.key_offsets != nullptr ||
         args.page_table.entries != nullptr;
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
  const auto [query_batch, head, query_idx] = device_row(args, row);
  const int splits = partials.splits;
  ptx::launch_dependents();
  ptx::wait_for_dependency();
  // Of packed queries q has room for more than there are.
  if (args.query_offsets != nullptr && query_idx >= args.query_offsets[args.batch]) return;

  // Lane i knows the weights of splits i, i + 32, ...; they come first, so that they are ready when
  // the rows arrive.
  RowWeight weights[kRounds * kRoundSplits / 32];
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kRounds * kRoundSplits / 32; ++i) {
    const int split = lane + 32 * i;
    weights[i] = {-INFINITY, 0};
    if (split < splits) weights[i] = partials.weights[int64_t{row} * splits + split];
    top = fmaxf(top, weights[i].largest);
  }
  // Where lengths differ most rows have fewer splits than the most of any, and nobody writes the
  // rest: worth the trip to L2 for the weights, since 16 sequences of 2 shares each would be read
  // as if they had 32.
  int32_t written = splits;
  if (may_have_fewer(args)) {
    int32_t end = 0;
#pragma unroll
    for (int i = 0; i < kRounds * kRoundSplits / 32; ++i) {
      if (weights[i].sum != 0) end = lane + 32 * i + 1;
    }
    written = __reduce_max_sync(~0u, end);
  }
  const float* sums = partials.sums + int64_t{row} * partials.columns + column;
  const int64_t split_stride = partials.rows * partials.columns;
  float4 part[kLoads];
  const auto load = [&](int round) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int split = round * kRoundSplits + warp + kWarps * i;
      part[i] = make_float4(0, 0, 0, 0);
      if (split < written && column < partials.columns) {
        part[i] = *reinterpret_cast<const float4*>(sums + split * split_stride);
      }
    }
  };
  load(0);

  const float sink = sink_of(args, head);
  top = warp_max(fmaxf(top, __fmul_rn(sink, kLog2E)));
  float shares[kRounds * kRoundSplits / 32];
  float total = 0;
#pragma unroll
  for (int i = 0; i < kRounds * kRoundSplits / 32; ++i) {
    shares[i] = share_of(weights[i], top);
    if (shares[i] != kUnseen) total += shares[i];
  }
  total =
      warp_sum(total) + (sink == -INFINITY ? 0 : ptx::exp2_approx(exponent_of(sink, kLog2E, top)));

  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    if (round * kRoundSplits >= written) break;
    if (round > 0) load(round);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      constexpr int kWarpsOfLanes = 32 / kWarps;
      const float share = __shfl_sync(~0u, shares[round * kRoundSplits / 32 + i / kWarpsOfLanes],
                                      warp + kWarps * (i % kWarpsOfLanes));
      const bool has_sums = share != kUnseen;  // else they may be anything
      sum.x = fmaf(share, has_sums ? part[i].x : 0, sum.x);
      sum.y = fmaf(share, has_sums ? part[i].y : 0, sum.y);
      sum.z = fmaf(share, has_sums ? part[i].z : 0, sum.z);
      sum.w = fmaf(share, has_sums ? part[i].w : 0, sum.w);
    }
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
  const float factor = is_empty_row(total) ? kEmptyRowOut : ptx::reciprocal_approx(total);
  const float merged[4] = {sum.x * factor, sum.y * factor, sum.z * factor, sum.w * factor};
  T* out = static_cast<T*>(args.out) + query_batch * args.stride_out[0] +
           head * args.stride_out[1] + query_idx * args.stride_out[2] + column * args.stride_out[3];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < args.dim_v) out[i * args.stride_out[3]] = static_cast<T>(merged[i]);
  }
  if (args.log_sum_exp != nullptr && column == 0) {
    args.log_sum_exp[row] = is_empty_row(total) ? kEmptyRowLogSumExp : log_sum_exp({top, total});
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
