// fingerprint(module): has a tree of torch modules changed since it was looked at? Two numbers, which change when
//
//   structure    a module is another object or of another class, is hooked, has a `forward` of its own, or another
//                training mode or dropout probability
//   parameters   an epsilon is another; a parameter is another tensor, was written to in place (its version counter),
//   lies elsewhere in memory,
//                or holds other values. Values are compared at a few places: what writes behind the version counter's
//                back (`parameter.data`) is noticed when it changes the parameter as training or loading does, not when
//                it changes single elements.
//
// It reads the objects' dictionaries itself: a walk in Python takes longer than a forward of a short text.
#include <torch/csrc/autograd/python_variable.h>

#include "bindings.h"

namespace py = pybind11;

namespace bert_fast {
namespace {

// Places at which the values of a parameter are compared.
constexpr int64_t SAMPLES = 8;

// splitmix64 (Steele, Lea & Flood, 2014).
void mix(uint64_t& hash, uint64_t value) {
  hash += value + 0x9e3779b97f4a7c15;
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111eb;
  hash ^= hash >> 31;
}

void mix(uint64_t& hash, const void* pointer) { mix(hash, reinterpret_cast<uint64_t>(pointer)); }

void mix_tensor(uint64_t& hash, const Tensor& tensor) {
  mix(hash, tensor.unsafeGetTensorImpl());
  mix(hash, tensor.is_inference() ? 0 : tensor._version());
  if (!tensor.has_storage()) return;
  mix(hash, tensor.const_data_ptr());
  mix(hash, static_cast<uint64_t>(tensor.numel()));
  mix(hash, static_cast<uint64_t>(tensor.scalar_type()));
  if (!tensor.device().is_cpu() || !tensor.is_contiguous() || tensor.numel() == 0 || !tensor.is_floating_point())
    return;
  const auto* bytes = static_cast<const char*>(tensor.const_data_ptr());
  const size_t size = tensor.element_size();
  for (int64_t i = 0; i < std::min(SAMPLES, tensor.numel()); ++i) {
    uint64_t value = 0;
    std::memcpy(&value, bytes + static_cast<size_t>(i * (tensor.numel() - 1) / SAMPLES) * size, size);
    mix(hash, value);
  }
}

struct Names {
  py::str parameters{"_parameters"}, modules{"_modules"}, forward{"forward"}, training{"training"}, p{"p"}, eps{"eps"};
  std::array<py::str, 4> hooks{"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"};
};

// The value of a key, or null.
PyObject* get(PyObject* dict, const py::str& key) { return PyDict_GetItemWithError(dict, key.ptr()); }

void mix_number(uint64_t& hash, PyObject* value) {
  if (value != nullptr && PyNumber_Check(value)) mix(hash, static_cast<uint64_t>(PyObject_Hash(value)));
}

template <class F>
void each_value(PyObject* dict, const F& f) {
  if (dict == nullptr || !PyDict_Check(dict)) return;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict, &position, &key, &value)) f(value);
}

struct Fingerprint {
  uint64_t structure = 0, parameters = 0;

  void add(PyObject* module, const Names& names) {
    mix(structure, module);
    mix(structure, static_cast<const void*>(Py_TYPE(module)));
    const py::object attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!attributes) throw py::error_already_set();
    PyObject* dict = attributes.ptr();
    for (const py::str* name : {&names.forward, &names.training}) mix(structure, get(dict, *name));
    mix_number(structure, get(dict, names.p));
    mix_number(parameters, get(dict, names.eps));
    for (const py::str& name : names.hooks) each_value(get(dict, name), [&](PyObject* hook) { mix(structure, hook); });
    each_value(get(dict, names.parameters), [&](PyObject* parameter) {
      mix(parameters, parameter);
      if (THPVariable_Check(parameter)) mix_tensor(parameters, THPVariable_Unpack(parameter));
    });
    each_value(get(dict, names.modules), [&](PyObject* child) {
      if (child != Py_None) add(child, names);
    });
    if (PyErr_Occurred()) throw py::error_already_set();
  }
};

std::pair<uint64_t, uint64_t> fingerprint(const py::handle& module) {
  static const auto* names = new Names;  // never destroyed: the interpreter may be gone by then
  Fingerprint result;
  result.add(module.ptr(), *names);
  return {result.structure, result.parameters};
}

}  // namespace

void bind_fingerprint(py::module_& module) {
  module.def("fingerprint", fingerprint, py::arg("module"), "(structure, parameters) of a tree of torch modules.");
}

}  // namespace bert_fast
