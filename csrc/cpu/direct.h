// Operators as plain Python functions: no schema, no boxes, no dispatcher. A call through torch's operators costs more
// than the small kernels themselves.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <vector>

#include "operators.h"

namespace peftdyno {

// What holds an argument of type T while the operator runs.
template <class T>
struct Held {
  using type = std::remove_cv_t<std::remove_reference_t<T>>;
};
template <class T>
struct Held<at::ArrayRef<T>> {
  using type = std::vector<T>;
};
template <>
struct Held<c10::string_view> {
  using type = std::string;
};

inline void check_place(const Tensor& x) {
  TORCH_CHECK(x.is_cpu(), "the C++ kernels take tensors on the CPU, not on ", x.device());
}
inline void check_place(const OptionalTensor& x) {
  if (x.has_value()) check_place(*x);
}
inline void check_place(const Tensors& all) {
  for (const Tensor& x : all) check_place(x);
}
template <class T>
void check_place(const T&) {}

template <auto F>
struct Direct;

template <class R, class... A, R (*F)(A...)>
struct Direct<F> {
  static R call(typename Held<A>::type... held) {
    (check_place(held), ...);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return F(held...);
  }
};

template <auto F>
void define(pybind11::module& m, const char* name) {
  m.def(name, &Direct<F>::call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace peftdyno
