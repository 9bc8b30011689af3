#include "support/kernels_under_test.h"

#include "widehead/widehead.h"

namespace wh {

int32_t device_of(const std::string& kernel) { return is_cuda(kernel) ? WH_CUDA : WH_CPU; }

bool takes(const std::string& kernel, int32_t dtype) {
  if (kernel == "cpu_prefill_bf16") return dtype == WH_BF16;
  return dtype != WH_F32 || kernel.rfind("sm90_", 0) != 0;
}

std::vector<int32_t> dtypes_of(const std::string& kernel) {
  std::vector<int32_t> dtypes;
  for (const int32_t dtype : {WH_F32, WH_F16, WH_BF16}) {
    if (takes(kernel, dtype)) dtypes.push_back(dtype);
  }
  return dtypes;
}

}  // namespace wh
