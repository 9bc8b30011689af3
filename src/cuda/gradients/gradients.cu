// What is left of the gradients once the products are made.
//
// Schedule: sinks take a block a head, whose threads add rows in an order that the shape gives.
// The two of restoring take a row of dq, or of dk and dv, a block at a time; without anything to
// restore each is one read of a flag.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/element.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/scores.cuh"
#include "cuda/gradients/gradients.h"
#include "cuda/gradients/items.h"

namespace wh::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    sink_gradients(const GradientArgs args, const float* of_rows) {
  __shared__ float s_sums[kThreads];
  const AttentionArgs& a = args.attention;
  float sum = 0;
  for (int32_t b = 0; b < args.attention.batch; ++b) {
    const Sequence sequence = sequence_at(a, b);
    for (int32_t query = threadIdx.x; query < sequence.len_q; query += kThreads) {
      sum += of_rows[row_number(a, sequence, blockIdx.x, query)];
    }
  }
  s_sums[threadIdx.x] = sum;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) s_sums[threadIdx.x] += s_sums[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) args.d_sinks[blockIdx.x] = s_sums[0];
}

template <typename T>
__device__ __forceinline__ const T* row_of(const void* data, const int64_t (&stride)[4],
                                           int32_t batch_idx, int32_t head, int32_t index) {
  return static_cast<const T*>(data) + batch_idx * stride[0] + head * stride[1] + index * stride[2];
}
template <typename T>
__device__ __forceinline__ T* row_of(void* data, const int64_t (&stride)[4], int32_t batch_idx,
                                     int32_t head, int32_t index) {
  return const_cast<T*>(row_of<T>(static_cast<const void*>(data), stride, batch_idx, head, index));
}

template <typename T>
__device__ __forceinline__ bool is_special(T value) {
  return !(fabsf(static_cast<float>(value)) < INFINITY);
}

// One query of one head beside one key.
template <typename T>
__device__ __forceinline__ bool sees(const AttentionArgs& a, const ScoreRow& row, int32_t key) {
  return static_cast<uint32_t>(key - row.first_key) < row.key_count &&
         mask_bias<T>(a, row, key) != -INFINITY;
}
__device__ __forceinline__ bool is_empty(const AttentionArgs& a, const Sequence& sequence,
                                         int32_t head, int32_t query) {
  return a.log_sum_exp[row_number(a, sequence, head, query)] == kEmptyRowLogSumExp;
}

template <typename T>
__device__ __forceinline__ void restore_dq(const GradientArgs& args, const Sequence& sequence,
                                           int32_t head, int32_t query) {
  const AttentionArgs& a = args.attention;
  if (is_empty(a, sequence, head, query)) return;
  const ScoreRow row = score_row(a, sequence, head, query);
  T* dq =
      row_of<T>(args.dq, args.stride_dq, sequence.query_batch, head, sequence.first_query + query);
#pragma unroll 1
  for (uint32_t i = 0; i < row.key_count; ++i) {
    const auto key = static_cast<int32_t>(row.first_key + i);
    if (!sees<T>(a, row, key)) continue;
    const T* k = row_of<T>(args.k, args.stride_k, sequence.key_batch, head / a.group,
                           sequence.first_key + key);
#pragma unroll 1
    for (int32_t d = threadIdx.x; d < a.dim_qk; d += kThreads) {
      if (is_special(k[d * args.stride_k[3]])) dq[d * args.stride_dq[3]] = T(NAN);
    }
  }
}

template <typename T>
__device__ __forceinline__ void restore_dk_dv(const GradientArgs& args, const Sequence& sequence,
                                              int32_t head_kv, int32_t key) {
  const AttentionArgs& a = args.attention;
  const int32_t batch_idx = sequence.key_batch, token = sequence.first_key + key;
  T* dk = row_of<T>(args.dk, args.stride_dk, batch_idx, head_kv, token);
  T* dv = args.dv == nullptr ? dk : row_of<T>(args.dv, args.stride_dv, batch_idx, head_kv, token);
  const int64_t stride_dv = args.dv == nullptr ? args.stride_dk[3] : args.stride_dv[3];
#pragma unroll 1
  for (int32_t head = head_kv * a.group; head < (head_kv + 1) * a.group; ++head) {
#pragma unroll 1
    for (int32_t query = 0; query < sequence.len_q; ++query) {
      const ScoreRow row = score_row(a, sequence, head, query);
      if (!sees<T>(a, row, key) || is_empty(a, sequence, head, query)) continue;
      const int32_t of_q = sequence.query_batch, token_q = sequence.first_query + query;
      const T* q = row_of<T>(args.q, args.stride_q, of_q, head, token_q);
      const T* d_out = row_of<T>(args.d_out, args.stride_d_out, of_q, head, token_q);
#pragma unroll 1
      for (int32_t d = threadIdx.x; d < a.dim_qk; d += kThreads) {
        if (is_special(q[d * args.stride_q[3]])) dk[d * args.stride_dk[3]] = T(NAN);
      }
#pragma unroll 1
      for (int32_t d = threadIdx.x; d < a.dim_v; d += kThreads) {
        const T value = d_out[d * args.stride_d_out[3]];
        T& sum = dv[d * stride_dv];
        if (is_special(value)) sum = T(static_cast<float>(sum) + static_cast<float>(value));
      }
    }
  }
}

// Heads by heads: the blocks share their rows, so that few heads keep all of them busy. One kernel
// for both would spill; so would f32's for keys, left to save registers for five blocks.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    restore_queries(const GradientArgs args, const int32_t* dropped) {
  if (*dropped == 0) return;
  const AttentionArgs& a = args.attention;
#pragma unroll 1
  for (int32_t head = 0; head < args.attention.batch * a.heads_q; ++head) {
    const Sequence sequence = sequence_at(a, head / a.heads_q);
#pragma unroll 1
    for (int32_t query = blockIdx.x; query < sequence.len_q; query += gridDim.x) {
      restore_dq<T>(args, sequence, head % a.heads_q, query);
    }
  }
}
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    restore_keys(const GradientArgs args, const int32_t* dropped) {
  if (*dropped == 0) return;
#pragma unroll 1
  for (int32_t head = 0; head < args.attention.batch * args.heads_kv; ++head) {
    const Sequence sequence = sequence_at(args.attention, head / args.heads_kv);
    const int32_t keys = own_keys<int32_t>(args.attention, sequence.batch_idx);
#pragma unroll 1
    for (int32_t key = blockIdx.x; key < keys; key += gridDim.x) {
      restore_dk_dv<T>(args, sequence, head % args.heads_kv, key);
    }
  }
}

using Restore = void (*)(GradientArgs, const int32_t*);
struct Restores {
  Restore queries, keys;
};
template <typename T>
constexpr Restores restores() {
  return {restore_queries<T>, restore_keys<T>};
}
Restores restores_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return restores<float>();
    case Dtype::kF16:
      return restores<__half>();
    case Dtype::kBf16:
      return restores<__nv_bfloat16>();
  }
  __builtin_unreachable();  // validate() knows no other
}

}  // namespace

Status launch_sink_gradients(const GradientArgs& args, const float* of_rows, cudaStream_t stream) {
  GradientArgs args_copy = args;
  void* parameters[] = {&args_copy, &of_rows};
  return launch_kernel({.function = reinterpret_cast<const void*>(&sink_gradients),
                        .blocks = args.attention.heads_q,
                        .threads = kThreads,
                        .shared_bytes = 0,
                        .parameters = parameters,
                        .stream = stream});
}

Status launch_restore(const GradientArgs& args, Dtype dtype, const int32_t* dropped,
                      cudaStream_t stream) {
  constexpr int kMostBlocks = 1024;
  GradientArgs args_copy = args;
  void* parameters[] = {&args_copy, &dropped};
  const Restores restores = restores_of(dtype);
  for (const Restore restore : {restores.queries, restores.keys}) {
    WH_RETURN_IF_ERROR(launch_kernel({.function = reinterpret_cast<const void*>(restore),
                                      .blocks = kMostBlocks,
                                      .threads = kThreads,
                                      .shared_bytes = 0,
                                      .parameters = parameters,
                                      .stream = stream}));
  }
  return {};
}

}  // namespace wh::cuda
