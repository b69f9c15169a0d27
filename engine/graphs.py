"""Decoding steps recorded once and replayed: on a GPU a CUDA graph, on a CPU a tape (`engine.tape`), which spare
launching each kernel from the host.

A recording has fixed shapes and addresses. Live sequences are padded, run by run, to the size of a bucket; a padded
row is a token of its own that sees only itself and whose result nobody reads. Before each replay the new tokens, their
positions, the rows they write and what they attend to are put where the recording reads them.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from peftdyno.engine import tape
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.cache import KVCache
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.pack import Pack
from peftdyno.kernels import attention, dispatch, replay
from peftdyno.kernels.adapted_linear import TokenRuns
from peftdyno.kernels.attention import AttentionLayout
from peftdyno.kernels.library import watched

GraphChoice = Literal["auto", "on", "off"]
LEAST_STEPS, LEAST_TAPED = 16, 64
"""New tokens below which `auto` does not record, on a GPU and on a CPU: recording costs about five steps, of which a
replay saves most on a GPU and a seventh on a CPU."""
PADDING = -1
"""Stands for a sequence in a padded row."""


class Recorder(Protocol):
    """Turns a call without arguments, which reads fixed buffers, into one that repeats it."""

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The repeated call; its result lies at the same place every time."""
        ...


class EagerRecorder:
    """Stands in for a recorder: runs the call again, and gives its result where the first one lay."""

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See Recorder."""
        out = call()

        def again() -> Tensor:
            return out.copy_(call())

        return again


@functools.cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    """The one on which all recordings of a card are made: cuBLAS keeps a workspace for every stream that it has met."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See Recorder. The first call compiles kernels and makes their tables, outside the graph."""
        stream = _recording_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=stream):
            out = call()

        def again() -> Tensor:
            graph.replay()
            return out

        return again


def recorder_for(choice: GraphChoice | Recorder, device: torch.device, num_steps: int) -> Recorder | None:
    """What decoding is recorded with, or None to launch every kernel anew.

    `auto` records with Triton's or the C++ kernels, where there are steps enough and nothing counts operations.
    UserError for an unknown choice, and for `on` where a step cannot be recorded.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in get_args(GraphChoice):
        raise unknown("--graphs", choice, get_args(GraphChoice))
    if choice == "off" or device.type not in ("cpu", "cuda"):
        return None
    on_cpu, why = device.type == "cpu", unrecordable(device)
    if choice == "on":
        if why:
            raise UserError(f"--graphs on: {why}")
    elif why or watched() or num_steps < (LEAST_TAPED if on_cpu else LEAST_STEPS):
        return None
    return tape.TapeRecorder() if on_cpu else CudaRecorder()


def unrecordable(device: torch.device) -> str:
    """Why the device's recorder cannot record, and the remedy; empty where it can."""
    if device.type == "cpu":
        return tape.unavailable()
    if dispatch.choose("attention", attention.FORWARD.implementations, device) == "triton":
        return ""
    return "only Triton's kernels can be recorded; give --kernels auto or triton"


def bucket(count: int) -> int:
    """The smallest of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... (powers of two and the numbers half-way) from `count` on."""
    if count <= 2:
        return count
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


@dataclass(frozen=True)
class Step:
    """One new token of each live sequence, in the order of their runs: which sequence, how many tokens it has
    generated before this one, its token and position, and its run."""

    sequences: Sequence[int]
    made: Sequence[int]
    tokens: Sequence[int]
    positions: Sequence[int]
    runs: Sequence[int]


@dataclass
class _GivenAngles(Decoder):
    """The decoder with rotary angles that lie where a recording reads them."""

    angles: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rotary(self, positions: Tensor) -> dict[float, tuple[Tensor, Tensor]]:
        """The angles that were put there."""
        return self.angles


@dataclass
class _Recording:
    """A step for a bucket. inputs: int64 [4, B], tokens, positions, rows of the cache that they write, and in front of
    the last row the bucket's rows of the live sequences."""

    offsets: tuple[int, ...]
    inputs: Tensor
    layout: AttentionLayout
    decoder: _GivenAngles
    tables: replay.Tables = field(default_factory=replay.Tables)
    again: Callable[[], Tensor] | None = None

    def fill(self, cache: KVCache, step: Step) -> Tensor:
        """Put a step where the recording reads it; the rows [L] of its live sequences."""
        counts = [step.runs.count(run) for run in range(len(self.offsets) - 1)]
        starts = zip(self.offsets[:-1], counts, strict=True)
        rows = [row for start, count in starts for row in range(start, start + count)]

        def spread(values: Sequence[int], padding: int) -> list[int]:
            """A value a row of the bucket."""
            wide = [padding] * self.offsets[-1]
            for row, value in zip(rows, values, strict=True):
                wide[row] = value
            return wide

        write, table, chain = cache.tables(spread(step.sequences, PADDING), spread(step.made, 0))
        live = rows + [0] * (self.offsets[-1] - len(rows))
        replay.put(self.inputs, torch.tensor([spread(step.tokens, 0), spread(step.positions, 0), write, live]))
        for theta, angles in Decoder.rotary(self.decoder, self.inputs[1]).items():
            for target, source in zip(self.decoder.angles[theta], angles, strict=True):
                target.copy_(source)
        self.layout.segments.copy_(torch.tensor(table, dtype=torch.int32))
        self.layout.chain.zero_()
        self.layout.chain[: len(chain)] = torch.tensor(chain, dtype=torch.int32)
        self.tables.fill()
        return self.inputs[3, : len(rows)]


@dataclass
class DecodeGraphs:
    """Recorded decoding steps of one batch of prompts, by bucket: the number of rows of each run."""

    decoder: Decoder
    bank: AdapterBank
    pack: Pack
    cache: KVCache
    recorder: Recorder
    recordings: dict[tuple[int, ...], _Recording] = field(default_factory=dict)

    @torch.no_grad()
    def logits(self, step: Step) -> Tensor:
        """Logits [L, V] of the live sequences, in their order."""
        recording = self._recorded(step)
        rows = recording.fill(self.cache, step)
        self.cache.write, self.cache.layout = recording.inputs[2], recording.layout
        with replay.recording(recording.tables):
            if recording.again is not None:
                return recording.again().index_select(0, rows)
            recording.again = self.recorder.record(lambda: self._run(recording))
            expected = self._run(recording).index_select(0, rows)
            found = recording.again().index_select(0, rows)
        _check_same(found, expected)
        return found

    def _run(self, recording: _Recording) -> Tensor:
        none = self.pack.tokens.new_empty(0)
        pack = replace(
            self.pack,
            tokens=recording.inputs[0],
            positions=recording.inputs[1],
            runs=TokenRuns(offsets=recording.offsets),
            layout=recording.layout,
            virtual_rows=none,
            virtual_index=none,
        )
        return recording.decoder.logits(pack, self.bank, cache=self.cache)

    def _recorded(self, step: Step) -> _Recording:
        """The narrowest recording that has room, or a new one where that would compute on more padding than rows."""
        counts = [step.runs.count(run) for run in range(self.pack.num_runs)]
        own = tuple(map(bucket, counts))
        roomy = [r for r in self.recordings if all(n <= width for n, width in zip(counts, r, strict=True))]
        best = min(roomy, key=sum, default=None)
        if best is None or sum(best) > 2 * sum(own):
            best = own
            self.recordings[own] = self._prepared(own, step)
        return self.recordings[best]

    def _prepared(self, widths: tuple[int, ...], step: Step) -> _Recording:
        """Buffers of a bucket. Work lists are made for sequences at their longest; from here on they only end."""
        offsets, padding = (0, *itertools.accumulate(widths)), sum(widths) - len(step.sequences)
        longest = [self.cache.room - 1] * len(step.sequences)
        _, _, chain = self.cache.tables([*step.sequences, *[PADDING] * padding], [*longest, *[0] * padding])
        inputs = torch.zeros(4, sum(widths), dtype=torch.int64, device=self.pack.tokens.device)
        sizes = (sum(widths), 4), (len(chain), 3)
        layout = AttentionLayout(*(torch.zeros(size, dtype=torch.int32) for size in sizes))
        decoder = _GivenAngles(self.decoder.config, self.decoder.weights, self.decoder.scope)
        decoder.angles = Decoder.rotary(decoder, inputs[1])
        recording = _Recording(offsets, inputs, layout, decoder)
        recording.fill(self.cache, replace(step, made=longest))
        self.cache.write, self.cache.layout = inputs[2], layout
        with replay.recording(recording.tables):
            self._run(recording)
        return recording


def _check_same(found: Tensor, expected: Tensor) -> None:
    """RuntimeError where a replay gives other logits than the step it repeats."""
    gap = float((found.float() - expected.float()).norm())
    if not gap <= 8 * torch.finfo(found.dtype).eps * float(expected.float().norm()):
        raise RuntimeError(
            f"a replayed decoding step differs from the step it repeats (by {gap:.3g}); use --graphs off"
        )


def warn_once(error: Exception) -> None:
    """Say that decoding goes on without graphs, and why."""
    warnings.warn(f"decoding goes on without recorded steps: {' '.join(str(error).split())}", stacklevel=2)
