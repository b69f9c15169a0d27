#pragma once

#include <torch/csrc/utils/pybind.h>

namespace peftdyno {

// The class `Tape` of the module.
void define_tape(pybind11::module& m);

}  // namespace peftdyno
