"""Training steps recorded once a size of pack and replayed, as CUDA graphs: no kernel is launched from the host.

A recording computes one micro-batch: what the method prepares, forward pass, backward pass, and what the method carries
back. It adds gradients to the bank's and losses to a sum on the device. Before a replay the pack, padded to the
recording's size, the keys of the step's random streams and the work lists of attention are put where it reads them.
Clipping and AdamW are a handful of launches, which need the norms on the host, and stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.graphs import Recorder
from peftdyno.engine.pack import Pack
from peftdyno.engine.pack_padding import PackSize, padded
from peftdyno.engine.replayed_steps import ReplayedSteps, check_same, integer_arrays, with_integer_arrays
from peftdyno.kernels import replay

MOST_FLOPS = 1e12
"""Matrix FLOPs of a layer in one micro-batch above which `auto` does not record. A layer takes the host about 2 ms to
launch forward and backward, in which a GPU of 500 TFLOP/s does this much; beyond, padding would cost more than
launching. An estimate, not measured."""
MOST_RECORDINGS = 32
"""Recordings kept; the one not used for longest goes first."""
NUM_CHECKED = 2
"""Replays of a recording that are compared with the eager step: the second is the first of another pack's tables."""


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
        arrays = integer_arrays(wide)
        integers = torch.cat(arrays).to(device)
        parts = integers.split([array.numel() for array in arrays])
        return cls(size, with_integer_arrays(wide, parts, wide.labels.weight.to(device)), integers)

    def replay(self, wide: Pack) -> None:
        """Compute another pack of the same size."""
        assert self.again is not None, "replayed before it is recorded"
        replay.put(self.integers, torch.cat(integer_arrays(wide)))
        replay.put(self.pack.labels.weight, wide.labels.weight)
        self.pack.layout.segments.copy_(wide.layout.segments)
        self.pack.layout.chain.copy_(wide.layout.chain)
        self.tables.fill()
        with replay.recording(self.tables):
            self.again()


@dataclass
class StepGraphs(ReplayedSteps):
    """Recorded micro-batches of one training, by size, the one used last at the end."""

    recorder: Recorder = field(kw_only=True)
    recordings: dict[PackSize, Recording] = field(default_factory=dict)

    def forward_backward(self, packs: Sequence[Pack], step: int, ledger: Ledger) -> tuple[list[float], int]:
        """Gradients of a step's packs into the bank's; each run's loss and the number of tokens that count.

        Both passes are charged to phase `backward`, for a replay is one launch. UserError where graphs were asked for
        and cannot be had.
        """
        with ledger.phase("backward"):
            self.start(step)
            for pack in packs:
                self.add(pack, ledger)
            return self.sums.tolist(), sum(pack.num_tokens for pack in packs)

    def forget(self) -> None:
        """Drop all recordings."""
        self.recordings.clear()

    def pays(self, pack: Pack) -> bool:
        """Whether `auto` records a pack: not where computing takes longer than launching. It follows from the pack, so
        a resumed training replays the same."""
        size, layer = PackSize.of(pack), self.decoder.weights.layers[0]
        weights = sum(w.shape[0] * w.shape[1] for w in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return 4 * size.offsets(size.rows)[-1] * weights <= MOST_FLOPS

    def add(self, pack: Pack, ledger: Ledger) -> None:
        """Add a pack's gradients and losses."""
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
        recording.num_checked += 1
        self.recordings[size] = recording
        while len(self.recordings) > MOST_RECORDINGS:
            del self.recordings[next(iter(self.recordings))]
        self._restore([before + own for before, own in zip(kept, found, strict=True)])

    def recorded(self, wide: Pack, size: PackSize) -> Recording:
        """A recording of a size, made with a pack of it, which is added."""
        recording = Recording.of(wide, size, self.decoder.device)
        with replay.recording(recording.tables):
            recording.again = self.recorder.record(lambda: self.run(recording.pack))
        self.keyed.state.clear()
        return recording

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
