"""Training steps on a CPU, recorded as tapes that are repeated at all sizes.

A step computes the same with a recording and without, so its results are the same to the bit, and which steps are
replayed may depend on what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise

import torch
from torch import Tensor

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.pack import Pack
from peftdyno.engine.replayed_steps import ReplayedSteps, check_same, integer_arrays, with_integer_arrays
from peftdyno.engine.sized_tape import SizedTape
from peftdyno.engine.tape import Heard, Repeated
from peftdyno.kernels.attention import AttentionLayout

MOST_RECORDED = 16
"""Steps of a training that are recorded; packs that no recording fits are launched from then on."""
MOST_TAPES = 4
"""Of one kind of packs: where there would be more, steps differ in something that never comes again."""
NUM_CHECKED = 3
"""Replays that are compared with the launched step: the first is of the pack that was recorded."""
SKETCHED = 64
"""Elements of a gradient whose sum stands for them where two steps are compared."""
Sizes = tuple[int, ...]
Kind = tuple[tuple[bool, ...], tuple[bool, ...]]
"""Which runs have rows and which have labels."""


@dataclass
class StepTapes(ReplayedSteps):
    """Recorded micro-batches of one training. Recordings are made and checked by the first pack of a step, when there
    is nothing to add to, so that no gradient is kept beside the bank's."""

    tapes: dict[Kind, list[SizedTape]] = field(default_factory=dict)
    num_recorded: int = 0

    def forget(self) -> None:
        """Drop all recordings."""
        self.tapes.clear()

    def forward_backward(self, packs: Sequence[Pack], step: int, ledger: Ledger) -> tuple[list[float], int]:
        """Gradients of a step's packs into the bank's; each run's loss and the number of tokens that count. UserError
        where recordings were asked for and cannot be had."""
        with ledger.phase("forward", owner="adapter", layer=-1):
            self.start(step)
        for i, pack in enumerate(packs):
            self.add(pack, ledger, first=i == 0)
        return self.sums.tolist(), sum(pack.num_tokens for pack in packs)

    def add(self, pack: Pack, ledger: Ledger, *, first: bool) -> None:
        """Add a pack's gradients and losses; `first` where none of the step's were added before."""
        ledger.see(pack)
        sizes = sizes_of(pack)
        tape = next((tape for tape in self.tapes.get(_kind(pack), ()) if tape.fits(sizes)), None)
        if tape is not None and tape.num_checked == NUM_CHECKED:
            _replay(tape.at(sizes, given_of(pack)), ledger)
        elif self.complaint or not first or (tape is None and self.num_recorded == MOST_RECORDED):
            self.launch(pack, ledger)
        else:
            with ledger.phase("backward"):
                self._add_alone(pack, sizes, tape)

    def _add_alone(self, pack: Pack, sizes: Sizes, tape: SizedTape | None) -> None:
        """The first pack of a step by a tape, once it is seen to give what the call gave that was recorded, or, where
        it was recorded before, what the step gives without it."""
        try:
            if tape is None:
                tape = self._recorded(pack, sizes)
            else:
                self.launch(pack, self.quiet)
            expected = self._sketch()
            self.clear()
            tape.at(sizes, given_of(pack))()
            check_same(self._sketch(), expected, self.decoder.dtype)
            tape.num_checked = min(tape.num_checked + 1, NUM_CHECKED)
        except RuntimeError as error:
            self.clear()
            self.give_up(error)
        if self.complaint:
            self.launch(pack, self.quiet)

    def _recorded(self, pack: Pack, sizes: Sizes) -> SizedTape:
        """The tape of a pack, which is added: one that is there already and has learned of it, or a new one.
        RuntimeError where there would be too many."""
        own, tapes = _of_its_own(pack), self.tapes.setdefault(_kind(pack), [])
        heard = Heard(given_of(own)).listen(lambda: self.run(own))
        self.keyed.state.clear()
        self.num_recorded += 1
        for tape in tapes:
            if tape.learn(heard, sizes):
                return tape
        if len(tapes) == MOST_TAPES:
            raise RuntimeError("the steps of this training differ in more than their sizes")
        tapes.append(SizedTape(heard, sizes))
        return tapes[-1]

    def _sketch(self) -> list[Tensor]:
        """Sums of neighbours in each run's gradient, [R, P / 64], and the losses."""
        gradient = self.bank.gradient
        runs, count = gradient.shape[0], gradient.shape[1] // SKETCHED
        whole, rest = gradient[:, : count * SKETCHED], gradient[:, count * SKETCHED :]
        sums = whole.reshape(runs, count, SKETCHED).sum(2), rest.sum(1, keepdim=True)
        return [torch.cat(sums, dim=1), self.sums.clone()]


def _replay(again: Repeated, ledger: Ledger) -> None:
    """A replay, its two passes charged apart."""
    with ledger.phase("forward"):
        again.forward()
    with ledger.phase("backward"):
        again.backward()


def sizes_of(pack: Pack) -> Sizes:
    """All sizes that a step depends on."""
    labels, layout = pack.labels, pack.layout
    counts = pack.num_tokens, pack.virtual_rows.numel(), len(layout.segments), len(layout.chain)
    offsets = pack.runs.offsets, labels.run_offsets, labels.row_runs.offsets
    of_runs = [b - a for own in offsets for a, b in pairwise(own)]
    return (*counts, *chain.from_iterable(offsets), *of_runs)


def given_of(pack: Pack) -> list[Tensor]:
    """All arrays that a step reads."""
    return [*integer_arrays(pack), pack.labels.weight, pack.layout.segments, pack.layout.chain]


def _of_its_own(pack: Pack) -> Pack:
    """The pack with arrays that share no memory."""
    arrays: dict[int, Tensor] = {}
    for array in given_of(pack):
        own = array.clone() if array.untyped_storage()._cdata in arrays else array
        arrays[own.untyped_storage()._cdata] = own
    *integers, weight, segments, links = arrays.values()
    return replace(with_integer_arrays(pack, integers, weight), layout=AttentionLayout(segments, links))


def _kind(pack: Pack) -> Kind:
    runs, labels = (tuple(a < b for a, b in pairwise(o)) for o in (pack.runs.offsets, pack.labels.run_offsets))
    return runs, labels
