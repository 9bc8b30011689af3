#include "cuda/unfused/cublas_lt.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <map>
#include <mutex>
#include <tuple>

#include "cuda/common/launch.h"

namespace wh::cuda {
namespace {

// The functions that are used, from the newest library that the loader finds.
struct Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatrixLayoutSetAttribute) layout_set = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  std::string unavailable;

  Library() {
    const std::string name = fmt::format("libcublasLt.so.{}", CUBLAS_VER_MAJOR);
    void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      unavailable = name + " was not found; install cuBLAS, or put it on the library path";
      return;
    }
    const auto find = [&](auto& function, const char* symbol) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, symbol));
      if (function == nullptr) unavailable = fmt::format("{} has no {}", name, symbol);
    };
    find(create, "cublasLtCreate");
    find(desc_create, "cublasLtMatmulDescCreate");
    find(desc_destroy, "cublasLtMatmulDescDestroy");
    find(desc_set, "cublasLtMatmulDescSetAttribute");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(layout_set, "cublasLtMatrixLayoutSetAttribute");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(matmul, "cublasLtMatmul");
  }
};

const Library& library() {
  static const Library loaded;
  return loaded;
}

Status lt_status(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return {};
  return {Code::kDeviceError, fmt::format("{}: cuBLAS status {}", call, static_cast<int>(status))};
}

cudaDataType_t data_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return CUDA_R_32F;
    case Dtype::kF16:
      return CUDA_R_16F;
    case Dtype::kBf16:
      return CUDA_R_16BF;
  }
  __builtin_unreachable();
}

// Everything about a product but its pointers, with the algorithm that cuBLASLt suggests: asking
// costs 20 us, so it is asked once a shape.
class Matmul {
 public:
  Matmul() = default;
  Matmul(const Matmul&) = delete;
  Matmul& operator=(const Matmul&) = delete;
  ~Matmul() {
    const Library& lt = library();
    for (cublasLtMatrixLayout_t layout : {a_, b_, c_}) {
      if (layout != nullptr) lt.layout_destroy(layout);
    }
    if (desc_ != nullptr) lt.desc_destroy(desc_);
  }

  Status prepare(cublasLtHandle_t handle, const Gemm& gemm, size_t workspace_bytes) {
    const Library& lt = library();
    WH_RETURN_IF_ERROR(lt_status(lt.desc_create(&desc_, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                                 "cublasLtMatmulDescCreate"));
    const cublasOperation_t transpose = gemm.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    WH_RETURN_IF_ERROR(
        lt_status(lt.desc_set(desc_, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose)),
                  "cublasLtMatmulDescSetAttribute"));
    const cudaDataType_t type = data_type(gemm.dtype);
    const int64_t rows_a = gemm.transpose_a ? gemm.k : gemm.m;
    const int64_t columns_a = gemm.transpose_a ? gemm.m : gemm.k;
    WH_RETURN_IF_ERROR(
        make_layout(a_, type, rows_a, columns_a, gemm.lda, gemm.stride_a, gemm.batch));
    WH_RETURN_IF_ERROR(make_layout(b_, type, gemm.k, gemm.n, gemm.ldb, gemm.stride_b, gemm.batch));
    WH_RETURN_IF_ERROR(
        make_layout(c_, CUDA_R_32F, gemm.m, gemm.n, gemm.ldc, gemm.stride_c, gemm.batch));
    cublasLtMatmulPreference_t preference = nullptr;
    WH_RETURN_IF_ERROR(
        lt_status(lt.preference_create(&preference), "cublasLtMatmulPreferenceCreate"));
    lt.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace_bytes,
                      sizeof(workspace_bytes));
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    const cublasStatus_t answer =
        lt.heuristic(handle, desc_, a_, b_, c_, c_, preference, 1, &found, &count);
    lt.preference_destroy(preference);
    WH_RETURN_IF_ERROR(lt_status(answer, "cublasLtMatmulAlgoGetHeuristic"));
    if (count == 0) {
      return {Code::kDeviceError, "cublasLtMatmulAlgoGetHeuristic: no algorithm for this product"};
    }
    algorithm_ = found.algo;
    return {};
  }

  Status run(cublasLtHandle_t handle, const Gemm& gemm, void* workspace, size_t workspace_bytes,
             cudaStream_t stream) const {
    const float one = 1, zero = 0;
    return lt_status(
        library().matmul(handle, desc_, &one, gemm.a, a_, gemm.b, b_, &zero, gemm.c, c_, gemm.c, c_,
                         &algorithm_, workspace, workspace_bytes, stream),
        "cublasLtMatmul");
  }

 private:
  static Status make_layout(cublasLtMatrixLayout_t& layout, cudaDataType_t type, int64_t rows,
                            int64_t columns, int64_t ld, int64_t stride, int64_t batch) {
    const Library& lt = library();
    WH_RETURN_IF_ERROR(lt_status(lt.layout_create(&layout, type, static_cast<uint64_t>(rows),
                                                  static_cast<uint64_t>(columns), ld),
                                 "cublasLtMatrixLayoutCreate"));
    const auto count = static_cast<int32_t>(batch);
    WH_RETURN_IF_ERROR(
        lt_status(lt.layout_set(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count, sizeof(count)),
                  "cublasLtMatrixLayoutSetAttribute"));
    return lt_status(
        lt.layout_set(layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &stride, sizeof(stride)),
        "cublasLtMatrixLayoutSetAttribute");
  }

  cublasLtMatmulDesc_t desc_ = nullptr;
  cublasLtMatrixLayout_t a_ = nullptr, b_ = nullptr, c_ = nullptr;
  cublasLtMatmulAlgo_t algorithm_{};
};

// Handles and prepared products of every device, for the life of the process.
class Products {
 public:
  // The current device's handle, made on the first call.
  Status start(cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    int device = 0;
    return start_locked(stream, device);
  }

  Result<std::pair<cublasLtHandle_t, const Matmul*>> find(const Gemm& g, size_t workspace_bytes,
                                                          cudaStream_t stream) {
    const std::lock_guard lock(mutex_);
    int device = 0;
    WH_RETURN_IF_ERROR(start_locked(stream, device));
    const cublasLtHandle_t handle = handles_[device];
    const Key key{device, g.dtype, g.transpose_a, g.m, g.n, g.k, g.lda, g.ldb, g.batch};
    const auto [entry, is_new] = matmuls_.try_emplace(key);
    if (is_new) {
      if (Status status = entry->second.prepare(handle, g, workspace_bytes); !status.ok()) {
        matmuls_.erase(entry);
        return status;
      }
    }
    return std::pair<cublasLtHandle_t, const Matmul*>(handle, &entry->second);
  }

 private:
  Status start_locked(cudaStream_t stream, int& device) {
    WH_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
    cublasLtHandle_t& handle = handles_[device];
    if (handle != nullptr) return {};
    // It allocates on the device and may wait for it, which would break a capture.
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    WH_RETURN_IF_ERROR(
        cuda_status(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing"));
    if (capture != cudaStreamCaptureStatusNone) {
      return {Code::kDeviceError,
              fmt::format("cublasLtCreate cannot be called while run_options.stream is captured in "
                          "a graph; run cuda_unfused once on cuda:{} before the capture",
                          device)};
    }
    return lt_status(library().create(&handle), "cublasLtCreate");
  }

  using Key = std::tuple<int, Dtype, bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
  std::mutex mutex_;
  std::map<int, cublasLtHandle_t> handles_;
  std::map<Key, Matmul> matmuls_;
};

Products& products() {
  static Products all;
  return all;
}

}  // namespace

std::string cublas_lt_unavailable() { return library().unavailable; }

Status start_cublas_lt(cudaStream_t stream) { return products().start(stream); }

Status run_gemm(const Gemm& gemm, void* workspace, size_t workspace_bytes, cudaStream_t stream) {
  const auto found = products().find(gemm, workspace_bytes, stream);
  if (!found.ok()) return found.status();
  return found->second->run(found->first, gemm, workspace, workspace_bytes, stream);
}

}  // namespace wh::cuda
