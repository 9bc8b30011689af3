// cuBLASLt, found at run time: a machine without it loses this route and nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "core/problem.h"
#include "core/status.h"

namespace wh::cuda {

// Why it cannot be used; empty: it can.
std::string cublas_lt_unavailable();

// Sets it up on the current device, on the first call there. An error while `stream` is captured.
Status start_cublas_lt(cudaStream_t stream);

// Column-major c[m, n] = op(a) b for `batch` matrices, sums in f32, no TF32. a is [k, m] when
// transposed, else [m, k]; b is [k, n]. Strides between matrices in elements.
struct Gemm {
  Dtype dtype;  // of a and b; c is f32
  bool transpose_a;
  int64_t m, n, k;
  const void* a;
  int64_t lda, stride_a;
  const void* b;
  int64_t ldb, stride_b;
  float* c;
  int64_t ldc, stride_c;
  int64_t batch;
};
Status run_gemm(const Gemm& gemm, void* workspace, size_t workspace_bytes, cudaStream_t stream);

}  // namespace wh::cuda
