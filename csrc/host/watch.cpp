// Whether what a plan was made from is still what it was: see hybridops/optimize/watch.py.
#include "watch.h"

namespace py = pybind11;

namespace {

// A column of a Watch.
struct Items {
  PyObject* const* first;
  Py_ssize_t count;

  explicit Items(const py::handle column) : first(nullptr), count(0) {
    if (!PyTuple_Check(column.ptr())) throw py::type_error("unchanged: expected a Watch");
    first = ((PyTupleObject*)column.ptr())->ob_item;
    count = PyTuple_GET_SIZE(column.ptr());
  }
  PyObject* operator[](Py_ssize_t i) const { return first[i]; }
  void check(const Items& other) const {
    if (other.count != count)
      throw py::value_error("unchanged: columns that belong together differ in length");
  }
};

PyObject* value_in(PyObject* dict, PyObject* key) {  // borrowed, or null
  if (!PyDict_Check(dict)) throw py::type_error("unchanged: expected a dict");
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool is_dict_of(PyObject* object, PyObject* dict) {
  PyObject* own = PyObject_GenericGetDict(object, nullptr);
  if (!own) throw py::error_already_set();
  Py_DECREF(own);  // the object keeps it
  return own == dict;
}

Py_ssize_t length_of(PyObject* dict) {
  if (!PyDict_Check(dict)) throw py::type_error("unchanged: expected a dict");
  return PyDict_Size(dict);
}

// `found` is what the tensor says of itself now: owned, null where it raised, which is a change
// too.
bool equals(PyObject* found, PyObject* expected) {
  const int equal = found ? PyObject_RichCompareBool(found, expected, Py_EQ) : -1;
  Py_XDECREF(found);
  if (equal < 0) PyErr_Clear();
  return equal == 1;
}

bool unchanged(const py::tuple& watch) {
  // The fields of a Watch, in their order there.
  enum { kDicts, kKeys, kValues, kOwners, kOwned, kAbsentFrom, kAbsent, kEmpty, kSized, kSizes };
  enum {
    kObjects = kSizes + 1,
    kClasses,
    kTensors,
    kVersions,
    kPointers,
    kShapes,
    kStrides,
    kFields
  };
  if (watch.size() != kFields) throw py::type_error("unchanged: expected a Watch");
  const auto column = [&](size_t field) { return Items(PyTuple_GET_ITEM(watch.ptr(), field)); };

  const Items empty = column(kEmpty);
  for (Py_ssize_t i = 0; i < empty.count; ++i)
    if (length_of(empty[i]) != 0) return false;

  const Items sized = column(kSized), sizes = column(kSizes);
  sized.check(sizes);
  for (Py_ssize_t i = 0; i < sized.count; ++i) {
    const Py_ssize_t size = PyLong_AsSsize_t(sizes[i]);
    if (size < 0 && PyErr_Occurred()) throw py::error_already_set();
    if (length_of(sized[i]) != size) return false;
  }

  const Items objects = column(kObjects), classes = column(kClasses);
  objects.check(classes);
  for (Py_ssize_t i = 0; i < objects.count; ++i)
    if ((PyObject*)Py_TYPE(objects[i]) != classes[i]) return false;

  const Items owners = column(kOwners), owned = column(kOwned);
  owners.check(owned);
  for (Py_ssize_t i = 0; i < owners.count; ++i)
    if (!is_dict_of(owners[i], owned[i])) return false;

  const Items dicts = column(kDicts), keys = column(kKeys), values = column(kValues);
  dicts.check(keys);
  dicts.check(values);
  for (Py_ssize_t i = 0; i < dicts.count; ++i)
    if (value_in(dicts[i], keys[i]) != values[i]) return false;

  const Items absent_from = column(kAbsentFrom), absent = column(kAbsent);
  for (Py_ssize_t i = 0; i < absent_from.count; ++i)
    for (Py_ssize_t k = 0; k < absent.count; ++k)
      if (value_in(absent_from[i], absent[k])) return false;

  static PyObject* const version = PyUnicode_InternFromString("_version");
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  static PyObject* const shape = PyUnicode_InternFromString("shape");
  static PyObject* const stride = PyUnicode_InternFromString("stride");
  const Items tensors = column(kTensors), versions = column(kVersions);
  const Items pointers = column(kPointers), shapes = column(kShapes), strides = column(kStrides);
  tensors.check(versions);
  tensors.check(pointers);
  tensors.check(shapes);
  tensors.check(strides);
  for (Py_ssize_t i = 0; i < tensors.count; ++i)
    if (!equals(PyObject_GetAttr(tensors[i], version), versions[i]) ||
        !equals(PyObject_CallMethodNoArgs(tensors[i], data_ptr), pointers[i]) ||
        !equals(PyObject_GetAttr(tensors[i], shape), shapes[i]) ||
        !equals(PyObject_CallMethodNoArgs(tensors[i], stride), strides[i]))
      return false;
  return true;
}

}  // namespace

void register_watch(py::module_& m) {
  m.def("unchanged", &unchanged, py::arg("watch"),
        "Whether all that a hybridops.optimize.watch.Watch names is still as it was.");
}
