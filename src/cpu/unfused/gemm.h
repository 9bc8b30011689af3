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

// While one lives, the CBLAS runs each product on the thread that asks for it (where it lets us:
// OpenBLAS does). We cut products into pieces by shape and hand those to our own threads: with the
// library's own, the bits of a result depend on how many there are.
class OneGemmThread {
 public:
  OneGemmThread();
  ~OneGemmThread();
  OneGemmThread(const OneGemmThread&) = delete;
  OneGemmThread& operator=(const OneGemmThread&) = delete;
};

}  // namespace wh::cpu
