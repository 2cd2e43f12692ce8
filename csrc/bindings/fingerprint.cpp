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
// It reads the objects' dictionaries itself: a walk in Python takes longer than a forward of a short text. A forward
// leaves nothing of them in the caches, so what the last walk read is fetched first, all at once: following pointers
// would wait for the memory at every step.
#include <torch/csrc/autograd/python_variable.h>

#include "bindings.h"

namespace py = pybind11;

namespace bert_fast {
namespace {

// Places at which the values of a parameter are compared.
constexpr int64_t SAMPLES = 4;

// The cache lines that the last walk has read. Addresses may be stale: fetching from them does nothing.
class Footprint {
 public:
  void fetch() const {
    for (const char* line : lines_) __builtin_prefetch(line);
  }
  void clear() { lines_.clear(); }
  void add(const void* p, size_t size = 1) {
    for (size_t i = 0; i < size; i += 64) lines_.push_back(static_cast<const char*>(p) + i);
  }
  // With its values, which the dictionaries of modules have beside keys that they share, or with its entries.
  void add_dict(PyObject* dict) {
    const auto* object = reinterpret_cast<const PyDictObject*>(dict);
    add(object, sizeof *object);
    add(object->ma_values != nullptr ? static_cast<const void*>(object->ma_values) : object->ma_keys, 256);
  }

 private:
  std::vector<const char*> lines_;
};

// splitmix64 (Steele, Lea & Flood, 2014).
void mix(uint64_t& hash, uint64_t value) {
  hash += value + 0x9e3779b97f4a7c15;
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111eb;
  hash ^= hash >> 31;
}

void mix(uint64_t& hash, const void* pointer) { mix(hash, reinterpret_cast<uint64_t>(pointer)); }

void mix_tensor(uint64_t& hash, const Tensor& tensor, Footprint& footprint) {
  footprint.add(tensor.unsafeGetTensorImpl(), sizeof(at::TensorImpl));
  mix(hash, tensor.unsafeGetTensorImpl());
  mix(hash, tensor.is_inference() ? 0 : tensor._version());
  if (!tensor.has_storage()) return;
  footprint.add(tensor.storage().unsafeGetStorageImpl(), 64);
  mix(hash, tensor.const_data_ptr());
  mix(hash, static_cast<uint64_t>(tensor.numel()));
  mix(hash, static_cast<uint64_t>(tensor.scalar_type()));
  if (!tensor.device().is_cpu() || !tensor.is_contiguous() || tensor.numel() == 0 || !tensor.is_floating_point())
    return;
  const auto* bytes = static_cast<const char*>(tensor.const_data_ptr());
  if (bytes == nullptr) return;  // a subclass that wraps other tensors
  const size_t size = tensor.element_size();
  for (int64_t i = 0; i < std::min(SAMPLES, tensor.numel()); ++i) {
    const char* place = bytes + static_cast<size_t>(i * (tensor.numel() - 1) / SAMPLES) * size;
    footprint.add(place);
    uint64_t value = 0;
    std::memcpy(&value, place, size);
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
  Footprint& footprint;
  uint64_t structure = 0, parameters = 0;

  void add(PyObject* module, const Names& names) {
    mix(structure, module);
    mix(structure, static_cast<const void*>(Py_TYPE(module)));
    const py::object attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!attributes) throw py::error_already_set();
    PyObject* dict = attributes.ptr();
    footprint.add(module, 64);
    footprint.add_dict(dict);
    for (const py::str* name : {&names.forward, &names.training}) mix(structure, get(dict, *name));
    mix_number(structure, get(dict, names.p));
    mix_number(parameters, get(dict, names.eps));
    for (const py::str& name : names.hooks) {
      PyObject* hooks = get(dict, name);
      footprint.add(hooks);
      each_value(hooks, [&](PyObject* hook) { mix(structure, hook); });
    }
    PyObject* own = get(dict, names.parameters);
    if (own != nullptr && PyDict_Check(own)) footprint.add_dict(own);
    each_value(own, [&](PyObject* parameter) {
      mix(parameters, parameter);
      footprint.add(parameter, 64);
      if (THPVariable_Check(parameter)) mix_tensor(parameters, THPVariable_Unpack(parameter), footprint);
    });
    each_value(get(dict, names.modules), [&](PyObject* child) {
      if (child != Py_None) add(child, names);
    });
    if (PyErr_Occurred()) throw py::error_already_set();
  }
};

std::pair<uint64_t, uint64_t> fingerprint(const py::handle& module) {
  static const auto* names = new Names;    // never destroyed: the interpreter may be gone by then
  static auto* footprint = new Footprint;  // of whatever model came last; the interpreter's lock guards it
  footprint->fetch();
  footprint->clear();
  Fingerprint result{*footprint};
  result.add(module.ptr(), *names);
  return {result.structure, result.parameters};
}

}  // namespace

void bind_fingerprint(py::module_& module) {
  module.def("fingerprint", fingerprint, py::arg("module"), "(structure, parameters) of a tree of torch modules.");
}

}  // namespace bert_fast
