// What cuda_unfused runs around its two products: pack, softmax, finish.
//
// Schedule: pack copies a row of q, k or v a warp; softmax and finish take a row a block. All are
// bound by memory: softmax reads a row's scores twice (the second time out of L2) and writes its
// weights once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/launch.h"
#include "cuda/common/scores.cuh"
#include "cuda/unfused/kernel.h"

namespace wh::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A row of a pass, and the query that it is.
struct PassRow {
  int64_t item;  // within the pass
  int32_t batch_idx, head, head_kv, query;
};

// In 32 bits, which hold every row of a pass: 64-bit divisions are calls, and spill.
__device__ PassRow pass_row(const UnfusedPass& pass, uint32_t row) {
  const auto rows = static_cast<uint32_t>(pass.shape.rows);
  const uint32_t item = row / rows, in_item = row % rows;
  const uint32_t first_head = (static_cast<uint32_t>(pass.first) + item) *
                              static_cast<uint32_t>(pass.shape.heads);  // of batch * heads_q
  const uint32_t heads_q = pass.args.heads_q, len_q = pass.args.len_q;
  const uint32_t head = first_head % heads_q + in_item / len_q;
  return {item, static_cast<int32_t>(first_head / heads_q), static_cast<int32_t>(head),
          static_cast<int32_t>(head / pass.args.group), static_cast<int32_t>(in_item % len_q)};
}

template <typename T>
__device__ bool is_special(T value) {
  return !isfinite(static_cast<float>(value));
}

// One row, padded with zeros up to `columns`.
template <typename T, typename W>
__device__ void copy_row(const T* from, int64_t stride, int32_t dim, int32_t columns, bool keep,
                         W* to, int32_t* has_special) {
  bool special = false;
  for (auto d = static_cast<int32_t>(threadIdx.x % 32); d < columns; d += 32) {
    const T value = keep && d < dim ? from[d * stride] : T(0.0f);
    special = special || is_special(value);
    to[d] = static_cast<W>(value);
  }
  if (has_special != nullptr && __any_sync(~0u, special) && threadIdx.x % 32 == 0) {
    *has_special = 1;  // every writer writes the same
  }
}

template <typename T, typename W>
__global__ void __launch_bounds__(kThreads) pack(const UnfusedPass pass, const UnfusedWorkspace w) {
  const UnfusedShape& s = pass.shape;
  const AttentionArgs& a = pass.args;
  const auto rows = static_cast<uint32_t>(pass.count * s.rows);
  const auto item_keys = static_cast<uint32_t>(s.keys);
  const uint32_t all = rows + static_cast<uint32_t>(pass.count) * item_keys;
  for (uint32_t i = blockIdx.x * kWarps + threadIdx.x / 32; i < all; i += gridDim.x * kWarps) {
    if (i < rows) {
      const PassRow row = pass_row(pass, i);
      const T* q = static_cast<const T*>(pass.q) + row.batch_idx * pass.stride_q[0] +
                   row.head * pass.stride_q[1] + row.query * pass.stride_q[2];
      copy_row(q, pass.stride_q[3], a.dim_qk, static_cast<int32_t>(s.columns_qk), true,
               static_cast<W*>(w.q) + i * s.columns_qk, nullptr);
      continue;
    }
    const uint32_t item = (i - rows) / item_keys;
    const auto key = static_cast<int32_t>((i - rows) % item_keys);
    const PassRow row = pass_row(pass, item * static_cast<uint32_t>(s.rows));
    const Keys present = dense_sequence(a, row.batch_idx).present;
    const bool is_present = key >= present.begin && key < present.end;
    const T* k = static_cast<const T*>(pass.k) + row.batch_idx * pass.stride_k[0] +
                 row.head_kv * pass.stride_k[1] + key * pass.stride_k[2];
    const T* v = static_cast<const T*>(a.v) + row.batch_idx * pass.stride_v[0] +
                 row.head_kv * pass.stride_v[1] + key * pass.stride_v[2];
    copy_row(k, pass.stride_k[3], a.dim_qk, static_cast<int32_t>(s.columns_qk), is_present,
             static_cast<W*>(w.k) + (i - rows) * s.columns_qk, nullptr);
    copy_row(v, pass.stride_v[3], a.dim_v, static_cast<int32_t>(s.columns_v), is_present,
             static_cast<W*>(w.v) + (i - rows) * s.columns_v, w.has_special);
  }
}

__device__ float block_max(float x, float* s_parts) {
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(~0u, x, step);
    x = x > other || isnan(x) ? x : other;  // NaN wins: it must reach the output
  }
  if (threadIdx.x % 32 == 0) s_parts[threadIdx.x / 32] = x;
  __syncthreads();
  for (int i = 0; i < kWarps; ++i) x = x > s_parts[i] || isnan(x) ? x : s_parts[i];
  __syncthreads();
  return x;
}

__device__ float block_sum(float x, float* s_parts) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  if (threadIdx.x % 32 == 0) s_parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < kWarps; ++i) x += s_parts[i];
  __syncthreads();
  return x;
}

template <typename T>
__device__ float transformed_score(const AttentionArgs& args, const ScoreRow& mask, int32_t key,
                                   float score) {
  score *= args.scale;
  if (args.softcap > 0) score = args.softcap * tanhf(score / args.softcap);
  const float bias = mask_bias<T>(args, mask, key);
  return bias == -INFINITY ? -INFINITY : score + bias;
}

template <typename T, typename W>
__global__ void __launch_bounds__(kThreads)
    softmax(const UnfusedPass pass, const UnfusedWorkspace w) {
  __shared__ float s_parts[kWarps];
  const AttentionArgs& args = pass.args;
  const PassRow row = pass_row(pass, blockIdx.x);
  const Sequence sequence = dense_sequence(args, row.batch_idx);
  const Keys visible = visible_keys(args, sequence, row.query);
  const ScoreRow mask = score_row(args, sequence, row.head, row.query);
  float* scores = w.s + int64_t{blockIdx.x} * pass.shape.keys;
  W* weights = static_cast<W*>(w.p) + int64_t{blockIdx.x} * pass.shape.keys;
  float m = -INFINITY;
  for (int32_t key = visible.begin + threadIdx.x; key < visible.end; key += kThreads) {
    const float score = transformed_score<T>(args, mask, key, scores[key]);
    scores[key] = score;
    m = m > score || isnan(m) ? m : score;
  }
  m = block_max(m, s_parts);
  const float shift = m == -INFINITY ? 0 : m;
  float l = 0;
  for (int64_t key = threadIdx.x; key < pass.shape.keys; key += kThreads) {
    float weight = 0;
    if (key >= visible.begin && key < visible.end) {
      const float score = scores[key];
      weight = score == -INFINITY ? 0 : expf(score - shift);
    }
    l += weight;
    weights[key] = W(weight);
  }
  l = block_sum(l, s_parts);
  if (threadIdx.x == 0) {
    w.m[blockIdx.x] = m;
    w.l[blockIdx.x] = l;
  }
}

// Where a present V holds an infinity or NaN, a weight of 0 would not hide it: the sums are made
// anew over the keys that the row sees, one by one.
template <typename T, typename W>
__global__ void __launch_bounds__(kThreads)
    sum_one_by_one(const UnfusedPass pass, const UnfusedWorkspace w) {
  if (*w.has_special == 0) return;
  const AttentionArgs& args = pass.args;
  const PassRow row = pass_row(pass, blockIdx.x);
  const Sequence sequence = dense_sequence(args, row.batch_idx);
  const Keys visible = visible_keys(args, sequence, row.query);
  const ScoreRow mask = score_row(args, sequence, row.head, row.query);
  const W* weights = static_cast<const W*>(w.p) + int64_t{blockIdx.x} * pass.shape.keys;
  const W* v = static_cast<const W*>(w.v) + row.item * pass.shape.keys * pass.shape.columns_v;
  float* o = w.o + int64_t{blockIdx.x} * pass.shape.columns_v;
  for (int32_t d = threadIdx.x; d < args.dim_v; d += kThreads) {
    float sum = 0;
    for (int32_t key = visible.begin; key < visible.end; ++key) {
      if (mask_bias<T>(args, mask, key) == -INFINITY) continue;
      sum +=
          static_cast<float>(weights[key]) * static_cast<float>(v[key * pass.shape.columns_v + d]);
    }
    o[d] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish(const UnfusedPass pass, const UnfusedWorkspace w) {
  const AttentionArgs& args = pass.args;
  const PassRow row = pass_row(pass, blockIdx.x);
  float m = w.m[blockIdx.x], l = w.l[blockIdx.x];
  float factor = 1;  // of o: what joining the sink leaves of it
  if (args.sinks != nullptr) {
    const float sink = sink_of(args, row.head);
    const float largest = m > sink || isnan(m) ? m : sink;
    const float shift = largest == -INFINITY ? 0 : largest;
    factor = m == -INFINITY ? 0 : expf(m - shift);
    l = l * factor + (sink == -INFINITY ? 0 : expf(sink - shift));
    m = largest;
  }
  const bool is_empty = is_empty_row(l);
  // Within 2 units in the last place; the exact division is a call, and spills.
  const float scale = is_empty ? 0 : __fdividef(factor, l);
  const float* o = w.o + int64_t{blockIdx.x} * pass.shape.columns_v;
  T* out = static_cast<T*>(args.out) + row.batch_idx * pass.stride_out[0] +
           row.head * pass.stride_out[1] + row.query * pass.stride_out[2];
  for (int32_t d = threadIdx.x; d < args.dim_v; d += kThreads) {
    out[d * pass.stride_out[3]] = T(is_empty ? kEmptyRowOut : o[d] * scale);
  }
  if (args.log_sum_exp != nullptr && threadIdx.x == 0) {
    args.log_sum_exp[(int64_t{row.batch_idx} * args.heads_q + row.head) * args.len_q + row.query] =
        is_empty ? kEmptyRowLogSumExp : m + logf(l);
  }
}

// One of the kernels, by the type of the tensors and of what is packed.
template <template <typename, typename> class Function>
const void* function_of(const UnfusedTypes& types) {
  const bool packs_f32 = types.packed == Dtype::kF32;
  switch (types.tensors) {
    case Dtype::kF32:
      return Function<float, float>::get();
    case Dtype::kF16:
      return packs_f32 ? Function<__half, float>::get() : Function<__half, __half>::get();
    case Dtype::kBf16:
      return packs_f32 ? Function<__nv_bfloat16, float>::get()
                       : Function<__nv_bfloat16, __nv_bfloat16>::get();
  }
  return nullptr;
}

template <template <typename, typename> class Function>
Status launch_rows(const UnfusedPass& pass, const UnfusedWorkspace& w, int64_t blocks,
                   cudaStream_t stream) {
  UnfusedPass pass_copy = pass;
  UnfusedWorkspace w_copy = w;
  void* parameters[] = {&pass_copy, &w_copy};
  return launch_kernel({.function = function_of<Function>(pass.types),
                        .blocks = static_cast<int>(blocks),
                        .threads = kThreads,
                        .shared_bytes = 0,
                        .parameters = parameters,
                        .stream = stream});
}

template <typename T, typename W>
struct Pack {
  static const void* get() { return reinterpret_cast<const void*>(&pack<T, W>); }
};
template <typename T, typename W>
struct Softmax {
  static const void* get() { return reinterpret_cast<const void*>(&softmax<T, W>); }
};
template <typename T, typename W>
struct SumOneByOne {
  static const void* get() { return reinterpret_cast<const void*>(&sum_one_by_one<T, W>); }
};
// Of sums in f32, whatever was packed.
template <typename T, typename>
struct Finish {
  static const void* get() { return reinterpret_cast<const void*>(&finish<T>); }
};

}  // namespace

Status launch_pack(const UnfusedPass& pass, const UnfusedWorkspace& w, cudaStream_t stream) {
  constexpr int64_t kMostBlocks = 4096;
  const int64_t warps = pass.count * (pass.shape.rows + pass.shape.keys);
  const int64_t blocks = (warps + kWarps - 1) / kWarps;
  return launch_rows<Pack>(pass, w, blocks < kMostBlocks ? blocks : kMostBlocks, stream);
}

Status launch_softmax(const UnfusedPass& pass, const UnfusedWorkspace& w, cudaStream_t stream) {
  return launch_rows<Softmax>(pass, w, pass.count * pass.shape.rows, stream);
}

Status launch_finish(const UnfusedPass& pass, const UnfusedWorkspace& w, cudaStream_t stream) {
  if (Status status = launch_rows<SumOneByOne>(pass, w, pass.count * pass.shape.rows, stream);
      !status.ok()) {
    return status;
  }
  return launch_rows<Finish>(pass, w, pass.count * pass.shape.rows, stream);
}

}  // namespace wh::cuda
