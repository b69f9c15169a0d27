// The tape as Python has it: arguments are given as torch's operators take them.
#include "tape_module.h"

#include <torch/csrc/jit/python/pybind_utils.h>

#include <array>

#include "tape.h"

namespace peftdyno {
namespace {

namespace py = pybind11;
using GivenGeometry = std::optional<std::tuple<std::vector<int64_t>, std::vector<int64_t>, int64_t>>;
using GivenInput = std::tuple<int64_t, int64_t, int64_t, GivenGeometry>;

std::optional<Geometry> geometry_of(const GivenGeometry& given) {
  if (!given) return std::nullopt;
  const auto& [sizes, strides, offset] = *given;
  return Geometry{sizes, strides, offset};
}

void add_call(Tape& tape, const std::string& name, const std::string& overload, const py::tuple& args,
              const py::dict& kwargs, const std::vector<GivenInput>& given, std::vector<int64_t> slots,
              std::vector<int64_t> ended) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  std::vector<TapeInput> inputs;
  for (const auto& [argument, element, slot, view] : given)
    inputs.push_back({argument, element, slot, geometry_of(view)});
  const torch::jit::ToIValueAllowNumbersAsTensors numbers(true);
  torch::jit::Stack arguments = torch::jit::createStackForSchema(
      op.schema(), torch::jit::tuple_slice(args), py::reinterpret_borrow<py::kwargs>(kwargs), std::nullopt);
  tape.add(op, std::move(arguments), std::move(inputs), {std::move(slots), std::move(ended)});
}

}  // namespace

void define_tape(py::module& m) {
  py::class_<Tape>(m, "Tape")
      .def(py::init<int64_t, int64_t>())
      .def("add", &add_call)
      .def("add_size", [](Tape& tape, const std::vector<std::array<int64_t, 4>>& given) {
        std::vector<TapeInteger> places;
        for (const auto& [call, input, part, element] : given) places.push_back({call, input, part, element});
        tape.add_size(std::move(places));
      })
      .def("resize", [](Tape& tape, const std::vector<int64_t>& values) { tape.resize(values); })
      .def("take", [](Tape& tape, const std::vector<Tensor>& given) { tape.take(given); })
      .def("run", &Tape::run, py::call_guard<py::gil_scoped_release>())
      .def("give", [](Tape& tape, Tensor& out, int64_t slot, const GivenGeometry& view) {
        tape.give(out, slot, geometry_of(view));
      });
}

}  // namespace peftdyno
