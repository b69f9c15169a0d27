"""Training steps on a CPU, recorded as tapes: packs padded by a few rows only, to one of many sizes.

A step computes its padding with a recording and without, so its results are the same to the bit, and which steps are
replayed may depend on what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.pack import Pack
from peftdyno.engine.pack_padding import PackSize, padded
from peftdyno.engine.step_graphs import NUM_CHECKED, Recording, StepGraphs, check_same
from peftdyno.engine.tape import Repeated

MOST_TAPES = 128
"""Recordings kept; the one not used for longest goes first."""
MOST_TOKENS = 1024
"""Of a pack that `auto` records: beyond, the host's time is small beside the processor's."""
SEEN_BEFORE = 2
"""Packs of a size that are computed without a recording before one is made: many sizes do not come again."""
SKETCHED = 64
"""Elements of a gradient whose sum stands for them where two steps are compared."""


@dataclass
class StepTapes(StepGraphs):
    """Recorded micro-batches of one training of one run. Recordings are made and checked by the first pack of a step,
    when there is nothing to add to, so that no gradient is kept beside the bank's."""

    seen: dict[PackSize, int] = field(default_factory=dict)

    def forward_backward(self, packs: Sequence[Pack], step: int, ledger: Ledger) -> tuple[list[float], int]:
        """Gradients of a step's packs into the bank's; each run's loss and the number of tokens that count. UserError
        where recordings were asked for and cannot be had."""
        with ledger.phase("forward", owner="adapter", layer=-1):
            self.start(step)
        for i, pack in enumerate(packs):
            self.add(pack, ledger, first=i == 0)
        return self.sums.tolist(), sum(pack.num_tokens for pack in packs)

    def computed(self, packs: Sequence[Pack]) -> Sequence[Pack]:
        """The packs with their padding."""
        return [padded(pack, PackSize.of(pack, fine=True)) for pack in packs]

    def pays(self, pack: Pack) -> bool:
        """Whether `auto` records a pack."""
        return pack.num_tokens <= MOST_TOKENS

    def add(self, pack: Pack, ledger: Ledger, *, first: bool) -> None:
        """Add a pack's gradients and losses; `first` where none of the step's were added before."""
        size = PackSize.of(pack, fine=True)
        wide = padded(pack, size)
        ledger.see(wide)
        self.seen[size] = self.seen.get(size, 0) + 1
        recording = self.recordings.pop(size, None)
        if recording is not None:
            self.recordings[size] = recording  # the one used last
        if recording is not None and recording.num_checked == NUM_CHECKED:
            _replay(recording, wide, ledger)
        elif self.complaint or not first or self.seen[size] <= SEEN_BEFORE:
            self.launch(wide, ledger)
        else:
            with ledger.phase("backward"):
                self._add_alone(wide, size, recording)
            ledger.recording_bytes = sum(r.nbytes() for r in self.recordings.values())

    def _add_alone(self, wide: Pack, size: PackSize, recording: Recording | None) -> None:
        """The first pack of a step by its recording, once it is seen to give what the call gave that was recorded, or,
        where it was recorded before, what the step gives without it."""
        try:
            if recording is None:
                recording = self.recorded(wide, size)
            else:
                self.launch(wide, self.quiet)
            expected = self._sketch()
            self.clear()
            recording.replay(wide)
            check_same(self._sketch(), expected, self.decoder.dtype)
        except RuntimeError as error:
            self.clear()
            self.give_up(error)
        if self.complaint:
            self.launch(wide, self.quiet)
            return
        assert recording is not None, "made above"
        self.keep(recording, MOST_TAPES)

    def _sketch(self) -> list[Tensor]:
        """Sums of neighbours in each run's gradient, [R, P / 64], and the losses."""
        gradient = self.bank.gradient
        runs, count = gradient.shape[0], gradient.shape[1] // SKETCHED
        whole, rest = gradient[:, : count * SKETCHED], gradient[:, count * SKETCHED :]
        sums = whole.reshape(runs, count, SKETCHED).sum(2), rest.sum(1, keepdim=True)
        return [torch.cat(sums, dim=1), self.sums.clone()]


def _replay(recording: Recording, wide: Pack, ledger: Ledger) -> None:
    """Another pack of a recording's size, its two passes charged apart."""
    with ledger.phase("forward"):
        again = recording.read(wide)
        assert isinstance(again, Repeated), "made by a TapeRecorder"
        again.forward()
    with ledger.phase("backward"):
        again.backward()
