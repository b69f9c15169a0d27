"""A call recorded operator by operator and repeated without the Python and the autograd between them: on a CPU what a
CUDA graph is on a GPU.

What is recorded is what a dispatch mode sees, below autograd: forward and backward passes alike. A tensor that an
operator made is known by its storage, so views are not operators of the tape but geometries of its arguments. As with a
CUDA graph the call must read what changes from tensors that stay where they are, and must read no value on the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftdyno.kernels import dispatch
from peftdyno.kernels.library import PRIMITIVES

READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}
"""Operators whose result the host reads."""
Geometry = tuple[tuple[int, ...], tuple[int, ...], int]


@dataclass
class _Input:
    """A tensor of the tape among an operator's arguments: `place[key]` is where it goes, `slot` what it is a view of;
    no geometry means the whole."""

    place: list[Any]
    key: int
    slot: int
    geometry: Geometry | None


@dataclass
class _Call:
    """One operator: its arguments, with holes for tensors of the tape; the slot of each tensor it gives, or None for
    one that is an argument's; and slots that nobody reads after it."""

    run: Callable[..., Any]
    args: list[Any]
    inputs: list[_Input]
    outputs: list[int | None]
    ended: list[int] = field(default_factory=list)


class TapeRecorder:
    """Records calls on the CPU (see `engine.graphs.Recorder`)."""

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The repeated call; RuntimeError where it reads a value on the host."""
        tape = _Tape()
        with _Listening(tape):
            out = call()
        return tape.repeated(out)


class _Listening(TorchDispatchMode):
    def __init__(self, tape: _Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.tape.note(func, args, kwargs or {}, result)
        return result


class _Tape:
    """What is heard: calls, the slot of each storage that they made and that is still alive, and how the tensor lay in
    it that a slot began with. Nothing is held, so recording needs no more memory than the call."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.slots: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self.made: list[Geometry] = []

    def note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None:
        """An operator was called."""
        if func.name().split(".")[0] in READS:
            raise RuntimeError(f"{func.name()} reads a value on the host, which a recording cannot")
        given, inputs = self._arguments(args)
        known = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
        outputs = [self._output(tensor, known) for tensor in _tensors(result)]
        writes = any(
            argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments
        )
        if writes or any(slot is not None for slot in outputs):
            self.calls.append(_Call(_plain(func, args, kwargs), given, inputs, outputs))

    def _arguments(self, args: Sequence[Any]) -> tuple[list[Any], list[_Input]]:
        """A copy of an operator's arguments, and the tensors of the tape among them."""
        given = [list(value) if isinstance(value, list | tuple) else value for value in args]
        inputs = []
        for place in (given, *(value for value in given if isinstance(value, list))):
            for key, value in enumerate(place):
                slot = self._slot(value) if isinstance(value, Tensor) else None
                if slot is not None:
                    inputs.append(_Input(place, key, slot, self._geometry(slot, value)))
                    place[key] = None
        return given, inputs

    def _geometry(self, slot: int, view: Tensor) -> Geometry | None:
        """How a tensor lies in a slot's storage, where it is not the slot's own."""
        return None if _geometry(view) == self.made[slot] else _geometry(view)

    def _slot(self, tensor: Tensor) -> int | None:
        """The slot of a tensor's storage; None for one from outside."""
        slot, _ = self.slots.get(tensor.untyped_storage()._cdata, (None, None))
        return slot

    def _output(self, tensor: Tensor, known: set[int]) -> int | None:
        """A new slot, unless the storage is that of an argument."""
        storage, slot, slots = tensor.untyped_storage(), len(self.made), self.slots
        key = storage._cdata
        if key in known:
            return None
        slots[key] = slot, weakref.ref(storage, lambda _: slots.pop(key, None))
        self.made.append(_geometry(tensor))
        return slot

    def repeated(self, out: Tensor) -> Callable[[], Tensor]:
        """All calls as one; its result lies where `out` does."""
        last = self._slot(out)
        view = None if last is None else self._geometry(last, out)
        seen = set() if last is None else {last}
        for call in reversed(self.calls):
            touched = {i.slot for i in call.inputs} | {slot for slot in call.outputs if slot is not None}
            call.ended = sorted(touched - seen)
            seen |= touched
        calls, size, result = self.calls, len(self.made), out.detach()

        def again() -> Tensor:
            slots: list[Tensor | None] = [None] * size
            with torch.no_grad():
                for call in calls:
                    _repeat(call, slots)
                if last is not None:
                    whole = slots[last]
                    assert whole is not None, "the result is kept to the end"
                    result.copy_(whole if view is None else whole.as_strided(*view))
            return result

        return again


def _repeat(call: _Call, slots: list[Tensor | None]) -> None:
    for i in call.inputs:
        value = slots[i.slot]
        i.place[i.key] = value if i.geometry is None else value.as_strided(*i.geometry)  # type: ignore[union-attr]
    made = call.run(*call.args)
    for i in call.inputs:
        i.place[i.key] = None
    outputs = call.outputs
    if isinstance(made, Tensor):
        if outputs[0] is not None:
            slots[outputs[0]] = made
    else:
        for slot, tensor in zip(outputs, _tensors(made), strict=True):
            if slot is not None:
                slots[slot] = tensor
    for slot in call.ended:
        slots[slot] = None


def _plain(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The operator without its dispatch where it is ours."""
    name = func.name().split(".")[0].removeprefix("peftdyno::")
    if func.namespace != "peftdyno":
        return partial(func, **kwargs) if kwargs else func
    primitive = PRIMITIVES[name]
    chosen = dispatch.choose(name, primitive.implementations, args[0].device)
    return primitive.implementations[chosen]


def _geometry(tensor: Tensor) -> Geometry:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a result in their order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _tensors(part)
