#include "cuda/common/tensor_map.h"

#include <fmt/format.h>

#include "cuda/driver_function.h"

namespace wh::cuda {
namespace {

CUtensorMapDataType map_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF32:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    case Dtype::kF16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case Dtype::kBf16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  }
  __builtin_unreachable();  // validate() knows no other
}

}  // namespace

std::optional<std::string> tensor_map_refusal(const char* name, const Strides& strides,
                                              int64_t dim) {
  static constexpr const char* kNames[] = {"batch", "head", "length", "dim"};
  constexpr int64_t kElementBytes = 2;
  if (strides[3] != 1) {
    return fmt::format("{} has a {} stride of {}; TMA needs 1", name, kNames[3], strides[3]);
  }
  if (dim % 8 != 0) {
    return fmt::format("{} has a dim of {}; TMA needs a multiple of 8", name, dim);
  }
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = strides[i] * kElementBytes;
    if (bytes % 16 != 0 || bytes >= int64_t{1} << 40) {
      return fmt::format("{} has a {} stride of {} elements; TMA needs a multiple of 8 below 2^39",
                         name, kNames[i], strides[i]);
    }
  }
  return std::nullopt;
}

Result<CUtensorMap> make_tensor_map(const void* data, const TensorMapShape& shape) {
  static const auto encode =
      driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
  if (encode == nullptr) {
    return Status(Code::kDeviceError,
                  "the driver has no cuTensorMapEncodeTiled; it must be 12.0 or newer");
  }
  const CUtensorMapDataType type =
      shape.holds_codes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : map_type(shape.dtype);
  const cuuint64_t element_bytes = shape.holds_codes ? 1 : dtype_bytes(shape.dtype);
  CUtensorMap map;
  cuuint64_t extent[5];
  cuuint64_t stride_bytes[4];
  cuuint32_t box[5];
  constexpr cuuint32_t kSteps[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < shape.rank; ++i) {
    extent[i] = static_cast<cuuint64_t>(shape.extent[i]);
    box[i] = static_cast<cuuint32_t>(shape.box[i]);
    if (i == 0) continue;
    // The stride of a dimension of one is never used, but must be valid.
    stride_bytes[i - 1] =
        shape.extent[i] > 1 ? static_cast<cuuint64_t>(shape.stride[i]) * element_bytes : 16;
  }
  const CUresult result =
      encode(&map, type, static_cast<cuuint32_t>(shape.rank), const_cast<void*>(data), extent,
             stride_bytes, box, kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    return Status(Code::kDeviceError, fmt::format("cuTensorMapEncodeTiled answered {} for {}",
                                                  static_cast<int>(result), shape.name));
  }
  return map;
}

}  // namespace wh::cuda
