// Merges outputs that a program holds by their log-sum-exps: wh_merge() on a device.
//
// Schedule: a warp for each row. Its lanes read the parts' log-sum-exps and leave each part's share
// in shared memory; then a lane takes four columns of every part, in the order of the parts, until
// the row is written. A row is read whole by the warp that writes it, so out may be a part's.
//
// Roofline: (parts + 1) * columns * bytes a row through memory, once.
#include <algorithm>
#include <string>
#include <vector>

#include "core/carver.h"
#include "core/score_rules.h"
#include "cuda/allocate.h"
#include "cuda/combine/merge.h"
#include "cuda/common/element.cuh"
#include "cuda/common/launch.h"
#include "cuda/cuda_facts.h"
#include "cuda/device.h"

namespace wh::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMostParts = 32;  // of a launch: all parameters may take 4 KB

struct MergeArgs {
  struct Tensor {
    void* out;
    float* log_sum_exp;
    int64_t stride_out[4], stride_log_sum_exp[3];
    Dtype dtype;
    bool is_packed;  // rows of whole groups of four that one load takes
  };
  int64_t rows;
  int32_t heads, length, dim, parts;
  const float* sinks;
  Tensor merged;
  Tensor part[kMostParts];
};

static_assert(sizeof(MergeArgs) <= 4096);

struct Row {
  int64_t batch_idx, head, query_idx;

  __device__ int64_t offset(const int64_t* strides) const {
    return batch_idx * strides[0] + head * strides[1] + query_idx * strides[2];
  }
};

// Four columns from `column` on, 0 beyond the last.
template <typename T>
__device__ __forceinline__ float4 load4(const MergeArgs::Tensor& tensor, const Row& row, int column,
                                        int dim) {
  const T* from = static_cast<const T*>(tensor.out) + row.offset(tensor.stride_out);
  alignas(4 * sizeof(T)) T values[4];
  if (tensor.is_packed) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(from + column);
    } else {
      *reinterpret_cast<uint2*>(values) = *reinterpret_cast<const uint2*>(from + column);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = column + i < dim ? from[(column + i) * tensor.stride_out[3]] : T(0.0f);
    }
  }
  return make_float4(static_cast<float>(values[0]), static_cast<float>(values[1]),
                     static_cast<float>(values[2]), static_cast<float>(values[3]));
}

template <typename T>
__device__ __forceinline__ void store4(const MergeArgs::Tensor& tensor, const Row& row, int column,
                                       int dim, float4 sum) {
  T* to = static_cast<T*>(tensor.out) + row.offset(tensor.stride_out);
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < dim) to[(column + i) * tensor.stride_out[3]] = static_cast<T>(values[i]);
  }
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__global__ void __launch_bounds__(kWarps * 32) merge_rows(const __grid_constant__ MergeArgs args) {
  __shared__ float s_shares[kWarps][kMostParts];
  float* const shares = s_shares[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; i < args.rows; i += step) {
    const int64_t head_row = i / args.length;
    const Row row{head_row / args.heads, head_row % args.heads, i % args.length};
    // A part counts as one key with its log-sum-exp for a score, and so does the sink.
    const float sink = sink_score(args.sinks, row.head);
    float scores[kMostParts / 32];
    float top = sink;
#pragma unroll
    for (int j = 0; j < kMostParts / 32; ++j) {
      const int part = lane + 32 * j;
      scores[j] = -INFINITY;
      if (part < args.parts) {
        scores[j] = args.part[part].log_sum_exp[row.offset(args.part[part].stride_log_sum_exp)];
      }
      top = fmaxf(top, scores[j]);
    }
    top = warp_max(top);
    const float shift = top == -INFINITY ? 0 : top;
    float total = 0;
#pragma unroll
    for (int j = 0; j < kMostParts / 32; ++j) {
      if (scores[j] != -INFINITY) total += expf(scores[j] - shift);
    }
    total = warp_sum(total) + (sink == -INFINITY ? 0 : expf(sink - shift));
    __syncwarp();  // the row before has read its shares
    // Shares of the whole, not weights: where outputs are as large as floats go, a sum of weighted
    // ones would overflow.
#pragma unroll
    for (int j = 0; j < kMostParts / 32; ++j) {
      const int part = lane + 32 * j;
      if (part < args.parts) {
        shares[part] = scores[j] == -INFINITY ? -INFINITY : expf(scores[j] - shift) / total;
      }
    }
    __syncwarp();
    for (int column = lane * 4; column < args.dim; column += 32 * 4) {
      float4 sum = make_float4(kEmptyRowOut, kEmptyRowOut, kEmptyRowOut, kEmptyRowOut);
#pragma unroll 4
      for (int part = 0; part < args.parts; ++part) {
        const float share = shares[part];
        if (share == -INFINITY) continue;  // it saw none of this row's keys, and may be anything
        const MergeArgs::Tensor& tensor = args.part[part];
        const float4 value = with_type(
            tensor.dtype, [&]<typename T>(T) { return load4<T>(tensor, row, column, args.dim); });
        sum.x = fmaf(share, value.x, sum.x);
        sum.y = fmaf(share, value.y, sum.y);
        sum.z = fmaf(share, value.z, sum.z);
        sum.w = fmaf(share, value.w, sum.w);
      }
      with_type(args.merged.dtype,
                [&]<typename T>(T) { store4<T>(args.merged, row, column, args.dim, sum); });
    }
    if (lane == 0 && args.merged.log_sum_exp != nullptr) {
      args.merged.log_sum_exp[row.offset(args.merged.stride_log_sum_exp)] =
          is_empty_row(total) ? kEmptyRowLogSumExp : top + logf(total);
    }
  }
}

MergeArgs::Tensor tensor_of(const void* out, const float* log_sum_exp, Dtype dtype,
                            const Strides& strides, const std::array<int64_t, 3>& lse_strides,
                            int64_t dim) {
  MergeArgs::Tensor tensor{};
  tensor.out = const_cast<void*>(out);
  tensor.log_sum_exp = const_cast<float*>(log_sum_exp);
  std::copy(strides.begin(), strides.end(), tensor.stride_out);
  std::copy(lse_strides.begin(), lse_strides.end(), tensor.stride_log_sum_exp);
  tensor.dtype = dtype;
  const auto is_whole = [](int64_t elements) { return elements % 4 == 0; };
  tensor.is_packed = strides[3] == 1 && is_whole(dim) && is_whole(strides[0]) &&
                     is_whole(strides[1]) && is_whole(strides[2]) &&
                     reinterpret_cast<uintptr_t>(out) % (4 * dtype_bytes(dtype)) == 0;
  return tensor;
}

Status launch(const OutputMerge& merge, cudaStream_t stream) {
  const auto& extents = merge.extents;
  MergeArgs args{};
  args.rows = merge.rows();
  args.heads = static_cast<int32_t>(extents[1]);
  args.length = static_cast<int32_t>(extents[2]);
  args.dim = static_cast<int32_t>(extents[3]);
  args.parts = static_cast<int32_t>(merge.parts.size());
  args.sinks = merge.sinks;
  args.merged = tensor_of(merge.out, merge.log_sum_exp, merge.dtype, merge.stride_out,
                          merge.stride_log_sum_exp, extents[3]);
  for (size_t i = 0; i < merge.parts.size(); ++i) {
    const OutputPart& part = merge.parts[i];
    args.part[i] = tensor_of(part.out, part.log_sum_exp, part.dtype, part.stride_out,
                             part.stride_log_sum_exp, extents[3]);
  }
  constexpr int64_t kMostBlocks = 1 << 20;  // the rest is a loop
  void* parameters[] = {&args};
  return launch_kernel(
      {.function = reinterpret_cast<const void*>(&merge_rows),
       .blocks = static_cast<int>(std::min(kMostBlocks, (args.rows + kWarps - 1) / kWarps)),
       .threads = kWarps * 32,
       .shared_bytes = 0,
       .parameters = parameters,
       .stream = stream});
}

// What is merged so far of more parts than a launch takes: the first part of the next launch.
struct SoFar {
  float *out, *log_sum_exp;
  std::array<int64_t, 4> extents;

  OutputPart part() const {
    return {out,
            log_sum_exp,
            Dtype::kF32,
            dense_strides(extents[1], extents[2], extents[3]),
            {extents[1] * extents[2], extents[2], 1}};
  }
  OutputMerge target() const {
    const OutputPart p = part();
    return {extents, p.dtype, out, p.stride_out, log_sum_exp, p.stride_log_sum_exp, nullptr, {}};
  }
};

Status launch_in_rounds(const OutputMerge& merge, const SoFar& so_far, cudaStream_t stream) {
  std::vector<OutputPart> round;
  for (size_t done = 0; done < merge.parts.size();) {
    round.clear();
    if (done > 0) round.push_back(so_far.part());
    while (round.size() < kMostParts && done < merge.parts.size()) {
      round.push_back(merge.parts[done++]);
    }
    OutputMerge one = done < merge.parts.size() ? so_far.target() : merge;
    one.parts = round;
    WH_RETURN_IF_ERROR(launch(one, stream));
  }
  return {};
}

Status merge_in_rounds(const OutputMerge& merge, DeviceStream on) {
  SoFar so_far{nullptr, nullptr, merge.extents};
  const auto carve = [&](void* base) {
    Carver carver(base);
    so_far.out = carver.take<float>(merge.rows() * merge.extents[3]);
    so_far.log_sum_exp = carver.take<float>(merge.rows());
    return carver.bytes();
  };
  const Result<void*> memory = allocate(on, carve(nullptr));
  if (!memory.ok()) return memory.status();
  carve(*memory);
  Status status = launch_in_rounds(merge, so_far, static_cast<cudaStream_t>(on.stream));
  release(on, *memory);
  return status;
}

}  // namespace

Status merge(const OutputMerge& merge, DeviceStream on) {
  if (const std::string& reason = cuda_facts(on.device_index).unavailable; !reason.empty()) {
    return {Code::kRefused, reason};
  }
  const DeviceScope scope(on.device_index);
  WH_RETURN_IF_ERROR(scope.status());
  WH_RETURN_IF_ERROR(check_stream(on.device_index, on.stream));
  for (size_t i = 0; i < merge.parts.size(); ++i) {
    const std::string out = "parts[" + std::to_string(i) + "].out";
    const std::string lse = "parts[" + std::to_string(i) + "].log_sum_exp";
    const NamedPointer of_part[] = {{out.c_str(), merge.parts[i].out},
                                    {lse.c_str(), merge.parts[i].log_sum_exp}};
    WH_RETURN_IF_ERROR(check_pointers(of_part, on.device_index));
  }
  const NamedPointer pointers[] = {
      {"out", merge.out}, {"log_sum_exp", merge.log_sum_exp}, {"sinks", merge.sinks}};
  WH_RETURN_IF_ERROR(check_pointers(pointers, on.device_index));
  if (merge.parts.size() > kMostParts) return merge_in_rounds(merge, on);
  return launch(merge, static_cast<cudaStream_t>(on.stream));
}

}  // namespace wh::cuda
