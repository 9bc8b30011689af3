// cuda_unfused: pack, S = Q K^T by cuBLASLt, softmax, O = P V by cuBLASLt, finish; as many heads a
// pass as 256 MB of scores hold.
//
// Roofline: the two products run at cuBLASLt's rate; the scores are written, read twice and written
// again as weights, 12 bytes a pair in 16-bit types, so below dims of about 256 memory bounds it.
#include "cuda/unfused/kernel.h"

#include <algorithm>

#include "cuda/common/launch.h"
#include "cuda/common/steps.h"
#include "cuda/unfused/cublas_lt.h"

namespace wh::cuda {
namespace {

UnfusedPass make_pass(const Launch& launch, const UnfusedShape& shape) {
  const Problem& p = launch.problem;
  UnfusedPass pass{.args = attention_args(p, launch.tensors),
                   .types = UnfusedTypes(p, launch.config),
                   .shape = shape,
                   .first = 0,
                   .count = 0,
                   .stride_q = {},
                   .stride_k = {},
                   .stride_v = {},
                   .stride_out = {},
                   .q = launch.tensors.q,
                   .k = launch.tensors.k};
  std::copy_n(p.stride_q.begin(), 4, pass.stride_q);
  std::copy_n(p.stride_k.begin(), 4, pass.stride_k);
  std::copy_n(p.stride_v.begin(), 4, pass.stride_v);
  std::copy_n(p.stride_out.begin(), 4, pass.stride_out);
  return pass;
}

// Row-major S = Q K^T is column-major S^T = K Q^T.
Gemm score_product(Dtype dtype, const UnfusedShape& s, const UnfusedWorkspace& w, int64_t batch) {
  return {.dtype = dtype,
          .transpose_a = true,
          .m = s.keys,
          .n = s.rows,
          .k = s.columns_qk,
          .a = w.k,
          .lda = s.columns_qk,
          .stride_a = s.keys * s.columns_qk,
          .b = w.q,
          .ldb = s.columns_qk,
          .stride_b = s.rows * s.columns_qk,
          .c = w.s,
          .ldc = s.keys,
          .stride_c = s.rows * s.keys,
          .batch = batch};
}

// Row-major O = P V is column-major O^T = V^T P^T.
Gemm value_product(Dtype dtype, const UnfusedShape& s, const UnfusedWorkspace& w, int64_t batch) {
  return {.dtype = dtype,
          .transpose_a = false,
          .m = s.columns_v,
          .n = s.rows,
          .k = s.keys,
          .a = w.v,
          .lda = s.columns_v,
          .stride_a = s.keys * s.columns_v,
          .b = w.p,
          .ldb = s.keys,
          .stride_b = s.rows * s.keys,
          .c = w.o,
          .ldc = s.columns_v,
          .stride_c = s.rows * s.columns_v,
          .batch = batch};
}

}  // namespace

Status run_unfused(const Launch& launch) {
  const Problem& p = launch.problem;
  const UnfusedShape shape(p);
  const Dtype packed = UnfusedTypes(p, launch.config).packed;
  const UnfusedWorkspace w(launch.tensors.workspace, packed, shape);
  const auto stream = static_cast<cudaStream_t>(launch.stream);
  WH_RETURN_IF_ERROR(start_cublas_lt(stream));  // before anything is on the stream
  UnfusedPass pass = make_pass(launch, shape);
  const auto run_pass = [&](int64_t i) -> Status {
    pass.first = i * shape.items_at_once;
    pass.count = std::min(shape.items_at_once, shape.items - pass.first);
    WH_RETURN_IF_ERROR(cuda_status(
        cudaMemsetAsync(w.has_special, 0, sizeof(*w.has_special), stream), "cudaMemsetAsync"));
    WH_RETURN_IF_ERROR(launch_pack(pass, w, stream));
    WH_RETURN_IF_ERROR(run_gemm(score_product(packed, shape, w, pass.count), w.gemm,
                                UnfusedWorkspace::kGemmBytes, stream));
    WH_RETURN_IF_ERROR(launch_softmax(pass, w, stream));
    WH_RETURN_IF_ERROR(run_gemm(value_product(packed, shape, w, pass.count), w.gemm,
                                UnfusedWorkspace::kGemmBytes, stream));
    return launch_finish(pass, w, stream);
  };
  return run_in_steps(launch, shape.passes(), [&](int64_t first, int64_t end) -> Status {
    for (int64_t i = first; i < end; ++i) WH_RETURN_IF_ERROR(run_pass(i));
    return {};
  });
}

}  // namespace wh::cuda
