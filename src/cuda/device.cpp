#include "cuda/device.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <map>
#include <mutex>

#include "cuda/common/launch.h"
#include "cuda/cuda_facts.h"
#include "cuda/driver_function.h"

namespace wh {
namespace {

// Dense bf16 flops a clock and multiprocessor, sums in f32: the vendors' datasheets divided by
// multiprocessors and boost clock.
double tensor_flops_per_clock(int32_t compute_capability) {
  if (compute_capability == 90) return 4096;
  if (compute_capability == 100 || compute_capability == 103) return 8192;
  return compute_capability == 80 ? 2048 : 512;
}

int32_t attribute(cudaDeviceAttr which, int32_t index) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, index) == cudaSuccess ? value : 0;
}

std::string version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

CudaFacts detect(int32_t index) {
  CudaFacts facts;
  facts.index = index;
  facts.only_compiled = true;
  int driver = 0, runtime = 0, devices = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    facts.unavailable = "this machine has no NVIDIA driver; install one";
    return facts;
  }
  facts.driver = version_text(driver);
  if (driver / 1000 < runtime / 1000) {
    facts.unavailable =
        fmt::format("the driver supports CUDA {}, this build needs {}; update the driver",
                    facts.driver, version_text(runtime));
    return facts;
  }
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
    facts.unavailable = fmt::format("cudaGetDeviceCount: {}", cudaGetErrorString(error));
    return facts;
  }
  if (index < 0 || index >= devices) {
    facts.unavailable = fmt::format("there is no device {}; this machine has {}", index, devices);
    return facts;
  }
  cudaDeviceProp properties{};
  if (const cudaError_t error = cudaGetDeviceProperties(&properties, index); error != cudaSuccess) {
    facts.unavailable = fmt::format("cudaGetDeviceProperties: {}", cudaGetErrorString(error));
    return facts;
  }
  facts.name = properties.name;
  facts.compute_capability = properties.major * 10 + properties.minor;
  facts.kernels_use = fmt::format("sm_{}", facts.compute_capability);
  facts.sms = properties.multiProcessorCount;
  facts.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  facts.l2_bytes = properties.l2CacheSize;
  const double clock_hz = 1e3 * attribute(cudaDevAttrClockRate, index);
  facts.tensor_tflops =
      tensor_flops_per_clock(facts.compute_capability) * facts.sms * clock_hz * 1e-12;
  // Twice the memory clock (double data rate) times the bus; reads reach about 90 % of it.
  facts.read_gbytes_per_s = 0.9 * 2e3 * attribute(cudaDevAttrMemoryClockRate, index) *
                            attribute(cudaDevAttrGlobalMemoryBusWidth, index) / 8 * 1e-9;
  if (facts.compute_capability < 80) {
    facts.unavailable = fmt::format("{} has compute capability {}.{}; kernels need 8.0 or later",
                                    facts.name, properties.major, properties.minor);
  }
  return facts;
}

// The contexts of streams, which the runtime cannot be asked for. Drivers before 12.5 do not tell
// green contexts, whose streams take launches from the device's own, from others.
class StreamContexts {
 public:
  StreamContexts()
      : of_stream_(cuda::driver_function<decltype(of_stream_)>("cuStreamGetCtx", 12050)),
        current_(cuda::driver_function<decltype(current_)>("cuCtxGetCurrent", 4000)) {}

  bool may_launch_into(void* stream) const {
    CUcontext its = nullptr, current = nullptr;
    CUgreenCtx green = nullptr;
    if (of_stream_ == nullptr || current_ == nullptr ||
        of_stream_(static_cast<CUstream>(stream), &its, &green) != CUDA_SUCCESS ||
        current_(&current) != CUDA_SUCCESS) {
      return true;  // nobody knows; a launch will say
    }
    return green != nullptr || its == current;
  }

 private:
  CUresult (*of_stream_)(CUstream, CUcontext*, CUgreenCtx*);
  CUresult (*current_)(CUcontext*);
};

}  // namespace

const CudaFacts& cuda_facts(int32_t index) {
  static std::mutex mutex;
  static std::map<int32_t, CudaFacts> all;
  const std::lock_guard lock(mutex);
  const auto [entry, is_new] = all.try_emplace(index);
  if (is_new) entry->second = detect(index);
  return entry->second;
}

namespace cuda {

DeviceScope::DeviceScope(int32_t index) noexcept {
  int current = -1;
  error_ = cudaGetDevice(&current);
  if (error_ != cudaSuccess || current == index) return;
  error_ = cudaSetDevice(index);
  if (error_ == cudaSuccess) previous_ = current;
}

Status DeviceScope::status() const {
  return cuda_status(static_cast<cudaError_t>(error_), "cudaSetDevice");
}

DeviceScope::~DeviceScope() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

Status check_pointers(const Problem& p, const Tensors& t) {
  const NamedPointer pointers[] = {{"q", t.q},
                                   {"k", t.k},
                                   {"v", t.v},
                                   {"out", t.out},
                                   {"mask", t.mask},
                                   {"sinks", t.sinks},
                                   {"key_lengths", t.key_lengths},
                                   {"key_starts", t.key_starts},
                                   {"query_offsets", t.query_offsets},
                                   {"key_offsets", t.key_offsets},
                                   {"page_table", t.page_table},
                                   {"scales_k", t.scales_k},
                                   {"scales_v", t.scales_v},
                                   {"page_offsets", t.page_offsets},
                                   {"log_sum_exp", t.log_sum_exp},
                                   {"d_out", t.d_out},
                                   {"dq", t.dq},
                                   {"dk", t.dk},
                                   {"dv", t.dv},
                                   {"d_sinks", t.d_sinks},
                                   {"workspace", t.workspace}};
  return check_pointers(pointers, p.device_index);
}

Status check_pointers(std::span<const NamedPointer> pointers, int32_t device_index) {
  // The runtime's own question takes twice as long, and a run has a dozen pointers.
  static const auto attributes_of =
      driver_function<decltype(&cuPointerGetAttributes)>("cuPointerGetAttributes", 7000);
  if (attributes_of == nullptr) return {Code::kDeviceError, "the driver is older than CUDA 7"};
  for (const NamedPointer& pointer : pointers) {
    if (pointer.data == nullptr) continue;
    // What the driver does not know it leaves at 0.
    CUmemorytype type{};
    int device = 0;
    unsigned is_managed = 0;
    CUpointer_attribute which[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                   CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
                                   CU_POINTER_ATTRIBUTE_IS_MANAGED};
    void* values[] = {&type, &device, &is_managed};
    const CUresult result =
        attributes_of(3, which, values, reinterpret_cast<CUdeviceptr>(pointer.data));
    if (result != CUDA_SUCCESS) {
      return {Code::kDeviceError, fmt::format("cuPointerGetAttributes answered {} for {}",
                                              static_cast<int>(result), pointer.name)};
    }
    if (is_managed != 0) continue;
    if (type != CU_MEMORYTYPE_DEVICE) {
      return invalid(fmt::format("{} is host memory; a cuda:{} problem needs memory of that device",
                                 pointer.name, device_index));
    }
    if (device != device_index) {
      return invalid(fmt::format("{} is memory of cuda:{}; the problem is for cuda:{}",
                                 pointer.name, device, device_index));
    }
  }
  return {};
}

Status check_stream(int32_t index, void* stream) {
  // cudaStreamLegacy and cudaStreamPerThread are 1 and 2.
  if (reinterpret_cast<uintptr_t>(stream) <= 2) return {};
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture);
      error != cudaSuccess) {
    return cuda_status(error, "cudaStreamIsCapturing of run_options.stream");
  }
  // Asking a stream for its device would end its capture, and every launch into it is checked.
  if (capture != cudaStreamCaptureStatusNone) return {};
  const DeviceScope scope(index);
  if (Status status = scope.status(); !status.ok()) return status;
  static const StreamContexts contexts;
  if (contexts.may_launch_into(stream)) return {};
  int device = index;
#if CUDART_VERSION >= 12080  // the runtime could not be asked before
  if (cudaStreamGetDevice(static_cast<cudaStream_t>(stream), &device) != cudaSuccess) {
    cudaGetLastError();  // it is reported here, not at the next launch
    device = index;
  }
#endif
  if (device != index) {
    return invalid(fmt::format(
        "run_options.stream is a stream of cuda:{}; the problem is for cuda:{}", device, index));
  }
  return invalid(
      fmt::format("run_options.stream belongs to another context of cuda:{} than the current one; "
                  "make its context current, or use a stream of this one",
                  device));
}

}  // namespace cuda
}  // namespace wh
