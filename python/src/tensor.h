// An array of any library, read in place for the time of a call.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "dlpack.h"

namespace widehead_python {

namespace nb = nanobind;

enum class Element {
  kFloat32,
  kFloat16,
  kBfloat16,
  kBool,
  kInt8,
  kUint8,
  kFloat8E4m3,
  kInt32,
  kInt64,
  kOther
};

const char* name_of(Element element);  // "float32"

// Shape, type and device without memory: what plan() needs of an array that does not exist.
struct Spec {
  std::vector<int64_t> shape;
  Element element;
  int32_t device_type;
  int32_t device_id;
};

// What a call does with the memory of an array: a plan looks at the layout alone.
enum class Access { kPlan, kRead, kWrite };

class Tensor {
 public:
  static constexpr int kMaxDims = 4;

  // Borrows `object`, which must outlive this. `stream`: where the work will run, a Python int, or
  // None when the array's library names its own or needs none. PyTorch's lazy tensors, whose memory
  // is not their value (negated views, zeros), are made real first; they cannot be written. Throws
  // TypeError for what is no array, and what widehead._errors.unreadable says where its library
  // does not hand out the memory.
  Tensor(nb::handle object, const char* name, nb::handle stream, Access access);

  const char* name = nullptr;
  Element element = Element::kOther;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements
  int32_t device_type = kDlCpu;
  int32_t device_id = 0;
  bool is_read_only = false;
  void* data = nullptr;
  void* stream = nullptr;  // the current one of the array's library, when it says

  bool on_cuda() const { return device_type == kDlCuda || device_type == kDlCudaManaged; }
  // Packed tokens, [tokens, heads, dim], become what they are to the C API: [1, heads, tokens,
  // dim].
  void view_packed();
  // As the caller sees it. `size` of the four extents that it has after view_packed().
  std::string shape_text() const { return shape_text({shape.data(), static_cast<size_t>(ndim)}); }
  std::string shape_text(std::span<const int64_t> size) const;
  std::string dtype_text() const;
  std::string device_text() const;

 private:
  void read(const dltensor& tensor);
  void read_spec(const Spec& spec);
  bool read_by_exchange(nb::handle object, Access access);
  void read_by_method(nb::handle object, nb::handle stream);

  nb::dlpack::dtype dtype_;
  bool is_packed_ = false;
  nb::object owner_;  // what __dlpack__ handed out, or the real tensor of a lazy one
};

// A new array of q's library, on q's device. Null when the library does not offer it to C.
nb::object allocate_like(nb::handle q, const Tensor& q_tensor, const std::array<int64_t, 4>& shape,
                         int ndim, Element element);

}  // namespace widehead_python
