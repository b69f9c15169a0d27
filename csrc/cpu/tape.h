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

// An integer of a recorded call: of the view of one of its inputs (`part` 0 sizes, 1 strides, 2 offset), or with `input`
// -1 of argument `part`. `element` is -1 where that is no list.
struct TapeInteger {
  int64_t call, input, part, element;
};

class Tape {
 public:
  // The first `num_given` slots are filled by whoever repeats it.
  explicit Tape(int64_t num_slots, int64_t num_given) : num_slots_(num_slots), num_given_(num_given) {}

  // The next call. `arguments` has all that the schema asks for, with anything where `inputs` put a tensor.
  void add(const c10::OperatorHandle& op, torch::jit::Stack arguments, std::vector<TapeInput> inputs,
           TapeResults results);

  // Integers that are the same size, one of several: `resize` sets them.
  void add_size(std::vector<TapeInteger> places) { sizes_.push_back(std::move(places)); }

  // Every size, in the order in which they were added.
  void resize(at::IntArrayRef values);

  // Fill the given slots, before the first call.
  void take(at::TensorList given);

  // Repeat the calls from `begin` on, before `end`; all other slots are empty at the first call.
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

  void repeat(Call& call, torch::jit::Stack& stack);
  void set(const TapeInteger& place, int64_t value);

  const int64_t num_slots_, num_given_;
  std::vector<Call> calls_;
  std::vector<Tensor> slots_;
  std::vector<std::vector<TapeInteger>> sizes_;
};

}  // namespace peftdyno
