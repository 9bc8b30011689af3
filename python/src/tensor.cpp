#include "tensor.h"

#include <algorithm>
#include <cstring>

namespace widehead_python {
namespace {

struct Code {
  Element element;
  nb::dlpack::dtype_code code;
  uint8_t bits;
  const char* name;
};
constexpr Code kCodes[] = {
    {Element::kFloat32, nb::dlpack::dtype_code::Float, 32, "float32"},
    {Element::kFloat16, nb::dlpack::dtype_code::Float, 16, "float16"},
    {Element::kBfloat16, nb::dlpack::dtype_code::Bfloat, 16, "bfloat16"},
    {Element::kBool, nb::dlpack::dtype_code::Bool, 8, "bool"},
    {Element::kInt8, nb::dlpack::dtype_code::Int, 8, "int8"},
    {Element::kUint8, nb::dlpack::dtype_code::UInt, 8, "uint8"},
    // DLPack 1.1's, which nanobind has no name for.
    {Element::kFloat8E4m3, static_cast<nb::dlpack::dtype_code>(10), 8, "float8_e4m3fn"},
    {Element::kInt32, nb::dlpack::dtype_code::Int, 32, "int32"},
    {Element::kInt64, nb::dlpack::dtype_code::Int, 64, "int64"},
};

Element element_of(nb::dlpack::dtype type) {
  for (const Code& each : kCodes) {
    if (type.code == static_cast<uint8_t>(each.code) && type.bits == each.bits && type.lanes == 1) {
      return each.element;
    }
  }
  return Element::kOther;
}

// The table of the object's type, or null. Types are few and live long: the last one is kept.
const DlExchange* exchange_of(nb::handle object) {
  static PyTypeObject* last_type = nullptr;
  static const DlExchange* last = nullptr;
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == last_type) return last;
  const DlExchange* table = nullptr;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
  } else {
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
      table = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    }
    Py_DECREF(capsule);
    while (table != nullptr && table->version.major != 1) table = table->previous;
  }
  // A type that can be freed must not be recognised by its address later. Freeing the one before
  // may run Python code that comes back here: the new one must be in place by then.
  PyObject* const replaced = reinterpret_cast<PyObject*>(last_type);
  Py_INCREF(reinterpret_cast<PyObject*>(type));
  last_type = type;
  last = table;
  Py_XDECREF(replaced);
  return table;
}

nb::object call_dlpack(const nb::object& method, nb::handle stream) {
  static PyObject* const version = nb::make_tuple(1, 1).release().ptr();
  try {
    if (stream.is_none()) return method(nb::arg("max_version") = nb::handle(version));
    return method(nb::arg("max_version") = nb::handle(version), nb::arg("stream") = stream);
  } catch (nb::python_error& error) {
    // Libraries older than DLPack 1.0 know no max_version.
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return stream.is_none() ? method() : method(nb::arg("stream") = stream);
}

// NumPy cannot export bfloat16, which ml_dtypes adds to it. Asked before it tries: the exception
// that it would throw costs more than a small problem.
bool is_numpy_bfloat16(nb::handle object) {
  static PyObject* array_type = nullptr;
  static PyObject* bfloat16 = nullptr;
  if (array_type == nullptr) {
    array_type = nb::getattr(nb::module_::import_("numpy"), "ndarray").release().ptr();
  }
  if (!PyType_IsSubtype(Py_TYPE(object.ptr()), reinterpret_cast<PyTypeObject*>(array_type))) {
    return false;
  }
  const nb::object dtype = object.attr("dtype");
  if (dtype.ptr() == bfloat16) return true;
  // Types that are not NumPy's own are of kind V.
  if (nb::cast<std::string>(dtype.attr("kind")) != "V") return false;
  if (nb::cast<std::string>(nb::str(dtype)) != "bfloat16") return false;
  Py_XDECREF(bfloat16);
  bfloat16 = nb::object(dtype).release().ptr();
  return true;
}

nb::module_ errors() { return nb::module_::import_("widehead._errors"); }

[[noreturn]] void fail(const nb::object& error) {
  PyErr_SetObject(error.type().ptr(), error.ptr());
  throw nb::python_error();
}

// Throws what says of the argument why its library does not export it. A Python error is set.
[[noreturn]] void fail_export(nb::handle object, const char* name) {
  const nb::python_error cause;
  if (!cause.matches(PyExc_Exception)) throw cause;  // as an interrupt
  fail(errors().attr("unreadable")(name, object, cause.value()));
}

// What the object's method of no arguments answers, False where it has none.
bool is_true(nb::handle object, PyObject* method) {
  PyObject* const answer = PyObject_CallMethodObjArgs(object.ptr(), method, nullptr);
  if (answer == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw nb::python_error();
    PyErr_Clear();
    return false;
  }
  Py_DECREF(answer);
  return answer == Py_True;
}

// PyTorch negates a view, as of a conjugate's imaginary part, by a bit beside its memory, and makes
// zeros without any; DLPack knows neither.
bool is_lazy(nb::handle object, const dltensor& tensor) {
  static PyObject* const is_negated = PyUnicode_InternFromString("is_neg");
  static PyObject* const is_zero = PyUnicode_InternFromString("_is_zerotensor");
  if (tensor.data != nullptr) return is_true(object, is_negated);
  const int64_t* const begin = tensor.shape;
  const int64_t* const end = begin + tensor.ndim;
  return std::find(begin, end, 0) == end && is_true(object, is_zero);
}

nb::object made_real(nb::handle object, const dltensor& tensor, Access access) {
  // The same layout without the values, of which a plan needs none.
  if (access == Access::kPlan) return nb::module_::import_("torch").attr("empty_like")(object);
  return object.attr(tensor.data == nullptr ? "clone" : "resolve_neg")();
}

}  // namespace

const char* name_of(Element element) {
  for (const Code& each : kCodes) {
    if (each.element == element) return each.name;
  }
  return "other";
}

Tensor::Tensor(nb::handle object, const char* name_, nb::handle stream, Access access)
    : name(name_) {
  Spec* spec = nullptr;
  if (nb::try_cast(object, spec, false) && spec != nullptr) {
    read_spec(*spec);
  } else if (!read_by_exchange(object, access)) {
    read_by_method(object, stream);
  }
}

void Tensor::read(const dltensor& tensor) {
  if (tensor.ndim > kMaxDims) {
    throw nb::value_error((std::string(name) + " has " + std::to_string(tensor.ndim) +
                           " dimensions; it must have at most " + std::to_string(kMaxDims))
                              .c_str());
  }
  dtype_ = tensor.dtype;
  element = element_of(dtype_);
  ndim = tensor.ndim;
  int64_t dense = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    shape[i] = tensor.shape[i];
    strides[i] = tensor.strides != nullptr ? tensor.strides[i] : dense;
    dense *= shape[i];
  }
  device_type = tensor.device.device_type;
  device_id = tensor.device.device_id;
  data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  // Pinned memory is the host's.
  if (device_type == kDlCudaHost) {
    device_type = kDlCpu;
    device_id = 0;
  }
}

void Tensor::read_spec(const Spec& spec) {
  dltensor tensor;
  tensor.ndim = static_cast<int32_t>(spec.shape.size());
  tensor.shape = const_cast<int64_t*>(spec.shape.data());
  tensor.device = {spec.device_type, spec.device_id};
  read(tensor);
  element = spec.element;
}

bool Tensor::read_by_exchange(nb::handle object, Access access) {
  const DlExchange* exchange = exchange_of(object);
  if (exchange == nullptr || exchange->borrow == nullptr) return false;
  dltensor tensor;
  if (exchange->borrow(object.ptr(), &tensor) != 0) fail_export(object, name);
  if (is_lazy(object, tensor)) {
    if (access == Access::kWrite) fail(errors().attr("unwritable")(name));
    owner_ = made_real(object, tensor, access);
    if (exchange->borrow(owner_.ptr(), &tensor) != 0) fail_export(object, name);
  }
  read(tensor);
  if (on_cuda() && exchange->current_stream(kDlCuda, device_id, &stream) != 0) {
    throw nb::python_error();
  }
  return true;
}

void Tensor::read_by_method(nb::handle object, nb::handle stream) {
  // It is read as an array of 16-bit integers.
  const bool is_bfloat16 = is_numpy_bfloat16(object);
  const nb::object array = is_bfloat16 ? object.attr("view")("uint16") : nb::borrow(object);
  const nb::object method = nb::getattr(array, "__dlpack__", nb::none());
  if (method.is_none()) {
    const std::string type = nb::cast<std::string>(nb::getattr(object.type(), "__name__"));
    throw nb::type_error(
        (std::string(name) + " is a " + type +
         "; it must be an array that supports DLPack (NumPy, PyTorch, JAX, MLX, CuPy and others)")
            .c_str());
  }
  try {
    owner_ = call_dlpack(method, stream);
  } catch (nb::python_error& error) {
    error.restore();
    fail_export(object, name);
  }
  if (PyCapsule_IsValid(owner_.ptr(), "dltensor_versioned")) {
    const auto* managed = static_cast<DlManagedTensorVersioned*>(
        PyCapsule_GetPointer(owner_.ptr(), "dltensor_versioned"));
    read(managed->tensor);
    is_read_only = (managed->flags & kDlReadOnly) != 0;
  } else if (PyCapsule_IsValid(owner_.ptr(), "dltensor")) {
    read(static_cast<DlManagedTensor*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"))->tensor);
  } else {
    throw nb::type_error((std::string(name) + ".__dlpack__() answered with no tensor").c_str());
  }
  if (is_bfloat16) element = Element::kBfloat16;
}

void Tensor::view_packed() {
  shape = {1, shape[1], shape[0], shape[2]};
  strides = {0, strides[1], strides[0], strides[2]};
  ndim = 4;
  is_packed_ = true;
}

std::string Tensor::shape_text(std::span<const int64_t> size) const {
  std::vector<int64_t> seen(size.begin(), size.end());
  if (is_packed_) seen = {size[2], size[1], size[3]};
  std::string text = "[";
  for (const int64_t each : seen) text += (text.size() > 1 ? ", " : "") + std::to_string(each);
  return text + "]";
}

std::string Tensor::dtype_text() const {
  if (element != Element::kOther) return name_of(element);
  const char* names[] = {"int", "uint", "float"};
  if (dtype_.code < std::size(names)) return names[dtype_.code] + std::to_string(dtype_.bits);
  if (dtype_.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Complex)) {
    return "complex" + std::to_string(dtype_.bits);
  }
  return "of DLPack type " + std::to_string(dtype_.code);
}

std::string Tensor::device_text() const {
  if (device_type == kDlCpu) return "cpu";
  if (on_cuda()) return "cuda:" + std::to_string(device_id);
  return "a device of DLPack type " + std::to_string(device_type);
}

nb::object allocate_like(nb::handle q, const Tensor& q_tensor, const std::array<int64_t, 4>& shape,
                         int ndim, Element element) {
  const DlExchange* exchange = exchange_of(q);
  if (exchange == nullptr) return {};
  dltensor prototype;
  std::array<int64_t, 4> extents = shape;
  prototype.ndim = ndim;
  prototype.shape = extents.data();
  prototype.device = {q_tensor.device_type, q_tensor.device_id};
  for (const Code& each : kCodes) {
    if (each.element == element) prototype.dtype = {static_cast<uint8_t>(each.code), each.bits, 1};
  }
  DlManagedTensorVersioned* managed = nullptr;
  std::string message;
  const int allocated = exchange->allocate(&prototype, &managed, &message,
                                           [](void* context, const char*, const char* text) {
                                             *static_cast<std::string*>(context) = text;
                                           });
  if (allocated != 0) {
    if (PyErr_Occurred()) throw nb::python_error();
    PyErr_SetString(PyExc_MemoryError, message.c_str());
    throw nb::python_error();
  }
  void* object = nullptr;
  if (exchange->export_object(managed, &object) != 0) throw nb::python_error();
  return nb::steal(static_cast<PyObject*>(object));
}

}  // namespace widehead_python
