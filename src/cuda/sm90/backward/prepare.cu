// Schedule: a warp takes a row of queries, or a key, at a time, four elements a lane. Reads q, k,
// v, out and d_out once, a hundredth of the time of the products at 8192 keys.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/clean_values.cuh"
#include "cuda/common/launch.h"
#include "cuda/sm90/backward/prepare.h"

namespace wh::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 132 * 8;
constexpr int kLaneElements = 4;

// Beyond it the rounding of a log-sum-exp is more than 3e-5 of its row's weights, a sixteenth of
// what rounding them to f16 takes.
constexpr float kCoarseLogSumExp = 512;

template <typename T>
__device__ __forceinline__ const T* row_at(const void* data, const int64_t (&stride)[4],
                                           int32_t batch_idx, int32_t head, int32_t index) {
  return static_cast<const T*>(data) + batch_idx * stride[0] + head * stride[1] + index * stride[2];
}
template <typename T>
__device__ __forceinline__ uint2 load_four(const T* row, int32_t column) {
  return *reinterpret_cast<const uint2*>(row + column);
}
// Not 0: one of the row's elements is NaN or infinite. Of this lane's.
template <typename T>
__device__ __forceinline__ uint32_t not_finite_in(const T* row, int32_t dim) {
  uint32_t bad = 0;
  for (int32_t d = threadIdx.x % 32 * kLaneElements; d < dim; d += 32 * kLaneElements) {
    const uint2 four = load_four(row, d);
    bad |= not_finite<T>(four.x) | not_finite<T>(four.y);
  }
  return bad;
}

template <typename T>
__device__ __forceinline__ float2 widen(uint32_t pair);
template <>
__device__ __forceinline__ float2 widen<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 widen<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
template <typename T>
__device__ __forceinline__ float dot(uint32_t x, uint32_t y, float sum) {
  const float2 a = widen<T>(x), b = widen<T>(y);
  return fmaf(a.y, b.y, fmaf(a.x, b.x, sum));
}

// A query, or a key, of one head.
struct RowPlace {
  Sequence sequence;
  int32_t head, token;  // index into a tensor's third dimension
};

// The `i`-th of dense tensors, [batch, heads, length], or of packed ones, [tokens, heads]; a token
// of no sequence is outside of that which is given.
__device__ __forceinline__ RowPlace row_place(const AttentionArgs& a, const int32_t* offsets,
                                              int32_t heads, int32_t length, int64_t i) {
  const int64_t all = i / (offsets == nullptr ? length : heads);
  if (offsets == nullptr) {
    const auto all_heads = static_cast<int32_t>(all);
    const int32_t batch_idx = all_heads / heads;
    return {sequence_at(a, batch_idx), all_heads - batch_idx * heads,
            static_cast<int32_t>(i - all * length)};
  }
  const auto token = static_cast<int32_t>(all);
  int32_t batch_idx = 0;
  for (int32_t end = a.batch; end - batch_idx > 1;) {
    const int32_t middle = batch_idx + (end - batch_idx) / 2;
    if (offsets[middle] <= token) {
      batch_idx = middle;
    } else {
      end = middle;
    }
  }
  return {sequence_at(a, batch_idx), static_cast<int32_t>(i - all * heads), token};
}

// Returns whether the row is unusual.
template <typename T>
__device__ __forceinline__ bool prepare_row(const GradientArgs& args, const BackwardRows& rows,
                                            int64_t row) {
  const AttentionArgs& a = args.attention;
  const RowPlace at = row_place(a, a.query_offsets, a.heads_q, a.len_q, row);
  const Sequence& of = at.sequence;
  const int32_t head = at.head, token = at.token;
  if (token < of.first_query || token >= of.first_query + of.len_q) return false;
  const T* out = row_at<T>(a.out, a.stride_out, of.query_batch, head, token);
  const T* d_out = row_at<T>(args.d_out, args.stride_d_out, of.query_batch, head, token);
  uint32_t bad =
      not_finite_in(row_at<T>(args.q, args.stride_q, of.query_batch, head, token), a.dim_qk);
  float delta = 0;
  for (int32_t d = threadIdx.x % 32 * kLaneElements; d < a.dim_v; d += 32 * kLaneElements) {
    const uint2 x = load_four(d_out, d), y = load_four(out, d);
    bad |= not_finite<T>(x.x) | not_finite<T>(x.y);
    delta = dot<T>(x.y, y.y, dot<T>(x.x, y.x, delta));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) delta += __shfl_xor_sync(~0u, delta, step);
  const float log_sum_exp = a.log_sum_exp[row];
  const bool is_empty = log_sum_exp == kEmptyRowLogSumExp;
  if (threadIdx.x % 32 == 0) {
    const float shift = is_empty ? INFINITY : log_sum_exp * kLog2E;
    rows.shift[row] = shift;
    rows.delta[row] = is_empty ? 0.0f : delta;
    if (rows.d_sink != nullptr) {
      const float weight = ptx::exp2_approx(fmaf(sink_of(a, head), kLog2E, -shift));
      rows.d_sink[row] = is_empty ? 0.0f : -weight * delta;
    }
  }
  // NaN compares as false.
  return bad != 0 || !(is_empty || fabsf(log_sum_exp) <= kCoarseLogSumExp);
}

template <typename T>
__device__ __forceinline__ bool is_unusual_key(const GradientArgs& args, int64_t i) {
  const AttentionArgs& a = args.attention;
  const RowPlace at = row_place(a, a.key_offsets, args.heads_kv, a.len_k, i);
  const Sequence& of = at.sequence;
  const int32_t key = at.token - of.first_key;
  if (key < of.present.begin || key >= of.present.end) return false;
  const T* k = row_at<T>(args.k, args.stride_k, of.key_batch, at.head, at.token);
  const T* v = row_at<T>(a.v, a.stride_v, of.key_batch, at.head, at.token);
  return (not_finite_in(k, a.dim_qk) | not_finite_in(v, a.dim_v)) != 0;
}

__device__ __forceinline__ int64_t tokens(const int32_t* offsets, int32_t total, int32_t batch,
                                          int32_t length) {
  return offsets != nullptr ? total : int64_t{batch} * length;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    prepare_gradients(const GradientArgs args, const BackwardRows rows, int32_t* is_unusual) {
  const AttentionArgs& a = args.attention;
  const int64_t queries = tokens(a.query_offsets, a.total_q, a.batch, a.len_q) * a.heads_q;
  const int64_t keys = tokens(a.key_offsets, a.total_k, a.batch, a.len_k) * args.heads_kv;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  bool found = false;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
       i < queries + keys; i += warps) {
    found |= i < queries ? prepare_row<T>(args, rows, i) : is_unusual_key<T>(args, i - queries);
  }
  if (found) *is_unusual = 1;  // every writer writes the same
}

}  // namespace

Status launch_prepare_gradients(const GradientArgs& args, Dtype dtype, const BackwardRows& rows,
                                int32_t* is_unusual, cudaStream_t stream) {
  GradientArgs args_copy = args;
  BackwardRows rows_copy = rows;
  void* parameters[] = {&args_copy, &rows_copy, &is_unusual};
  const void* function = dtype == Dtype::kF16
                             ? reinterpret_cast<const void*>(&prepare_gradients<__half>)
                             : reinterpret_cast<const void*>(&prepare_gradients<__nv_bfloat16>);
  return launch_kernel({.function = function,
                        .blocks = kBlocks,
                        .threads = kThreads,
                        .shared_bytes = 0,
                        .parameters = parameters,
                        .stream = stream});
}

}  // namespace wh::cuda
