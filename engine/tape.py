"""A call recorded operator by operator and repeated without the Python and the autograd between them: on a CPU what a
CUDA graph is on a GPU.

What is recorded is what a dispatch mode sees, below autograd: forward and backward passes alike. A tensor that an
operator made is known by its storage, so views are not operators of the tape but geometries of its arguments. As with a
CUDA graph the call must read what changes from tensors that stay where they are, and must read no value on the host.
csrc/cpu/tape.cpp repeats it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.dispatch_mode import DispatchMode
from peftdyno.kernels import cpu, dispatch
from peftdyno.kernels.library import PRIMITIVES

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}
"""Operators whose result the host reads."""
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]
Input = tuple[int, int, int, Geometry | None]
"""A tensor of the tape among an operator's arguments: which argument, which element of a list or NOWHERE, its slot, and
how it lies there, None for the whole."""
NOWHERE = -1
"""Stands for no slot and for no element."""
HOLE = torch.empty(0)
"""Stands for a tensor of the tape among arguments."""


@dataclass(frozen=True)
class Call:
    """One operator: its arguments, with `HOLE` where tensors of the tape go, and the slot of each tensor that it gives,
    NOWHERE for one that is an argument's."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Input]
    outputs: list[int]


def unavailable() -> str:
    """Why no tape can be made here, and the remedy; empty where one can."""
    if cpu.AVAILABLE and dispatch.current() in ("auto", "cpu"):
        return ""
    return "only the C++ kernels can be recorded; install with a C++ compiler and give --kernels auto, or --graphs off"


@dataclass(frozen=True)
class Repeated:
    """A recorded call as one to call again; its result lies at the same place every time."""

    tape: Any
    num_calls: int
    num_forward: int
    """Calls before the first of a backward pass; all where there is none."""
    result: Tensor
    slot: int
    view: Geometry | None

    def __call__(self) -> Tensor:
        """All of it."""
        self.forward()
        return self.backward()

    def forward(self) -> None:
        """What comes before the backward pass."""
        self.tape.run(0, self.num_forward)

    def backward(self) -> Tensor:
        """The rest."""
        self.tape.run(self.num_forward, self.num_calls)
        self.tape.give(self.result, self.slot, self.view)
        return self.result


class TapeRecorder:
    """Records calls on the CPU (see `engine.graphs.Recorder`), for the compiled extension to repeat."""

    def record(self, call: Callable[[], Tensor]) -> Repeated:
        """The repeated call; RuntimeError where it reads a value on the host."""
        return Heard().listen(call).repeated()


class _Listening(DispatchMode):
    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self.heard = heard

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.heard.note(func, args, kwargs or {}, result)
        return result


class Heard:
    """What is heard of a call: operators, the slot of each storage that they made and that is still alive, and how the
    tensor lay in it that a slot began with. Nothing is held, so recording needs no more memory than the call.

    The first slots are those of tensors that are given anew whenever the call is repeated, each with a storage of its
    own.
    """

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        self.calls: list[Call] = []
        self.num_forward = NOWHERE
        self.slots: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self.made: list[Geometry] = []
        self.num_given = len(given)
        for tensor in given:
            self._output(tensor, set())
        assert len(self.slots) == len(given), "storages of their own"

    def listen(self, call: Callable[[], Tensor]) -> Heard:
        """Hear a call; RuntimeError where it reads a value on the host."""
        with _Listening(self):
            self.result = call().detach()
        self.slot = self._slot(self.result)
        self.view = None if self.slot == NOWHERE else self._geometry(self.slot, self.result)
        if self.num_forward == NOWHERE:
            self.num_forward = len(self.calls)
        return self

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """An operator was called."""
        if func.name().split(".")[0] in READS:
            raise RuntimeError(f"{func.name()} reads a value on the host, which a recording cannot")
        inputs: list[Input] = []
        given = tuple(self._argument(i, value, inputs) for i, value in enumerate(args))
        known = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
        outputs = [self._output(tensor, known) for tensor in _tensors(result)]
        writes = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if self.num_forward == NOWHERE and torch._C._current_graph_task_id() != NOWHERE:
            self.num_forward = len(self.calls)  # within a backward pass from here on
        if writes or any(slot != NOWHERE for slot in outputs):
            self.calls.append(Call(_below(func, args), given, kwargs, inputs, outputs))

    def _argument(self, place: int, value: Any, inputs: list[Input], element: int = NOWHERE) -> Any:
        """An argument without its tensors of the tape, which are noted among the inputs."""
        if isinstance(value, list | tuple):
            return [self._argument(place, part, inputs, key) for key, part in enumerate(value)]
        slot = self._slot(value) if isinstance(value, Tensor) else NOWHERE
        if slot == NOWHERE:
            return value
        inputs.append((place, element, slot, self._geometry(slot, value)))
        return HOLE

    def _geometry(self, slot: int, view: Tensor) -> Geometry | None:
        """How a tensor lies in a slot's storage, where it is not the slot's own."""
        return None if _geometry(view) == self.made[slot] else _geometry(view)

    def _slot(self, tensor: Tensor) -> int:
        """The slot of a tensor's storage; NOWHERE for one from outside, also where a storage of the tape lay before.

        Nothing is called when a storage goes: Python loses an interrupt that comes in such a call.
        """
        slot, storage = self.slots.get(tensor.untyped_storage()._cdata, (NOWHERE, None))
        return NOWHERE if storage is None or storage() is None else slot

    def _output(self, tensor: Tensor, known: set[int]) -> int:
        """A new slot, unless the storage is that of an argument."""
        storage, slot = tensor.untyped_storage(), len(self.made)
        key = storage._cdata
        if key in known:
            return NOWHERE
        self.slots[key] = slot, weakref.ref(storage)
        self.made.append(_geometry(tensor))
        return slot

    def repeated(self) -> Repeated:
        """All calls as one; its result lies where that of the call did."""
        tape = cpu.extension().Tape(len(self.made), self.num_given)
        for call, ended in zip(self.calls, self._ends(self.slot), strict=True):
            schema = call.operator._schema
            name = schema.name, schema.overload_name
            tape.add(*name, call.args, call.kwargs, call.inputs, call.outputs, ended)
        return Repeated(tape, len(self.calls), self.num_forward, self.result, self.slot, self.view)

    def _ends(self, last: int) -> list[list[int]]:
        """For each call the slots that nobody reads after it; the last one is kept."""
        seen, ends = {last, NOWHERE}, []
        for call in reversed(self.calls):
            touched = {slot for _, _, slot, _ in call.inputs} | set(call.outputs)
            ends.append(sorted(touched - seen))
            seen |= touched
        return ends[::-1]


def _below(func: Any, args: Sequence[Any]) -> Any:
    """The operator that is called in the end, where it is one of ours."""
    if func.namespace != "peftdyno":
        return func
    name = func._schema.name.removeprefix("peftdyno::")
    chosen = dispatch.choose(name, PRIMITIVES[name].implementations, args[0].device)
    return getattr(torch.ops.peftdyno_cpu, name).default if chosen == "cpu" else func


def _geometry(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a result in their order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _tensors(part)
