// The part of hybridops._host that a call of an optimized model goes through.
#pragma once
#include <pybind11/pybind11.h>

void register_watch(pybind11::module_& m);
