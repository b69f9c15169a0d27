"""Memory ledger: every tensor storage from birth to death, what kind it is, and what was alive at the peak."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from peftdyno.engine.accounting.allocators import Grant, allocator
from peftdyno.engine.accounting.dispatch_mode import DispatchMode
from peftdyno.engine.accounting.formulas import tensors, transferred
from peftdyno.engine.accounting.gpu_scratch import Event, cublas_bytes
from peftdyno.engine.accounting.quick_shapes import quick_shape
from peftdyno.engine.accounting.scope import Phase, Scope
from peftdyno.engine.accounting.workspace import Workspaces

Category = Literal[
    "base weights", "adapter", "optimizer", "gradients", "activations", "logits", "kv cache", "inputs", "workspace"
]
CATEGORIES: tuple[Category, ...] = get_args(Category)


@dataclass
class Block:
    """One storage. `born` and `died` are indices of operations; a block that lives on has `died` None."""

    nbytes: int
    category: Category
    layer: int
    operator: str
    born: int
    died: int | None = None


@dataclass(frozen=True)
class Moment:
    """One operation: where it ran, and the bytes alive while it did, its workspace included."""

    phase: Phase
    layer: int
    operator: str
    live: int
    workspace: int


@dataclass
class MemoryLog:
    """What a tracker saw, in the order of operations."""

    blocks: list[Block] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    reserved_bytes: int = 0
    """What the allocator took from the device at most: on CUDA whole segments, cached blocks included."""

    @property
    def peak_bytes(self) -> int:
        """The largest sum of live storages and workspace."""
        return max((moment.live for moment in self.moments), default=sum(b.nbytes for b in self.blocks))

    @property
    def peak_index(self) -> int:
        """Index of the operation at which the peak was first reached."""
        return max(range(len(self.moments)), key=lambda i: self.moments[i].live, default=0)

    def alive(self, index: int) -> list[Block]:
        """Blocks alive during an operation; its workspace is a block too."""
        found = [b for b in self.blocks if b.born <= index and (b.died is None or b.died > index)]
        if index < len(self.moments) and self.moments[index].workspace:
            moment = self.moments[index]
            found.append(Block(moment.workspace, "workspace", moment.layer, moment.operator, index, index + 1))
        return found

    def by_category(self, index: int) -> dict[str, int]:
        """Live bytes of each category during an operation."""
        sums: dict[str, int] = defaultdict(int)
        for block in self.alive(index):
            sums[block.category] += block.nbytes
        return {name: sums[name] for name in CATEGORIES if sums[name]}

    def curves(self) -> dict[str, list[int]]:
        """Live bytes of each category at every operation."""
        steps = {name: [0] * (len(self.moments) + 1) for name in CATEGORIES}
        for block in self.blocks:
            steps[block.category][min(block.born, len(self.moments))] += block.nbytes
            if block.died is not None:
                steps[block.category][min(block.died, len(self.moments))] -= block.nbytes
        curves = {name: list(itertools.accumulate(changes))[:-1] for name, changes in steps.items()}
        curves["workspace"] = [moment.workspace for moment in self.moments]
        return {name: curve for name, curve in curves.items() if any(curve)}


class MemoryTracker(DispatchMode):
    """Follows storages while it is entered, and may be entered again.

    `kept` are the tensors that exist already, by category; logits are known by their `vocabulary` columns. `runs_on`
    is the type of device whose memory is followed; where `symbolic`, tensors of the meta device stand for it. `probe`
    includes the scratch of the matrix library.
    """

    def __init__(
        self,
        scope: Scope,
        runs_on: str,
        kept: Mapping[Category, Iterable[Tensor]],
        vocabulary: int,
        *,
        symbolic: bool = False,
        probe: bool = False,
    ) -> None:
        super().__init__()
        self.scope = scope
        self._workspaces = Workspaces(runs_on, probe=probe)
        self._library = cublas_bytes() if runs_on == "cuda" else 0
        self._allocator = allocator(runs_on)
        self.symbolic = symbolic
        self.devices = {"meta"} | ({"cpu"} & {runs_on}) if symbolic else {runs_on}
        self.vocabulary = vocabulary
        self.log = MemoryLog()
        self._live = 0
        self._alive: dict[int, tuple[Block, weakref.ref[Any]]] = {}
        self.begin(kept)

    def begin(self, kept: Mapping[Category, Iterable[Tensor]]) -> None:
        """Start the log anew with what is alive, of which `kept` are those of known categories."""
        for category, held in kept.items():
            for tensor in held:
                self._meet(tensor, category, "")
                if (found := self._alive.get(tensor.untyped_storage()._cdata)) is not None:
                    found[0].category = category
        for block, _ in self._alive.values():
            block.born = 0
        self.log = MemoryLog([block for block, _ in self._alive.values()])

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = quick_shape(func, args, kwargs or {}) if self.symbolic else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        self.follow(func, args, result)
        return result

    def follow(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """Note what one call found and made."""
        for tensor in tensors(list(args)):
            self._meet(tensor, "inputs", "")
        name, events = func._opname, self._workspaces.events(func.namespace, func._opname, args)
        most, grants = self._replay(events or ())
        for place, tensor in enumerate(tensors(result)):
            sent = name == "_to_copy" and transferred(args, tensor)
            category = "inputs" if sent else self._category(tensor)
            self._meet(tensor, category, name, grants.get(place))
        if events is None:
            held = self._library + self._workspaces.of(func.namespace, name, args)
        else:
            held = self._library + max(most - self._live, 0)
        scope = self.scope
        self.log.reserved_bytes = max(self.log.reserved_bytes, self._allocator.reserved + self._library)
        self.log.moments.append(Moment(scope.phase, scope.layer, name, self._live + held, held))

    def _replay(self, events: Sequence[Event]) -> tuple[int, dict[int, Grant]]:
        """Most bytes alive in a call that allocates so, and the grants of its results by their place."""
        live = most = self._live
        scratch: dict[int, Grant] = {}
        results: dict[int, Grant] = {}
        for event in events:
            if event.nbytes is None:
                grant = scratch.pop(event.storage)
                live -= grant.nbytes  # a freed block grows by its neighbours
                self._allocator.release(grant)
                continue
            grant = self._allocator.grant(event.nbytes)
            live += grant.nbytes
            most = max(most, live)
            if event.result < 0:
                scratch[event.storage] = grant
            else:
                results[event.result] = grant
        return most, results

    def _category(self, tensor: Tensor) -> Category:
        if tensor.dim() and tensor.shape[-1] == self.vocabulary and tensor.is_floating_point():
            return "logits"
        return "gradients" if self.scope.phase == "backward" else "activations"

    def _meet(self, tensor: Tensor, category: Category, operator: str, grant: Grant | None = None) -> None:
        """Start to follow a tensor's storage, unless it is known or elsewhere; `grant`: where it lies already."""
        if tensor.device.type not in self.devices:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        lies = self._allocator.grant(storage.nbytes()) if grant is None else grant
        block = Block(lies.nbytes, category, self.scope.layer, operator, len(self.log.moments))
        self._alive[key] = block, weakref.ref(storage, lambda _: self._lose(key, block, lies))
        self.log.blocks.append(block)
        self._live += block.nbytes

    def _lose(self, key: int, block: Block, grant: Grant) -> None:
        block.died = len(self.log.moments)
        self._live -= block.nbytes
        self._allocator.release(grant)
        self._alive.pop(key, None)
