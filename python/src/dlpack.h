// The layouts of DLPack 1.x that are read here: https://dmlc.github.io/dlpack/latest/c_api.html
// nanobind's own import goes through the Python method __dlpack__, which takes PyTorch 4 us an
// array; the exchange table of DLPack 1.2 takes 0.1 us and also allocates and names the stream.
#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>

namespace widehead_python {

using nanobind::dlpack::dltensor;

enum DlDevice : int32_t { kDlCpu = 1, kDlCuda = 2, kDlCudaHost = 3, kDlCudaManaged = 13 };

struct DlManagedTensor {
  dltensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

struct DlVersion {
  uint32_t major, minor;
};

struct DlManagedTensorVersioned {
  DlVersion version;
  void* context;
  void (*deleter)(DlManagedTensorVersioned*);
  uint64_t flags;
  dltensor tensor;
};
constexpr uint64_t kDlReadOnly = 1;

// Functions answer 0, or -1 with a Python error set.
struct DlExchange {
  DlVersion version;
  DlExchange* previous;
  int (*allocate)(dltensor* prototype, DlManagedTensorVersioned** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*import)(void* object, DlManagedTensorVersioned** out);
  int (*export_object)(DlManagedTensorVersioned* tensor, void** out_object);
  int (*borrow)(void* object, dltensor* out);  // may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

}  // namespace widehead_python
