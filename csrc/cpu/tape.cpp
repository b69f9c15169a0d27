#include "tape.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/as_strided.h>

namespace peftdyno {
namespace {

Tensor seen(const Tensor& whole, const std::optional<Geometry>& view) {
  return view ? at::as_strided(whole, view->sizes, view->strides, view->offset) : whole;
}

void put(torch::jit::Stack& stack, const TapeInput& input, Tensor value) {
  c10::IValue& argument = stack[input.argument];
  if (input.element < 0)
    argument = std::move(value);
  else
    argument.toList().set(input.element, std::move(value));
}

// The tensors of a call's results, in their order, into their slots. Python has None for an undefined one.
void keep(const torch::jit::Stack& stack, const std::vector<int64_t>& places, std::vector<Tensor>& slots) {
  auto place = places.begin();
  const auto next = [&](const Tensor& made) {
    if (!made.defined()) return;
    TORCH_CHECK(place != places.end(), "an operator gives more tensors than when it was recorded");
    const int64_t slot = *place++;
    if (slot >= 0) slots[slot] = made;
  };
  for (const c10::IValue& value : stack) {
    if (value.isTensor()) {
      next(value.toTensor());
    } else if (value.isTensorList()) {
      for (const Tensor& made : value.toTensorVector()) next(made);
    }
  }
}

// Arguments that are lists share their elements with every call's stack; its tensors leave them whatever happens.
class Lent {
 public:
  Lent(torch::jit::Stack& arguments, const std::vector<TapeInput>& inputs) : arguments_(arguments), inputs_(inputs) {}

  ~Lent() {
    for (const TapeInput& input : inputs_)
      if (input.element >= 0) arguments_[input.argument].toList().set(input.element, Tensor());
  }

 private:
  torch::jit::Stack& arguments_;
  const std::vector<TapeInput>& inputs_;
};

}  // namespace

void Tape::add(const c10::OperatorHandle& op, torch::jit::Stack arguments, std::vector<TapeInput> inputs,
               TapeResults results) {
  calls_.push_back({op, std::move(arguments), std::move(inputs), std::move(results)});
}

void Tape::repeat(Call& call, torch::jit::Stack& stack) {
  const Lent lent(call.arguments, call.inputs);
  stack.assign(call.arguments.begin(), call.arguments.end());
  for (const TapeInput& input : call.inputs) put(stack, input, seen(slots_[input.slot], input.view));
  call.op.callBoxed(stack);
  keep(stack, call.results.slots, slots_);
  stack.clear();
  for (const int64_t slot : call.results.ended) slots_[slot].reset();
}

void Tape::set(const TapeInteger& place, int64_t value) {
  Call& call = calls_.at(place.call);
  if (place.input < 0) {
    c10::IValue& argument = call.arguments.at(place.part);
    if (place.element < 0)
      argument = value;
    else
      argument.toList().set(place.element, value);
    return;
  }
  Geometry& view = *call.inputs.at(place.input).view;
  if (place.part == 2)
    view.offset = value;
  else
    (place.part == 0 ? view.sizes : view.strides).at(place.element) = value;
}

void Tape::resize(at::IntArrayRef values) {
  TORCH_CHECK(values.size() == sizes_.size(), "a value for each size");
  for (size_t i = 0; i < sizes_.size(); ++i)
    for (const TapeInteger& place : sizes_[i]) set(place, values[i]);
}

void Tape::take(at::TensorList given) {
  TORCH_CHECK(static_cast<int64_t>(given.size()) == num_given_, "a tensor for each given slot");
  slots_.assign(given.begin(), given.end());
  slots_.resize(num_slots_);
}

void Tape::run(int64_t begin, int64_t end) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (begin == 0 && num_given_ == 0) slots_.assign(num_slots_, Tensor());
  torch::jit::Stack stack;
  try {
    for (int64_t i = begin; i < end; ++i) repeat(calls_[i], stack);
  } catch (...) {
    slots_.clear();  // whoever tries again, with less, finds no memory held
    throw;
  }
}

void Tape::give(Tensor& out, int64_t slot, const std::optional<Geometry>& view) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (slot >= 0) out.copy_(seen(slots_[slot], view));
  slots_.clear();
}

}  // namespace peftdyno
