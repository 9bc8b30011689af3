// The single-precision product of the unfused path: a CBLAS where the build found one.
#pragma once

#include <cstdint>

namespace wh::cpu {

enum class Transpose : uint8_t { kNo, kYes };

struct GemmOperand {
  const float* data;
  int64_t row_stride;
};

// c[m][n] = alpha * a[m][k] * b, with b as [k][n], or as [n][k] when transposed.
void gemm(int64_t m, int64_t n, int64_t k, float alpha, GemmOperand a, GemmOperand b,
          Transpose transpose_b, float* c, int64_t c_row_stride);

bool gemm_uses_cblas();

// Limits the library's own threads while it lives, where the CBLAS lets us (OpenBLAS does).
class GemmThreads {
 public:
  explicit GemmThreads(int32_t threads);
  ~GemmThreads();
  GemmThreads(const GemmThreads&) = delete;
  GemmThreads& operator=(const GemmThreads&) = delete;

 private:
  int previous_ = 0;
};

}  // namespace wh::cpu
