"""What recorded training steps are on any device: the pack and the keys of random streams where a recording reads them,
and a step whose every kernel is launched to compare a replay with."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import SITES
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.graphs import GraphChoice
from peftdyno.engine.pack import Pack
from peftdyno.kernels import replay
from peftdyno.kernels.adapted_linear import TokenRuns

Streams = tuple[tuple[str, int], ...]
"""Random streams whose keys make one table: (purpose, layer) of each."""


@dataclass
class _AskedKeys(AdapterBank):
    """The bank, noting the tables of keys that its method asks for."""

    asked: list[Streams] = field(default_factory=list)

    def key_table(self, streams: Sequence[tuple[str, int]]) -> Tensor:
        """Keys of several random streams."""
        self.asked.append(tuple(streams))
        return super().key_table(streams)


@dataclass
class GivenKeys(AdapterBank):
    """The bank with keys of random streams that lie where a recording reads them, and a state of its own."""

    given: dict[Streams, Tensor] = field(default_factory=dict)

    @classmethod
    def like(cls, bank: AdapterBank) -> GivenKeys:
        """The parameters and gradients of a bank."""
        shared = {item.name: getattr(bank, item.name) for item in fields(AdapterBank)} | {"training": True}
        probe = _AskedKeys(**shared | {"state": {}})
        for place in itertools.product(range(bank.config.num_hidden_layers), SITES):
            probe.linear(*place)
        given = {streams: bank.key_table(streams) for streams in probe.asked}
        return cls(**shared | {"state": {}}, given=given)

    def fill(self, step: int) -> None:
        """Put the keys of a step where recordings read them."""
        self.step = step
        for streams, lying in self.given.items():
            replay.put(lying, torch.tensor([self.keys(*stream) for stream in streams]))

    def key_table(self, streams: Sequence[tuple[str, int]]) -> Tensor:
        """Keys of several random streams, where they lie."""
        return self.given[tuple(streams)]


def integer_arrays(pack: Pack) -> list[Tensor]:
    """The integer arrays of a pack that a step reads."""
    labels, streams, row_streams = pack.labels, pack.runs.streams, pack.labels.row_runs.streams
    assert streams is not None and row_streams is not None, "a pack of sequences has identities"
    own = [pack.tokens, pack.positions, pack.virtual_rows, pack.virtual_index, streams]
    return [*own, labels.index, labels.target, labels.rows, labels.place, row_streams]


def with_integer_arrays(pack: Pack, arrays: Sequence[Tensor], weight: Tensor) -> Pack:
    """The pack with other arrays, in the order of `integer_arrays`."""
    tokens, positions, virtual_rows, virtual_index, streams, index, target, rows, place, row_streams = arrays
    row_runs = TokenRuns(offsets=pack.labels.row_runs.offsets, streams=row_streams)
    labels = replace(pack.labels, index=index, target=target, weight=weight, rows=rows, place=place, row_runs=row_runs)
    return replace(
        pack,
        tokens=tokens,
        positions=positions,
        virtual_rows=virtual_rows,
        virtual_index=virtual_index,
        runs=TokenRuns(offsets=pack.runs.offsets, streams=streams),
        labels=labels,
    )


@dataclass
class ReplayedSteps:
    """Recorded micro-batches of one training. `complaint` says why recording was given up, once it was."""

    decoder: Decoder
    bank: AdapterBank
    choice: GraphChoice = "on"
    complaint: str = ""

    def __post_init__(self) -> None:
        self.keyed = GivenKeys.like(self.bank)
        self.sums = torch.zeros(self.bank.num_runs, device=self.bank.flat.device)
        self.quiet = Ledger(self.decoder.scope, on=False)

    def takes(self, packs: Sequence[Pack]) -> bool:
        """Whether a step is replayed, all its packs or none: not where there is no label, and by `auto` not where
        recording does not pay."""
        return not self.complaint and all(
            p.labels.run_offsets[-1] > 0 and (self.choice != "auto" or self.pays(p)) for p in packs
        )

    def pays(self, pack: Pack) -> bool:
        """Whether `auto` records a pack."""
        return True

    def forward_backward(self, packs: Sequence[Pack], step: int, ledger: Ledger) -> tuple[list[float], int]:
        """Gradients of a step's packs into the bank's; each run's loss and the number of tokens that count."""
        raise NotImplementedError

    def start(self, step: int) -> None:
        """Begin a step: no gradients, no losses, its random streams."""
        self.bank.state.clear()  # a live graph of its tensors would be recorded with them
        self.clear()
        self.keyed.fill(step)

    def clear(self) -> None:
        """No gradients, no losses."""
        self.bank.zero_grad()
        self.sums.zero_()

    def forget(self) -> None:
        """Drop all recordings."""
        raise NotImplementedError

    def give_up(self, error: RuntimeError) -> None:
        """Forget all recordings; an error unless `auto` may go on without."""
        self.forget()
        self.keyed.state.clear()
        why = " ".join(str(error).split())
        if self.choice != "auto":
            if isinstance(error, torch.OutOfMemoryError):
                raise error
            raise UserError(f"--graphs on: {why}; give --graphs auto or off") from error
        self.complaint = f"training goes on without recorded steps: {why}"
        warnings.warn(self.complaint, stacklevel=2)

    def run(self, pack: Pack) -> Tensor:
        """What is recorded; every result lies in the bank's gradient and in the sums."""
        return self._backward(self.keyed, pack, self._losses(self.keyed, pack))

    def launch(self, pack: Pack, ledger: Ledger) -> None:
        """Add a pack, every kernel launched."""
        self.bank.step = self.keyed.step
        pack = pack.to(self.decoder.device)
        with ledger.phase("forward"):
            losses = self._losses(self.bank, pack)
        with ledger.phase("backward"):
            self._backward(self.bank, pack, losses)
        self.bank.state.clear()

    def _losses(self, bank: AdapterBank, pack: Pack) -> Tensor:
        bank.begin(bank.step, training=True)
        return self.decoder.losses(pack, bank) * pack.labels.weight

    def _backward(self, bank: AdapterBank, pack: Pack, losses: Tensor) -> Tensor:
        losses.sum().backward()
        bank.finish()
        sizes = [b - a for a, b in zip(pack.labels.run_offsets, pack.labels.run_offsets[1:], strict=False)]
        return self.sums.add_(torch.stack([part.sum() for part in losses.detach().split(sizes)]))


def check_same(found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """RuntimeError where a run's gradient or loss is another, by more than the square root of the dtype's rounding:
    padding changes how products are divided, and a gradient is a small difference of many rounded terms."""
    for name, ours, theirs in zip(("gradient", "loss"), found, expected, strict=True):
        for run, (mine, right) in enumerate(zip(ours, theirs, strict=True)):
            gap, norm = float((mine - right).norm()), float(right.norm())
            if norm < float("inf") and not gap <= torch.finfo(dtype).eps ** 0.5 * norm:
                raise RuntimeError(
                    f"a replayed training step differs from the eager step (the {name} of run {run} by {gap:.3g} of"
                    f" {norm:.3g})"
                )
