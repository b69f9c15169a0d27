// Operator calls repeated one after another, without Python, autograd or a dispatcher's lookups; engine/tape.py records
// them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <vector>

namespace peftdyno {

using at::Tensor;

// How a tensor lies in the storage of the one that a slot holds.
struct Geometry {
  std::vector<int64_t> sizes, strides;
  int64_t offset;
};

// A slot's tensor among a call's arguments: the argument, and the element where that is a list, else -1.
struct TapeInput {
  int64_t argument, element, slot;
  std::optional<Geometry> view;  // none for the tensor as it is
};

// Where a call's tensors go, in the order of its results (-1 for nowhere), and the slots that nobody reads after it.
struct TapeResults {
  std::vector<int64_t> slots, ended;
};

class Tape {
 public:
  explicit Tape(int64_t num_slots) : num_slots_(num_slots) {}

  // The next call. `arguments` has all that the schema asks for, with anything where `inputs` put a tensor.
  void add(const c10::OperatorHandle& op, torch::jit::Stack arguments, std::vector<TapeInput> inputs,
           TapeResults results);

  // Repeat the calls from `begin` on, before `end`; slots are empty at the first call.
  void run(int64_t begin, int64_t end);

  // Overwrite `out` with what a slot holds, or a view of it (-1 for nothing), and empty all slots.
  void give(Tensor& out, int64_t slot, const std::optional<Geometry>& view);

 private:
  struct Call {
    c10::OperatorHandle op;
    torch::jit::Stack arguments;
    std::vector<TapeInput> inputs;
    TapeResults results;
  };

  void repeat(const Call& call, torch::jit::Stack& stack);

  const int64_t num_slots_;
  std::vector<Call> calls_;
  std::vector<Tensor> slots_;
};

}  // namespace peftdyno
