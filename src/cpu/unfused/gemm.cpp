#include "cpu/unfused/gemm.h"

#include <mutex>

#if defined(WIDEHEAD_HAS_CBLAS)
#include <cblas.h>
// Weak: any CBLAS links, OpenBLAS also lets us set its thread count.
extern "C" {
__attribute__((weak)) void openblas_set_num_threads(int);
__attribute__((weak)) int openblas_get_num_threads();
}
#endif

namespace wh::cpu {

#if defined(WIDEHEAD_HAS_CBLAS)

void gemm(int64_t m, int64_t n, int64_t k, float alpha, GemmOperand a, GemmOperand b,
          Transpose transpose_b, float* c, int64_t c_row_stride) {
  cblas_sgemm(CblasRowMajor, CblasNoTrans,
              transpose_b == Transpose::kYes ? CblasTrans : CblasNoTrans, static_cast<int>(m),
              static_cast<int>(n), static_cast<int>(k), alpha, a.data,
              static_cast<int>(a.row_stride), b.data, static_cast<int>(b.row_stride), 0.0f, c,
              static_cast<int>(c_row_stride));
}

bool gemm_uses_cblas() { return true; }

namespace {

// Several runs may overlap: the first one in changes the library's setting, the last one out
// restores it.
std::mutex mutex;
int32_t users = 0;
int previous_threads = 0;

bool can_set_threads() {
  return openblas_set_num_threads != nullptr && openblas_get_num_threads != nullptr;
}

}  // namespace

OneGemmThread::OneGemmThread() {
  if (!can_set_threads()) return;
  const std::lock_guard lock(mutex);
  if (users++ > 0) return;
  previous_threads = openblas_get_num_threads();
  if (previous_threads != 1) openblas_set_num_threads(1);
}

OneGemmThread::~OneGemmThread() {
  if (!can_set_threads()) return;
  const std::lock_guard lock(mutex);
  if (--users == 0 && previous_threads != 1) openblas_set_num_threads(previous_threads);
}

#else

// One thread, no blocking: correct everywhere, fast nowhere. The plan says which one runs.
void gemm(int64_t m, int64_t n, int64_t k, float alpha, GemmOperand a, GemmOperand b,
          Transpose transpose_b, float* c, int64_t c_row_stride) {
  for (int64_t i = 0; i < m; ++i) {
    const float* row_a = a.data + i * a.row_stride;
    float* row_c = c + i * c_row_stride;
    if (transpose_b == Transpose::kYes) {
      for (int64_t j = 0; j < n; ++j) {
        float sum = 0;
        for (int64_t d = 0; d < k; ++d) sum += row_a[d] * b.data[j * b.row_stride + d];
        row_c[j] = alpha * sum;
      }
      continue;
    }
    for (int64_t j = 0; j < n; ++j) row_c[j] = 0;
    for (int64_t d = 0; d < k; ++d) {
      for (int64_t j = 0; j < n; ++j) row_c[j] += alpha * row_a[d] * b.data[d * b.row_stride + j];
    }
  }
}

bool gemm_uses_cblas() { return false; }
OneGemmThread::OneGemmThread() = default;
OneGemmThread::~OneGemmThread() = default;

#endif

}  // namespace wh::cpu
