"""Training steps recorded once a size of pack and replayed, as CUDA graphs: no kernel is launched from the host.

A recording computes one micro-batch: what the method prepares, forward pass, backward pass, and what the method carries
back. It adds gradients to the bank's and losses to a sum on the device. Before a replay the pack, padded to the
recording's size, the keys of the step's random streams and the work lists of attention are put where it reads them.
Clipping and AdamW are a handful of launches, which need the norms on the host, and stay outside. What is other on a CPU
is in `engine.step_tapes`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import SITES
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.graphs import GraphChoice, Recorder
from peftdyno.engine.pack import Pack
from peftdyno.engine.pack_padding import PackSize, padded
from peftdyno.kernels import replay
from peftdyno.kernels.adapted_linear import LinearEdits, TokenRuns

MOST_FLOPS = 1e12
"""Matrix FLOPs of a layer in one micro-batch above which `auto` does not record. A layer takes the host about 2 ms to
launch forward and backward, in which a GPU of 500 TFLOP/s does this much; beyond, padding would cost more than
launching. An estimate, not measured."""
MOST_RECORDINGS = 32
"""Recordings kept; the one not used for longest goes first."""
NUM_CHECKED = 2
"""Replays of a recording that are compared with the eager step: the second is the first of another pack's tables."""


@dataclass
class _AskedKeys(AdapterBank):
    """The bank, noting of which random streams its method asks the keys."""

    asked: list[tuple[str, int]] = field(default_factory=list)

    def keys(self, purpose: str, layer: int) -> list[int]:
        """The 64-bit key of each run."""
        self.asked.append((purpose, layer))
        return super().keys(purpose, layer)


@dataclass
class _GivenKeys(AdapterBank):
    """The bank with keys of random streams that lie where a recording reads them, and a state of its own."""

    asked: tuple[tuple[str, int], ...] = ()
    given: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """[M, R] by layer and site: views of `lying`, in the order of `asked`."""
    lying: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def like(cls, bank: AdapterBank) -> _GivenKeys:
        """The parameters and gradients of a bank."""
        shared = {item.name: getattr(bank, item.name) for item in fields(AdapterBank)}
        shared |= {"state": {}, "training": True}
        probe = _AskedKeys(**shared)
        edits = {(i, site): probe.linear(i, site) for i in range(bank.config.num_hidden_layers) for site in SITES}
        keys = {place: e.keys for place, e in edits.items() if e is not None and e.keys is not None}
        made = cls(**shared, asked=tuple(probe.asked))
        expected = [key for own in keys.values() for key in own.flatten().tolist()]
        assert expected == made._keys_of_step(), "a method's keys lie as it asked for them"
        made.lying = torch.tensor(expected, dtype=torch.int64, device=bank.flat.device)
        parts = made.lying.split([own.numel() for own in keys.values()])
        made.given = {place: part.view(keys[place].shape) for place, part in zip(keys, parts, strict=True)}
        return made

    def _keys_of_step(self) -> list[int]:
        return [key for purpose, layer in self.asked for key in self.keys(purpose, layer)]

    def fill(self, step: int) -> None:
        """Put the keys of a step where recordings read them."""
        self.step = step
        if self.asked:
            _put(self.lying, torch.tensor(self._keys_of_step()))

    def linear(self, layer: int, site: str) -> LinearEdits | None:
        """Edits of a fused product."""
        edits = super().linear(layer, site)
        given = self.given.get((layer, site))
        return edits if edits is None or given is None else edits.dropped(edits.dropout, given)


def _put(target: Tensor, source: Tensor) -> None:
    """Copy from the CPU without waiting for what runs on the device."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


@dataclass
class Recording:
    """A step of one size. `pack` is where it reads; `integers` are all its integer arrays in one."""

    size: PackSize
    pack: Pack
    integers: Tensor
    tables: replay.Tables = field(default_factory=lambda: replay.Tables(any_layout=True))
    again: Callable[[], Tensor] | None = None
    num_checked: int = 0

    @classmethod
    def of(cls, wide: Pack, size: PackSize, device: torch.device) -> Recording:
        """Buffers of a size, with a pack of that size in them."""
        arrays = _integers(wide)
        integers = torch.cat(arrays).to(device)
        parts = integers.split([array.numel() for array in arrays])
        return cls(size, _with_integers(wide, parts, wide.labels.weight.to(device)), integers)

    def nbytes(self) -> int:
        """Bytes of the arrays that it reads."""
        return self.integers.nbytes + self.pack.labels.weight.nbytes

    def replay(self, wide: Pack) -> None:
        """Compute another pack of the same size."""
        again = self.read(wide)
        with replay.recording(self.tables):
            again()

    def read(self, wide: Pack) -> Callable[[], Tensor]:
        """Put another pack of the same size where the recording reads it, which is then to be called."""
        assert self.again is not None, "replayed before it is recorded"
        _put(self.integers, torch.cat(_integers(wide)))
        _put(self.pack.labels.weight, wide.labels.weight)
        self.pack.layout.segments.copy_(wide.layout.segments)
        self.pack.layout.chain.copy_(wide.layout.chain)
        self.tables.fill()
        return self.again


def _integers(pack: Pack) -> list[Tensor]:
    """The integer arrays of a pack that a step reads."""
    labels, streams, row_streams = pack.labels, pack.runs.streams, pack.labels.row_runs.streams
    assert streams is not None and row_streams is not None, "a pack of sequences has identities"
    own = [pack.tokens, pack.positions, pack.virtual_rows, pack.virtual_index, streams]
    return [*own, labels.index, labels.target, labels.rows, labels.place, row_streams]


def _with_integers(pack: Pack, arrays: Sequence[Tensor], weight: Tensor) -> Pack:
    """The pack with other arrays, in the order of `_integers`."""
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
class StepGraphs:
    """Recorded micro-batches of one training, by size, the one used last at the end.

    `complaint` says why recording was given up, once it was.
    """

    decoder: Decoder
    bank: AdapterBank
    recorder: Recorder
    choice: GraphChoice = "on"
    recordings: dict[PackSize, Recording] = field(default_factory=dict)
    complaint: str = ""

    def __post_init__(self) -> None:
        self.keyed = _GivenKeys.like(self.bank)
        self.sums = torch.zeros(self.bank.num_runs, device=self.bank.flat.device)
        self.quiet = Ledger(self.decoder.scope, on=False)

    def takes(self, packs: Sequence[Pack]) -> bool:
        """Whether a step is replayed, all its packs or none: not where there is no label, and by `auto` not where
        computing takes longer than launching. It follows from the packs, so a resumed training replays the same."""
        return not self.complaint and all(
            p.labels.run_offsets[-1] > 0 and (self.choice != "auto" or self.pays(p)) for p in packs
        )

    def forward_backward(self, packs: Sequence[Pack], step: int, ledger: Ledger) -> tuple[list[float], int]:
        """Gradients of a step's packs into the bank's; each run's loss and the number of tokens that count.

        Both passes are charged to phase `backward`, for a replay is one launch. UserError where graphs were asked for
        and cannot be had.
        """
        with ledger.phase("backward"):
            self.start(step)
            for i, pack in enumerate(packs):
                self.add(pack, ledger, first=i == 0)
            return self.sums.tolist(), sum(pack.num_tokens for pack in packs)

    def start(self, step: int) -> None:
        """Begin a step: no gradients, no losses, its random streams."""
        self.bank.state.clear()  # a live graph of its tensors would be recorded with them
        self.clear()
        self.keyed.fill(step)

    def clear(self) -> None:
        """No gradients, no losses."""
        self.bank.zero_grad()
        self.sums.zero_()

    def computed(self, packs: Sequence[Pack]) -> Sequence[Pack]:
        """The packs as a step that counts computes them: without padding."""
        return packs

    def pays(self, pack: Pack) -> bool:
        """Whether `auto` records a pack."""
        size, layer = PackSize.of(pack), self.decoder.weights.layers[0]
        weights = sum(w.shape[0] * w.shape[1] for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return 4 * size.offsets(size.rows)[-1] * weights <= MOST_FLOPS

    def add(self, pack: Pack, ledger: Ledger, *, first: bool) -> None:
        """Add a pack's gradients and losses; `first` where none of the step's were added before."""
        ledger.see(pack)
        size = PackSize.of(pack)
        recording = self.recordings.pop(size, None)
        if recording is not None and recording.num_checked == NUM_CHECKED:
            self.recordings[size] = recording
            recording.replay(padded(pack, size))
        elif self.complaint:
            self.launch(pack, self.quiet)
        else:
            self._add_checked(pack, size, recording)

    def _add_checked(self, pack: Pack, size: PackSize, recording: Recording | None) -> None:
        """A pack by its recording, made where there is none, once it is seen to give what the eager step gives."""
        kept = self._results()
        try:
            expected = self._alone(lambda: self.launch(pack, self.quiet))
            recording = recording or self.recorded(padded(pack, size), size)
            found = self._alone(lambda: recording.replay(padded(pack, size)))
            check_same(found, expected, self.decoder.dtype)
        except RuntimeError as error:
            self._restore(kept)
            self.give_up(error)
        if self.complaint:  # the failed attempt's tensors are gone by now
            self.launch(pack, self.quiet)
            return
        assert recording is not None, "made above"
        self.keep(recording, MOST_RECORDINGS)
        self._restore([before + own for before, own in zip(kept, found, strict=True)])

    def keep(self, recording: Recording, most: int) -> None:
        """Keep a recording that was seen to be right once more, and no more than so many."""
        recording.num_checked += 1
        self.recordings[recording.size] = recording
        while len(self.recordings) > most:
            del self.recordings[next(iter(self.recordings))]

    def give_up(self, error: RuntimeError) -> None:
        """Forget all recordings; an error unless `auto` may go on without."""
        self.recordings.clear()
        self.keyed.state.clear()
        why = " ".join(str(error).split())
        if self.choice != "auto":
            if isinstance(error, torch.OutOfMemoryError):
                raise error
            raise UserError(f"--graphs on: {why}; give --graphs auto or off") from error
        self.complaint = f"training goes on without recorded steps: {why}"
        warnings.warn(self.complaint, stacklevel=2)

    def recorded(self, wide: Pack, size: PackSize) -> Recording:
        """A recording of a size, made with a pack of it, which is added."""
        recording = Recording.of(wide, size, self.decoder.device)
        with replay.recording(recording.tables):
            recording.again = self.recorder.record(lambda: self._run(recording))
        self.keyed.state.clear()
        return recording

    def _run(self, recording: Recording) -> Tensor:
        """What is recorded; every result lies in the bank's gradient and in the sums."""
        return self._backward(self.keyed, recording.pack, self._losses(self.keyed, recording.pack))

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

    def _results(self) -> list[Tensor]:
        return [self.bank.gradient.clone(), self.sums.clone()]

    def _restore(self, results: Sequence[Tensor]) -> None:
        self.bank.gradient.copy_(results[0])
        self.sums.copy_(results[1])

    def _alone(self, compute: Callable[[], None]) -> list[Tensor]:
        """Gradient and sums of a computation by itself."""
        self.clear()
        compute()
        return self._results()


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
