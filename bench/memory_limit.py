"""The fastest way to train that fits a memory limit, chosen before the first step from predicted peaks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from peftdyno.bench.byte_sizes import show_enough, show_size
from peftdyno.engine.accounting.memory_predict import step_prediction
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.activations import POLICIES, Policy
from peftdyno.engine.errors import UserError

FLOPS_A_BYTE = {"cpu": 100, "cuda": 200}
"""FLOPs that a device does in about the time it takes to move a byte, in round figures. Only the order in which ways
are tried depends on it (docs/decisions/memory-limit.md)."""


ERROR = 0.01
"""How far a measured peak may lie above the predicted one: what the predictions promise."""
MARGIN = 0.1
"""How far above the limit a peak may be estimated before it is not predicted at all."""
MASTER_COPIES = 5 * 4
"""Bytes of a trained value: master, gradient, two moments and the best master so far, in fp32."""


@dataclass(frozen=True)
class _Line:
    """start + slope * tokens."""

    start: float
    slope: float

    @classmethod
    def through(cls, x: float, y: float, further: float, higher: float) -> _Line:
        """Through two points; through the origin where they are one."""
        slope = (higher - y) / (further - x) if further > x else y / x
        return cls(y - slope * x, slope)

    def at(self, tokens: float) -> float:
        """The value there."""
        return self.start + self.slope * tokens


@dataclass(frozen=True)
class _Lines:
    """Of one policy."""

    peak: _Line
    cost: _Line


@dataclass(frozen=True)
class Way:
    """How a step is computed: which activations are kept, how many sequences of each run are computed at a time, and
    how many runs train together."""

    together: int
    micro_batch: int
    activations: Policy

    def __str__(self) -> str:
        runs = f", {self.together} runs together" if self.together > 1 else ""
        return f"{self.activations}, micro-batch {self.micro_batch}{runs}"

    def needs_less_than(self, other: Way) -> bool:
        """Whether its peak is at most the other's, whatever the model and the data."""
        return (
            self.together <= other.together
            and self.micro_batch <= other.micro_batch
            and POLICIES.index(self.activations) >= POLICIES.index(other.activations)
        )


@dataclass(frozen=True)
class Chosen:
    """A way that fits, and its predicted peak in bytes."""

    way: Way
    peak_bytes: int
    limit: int

    def __str__(self) -> str:
        return f"memory limit {show_size(self.limit)}: {self.way}, {show_size(self.peak_bytes)} predicted"


def enough(peak: int) -> int:
    """The smallest limit that a measured peak keeps to as well."""
    return math.ceil(peak * (1 + ERROR))


def within(limit: int, peak: int) -> bool:
    """Whether a measured peak keeps to a limit as well."""
    return enough(peak) <= limit


class Packs(Protocol):
    """The packs that a training forms, for every way to form them."""

    def largest(self, way: Way) -> Sequence[PackShape]:
        """Those of which one has the highest peak."""
        ...

    def waiting(self, way: Way) -> int:
        """Bytes of the arrays of a step's other packs while one is computed."""
        ...

    def work(self, way: Way) -> tuple[int, int]:
        """Tokens and packs of a few steps of all runs, the same steps for every way."""
        ...


@dataclass(frozen=True)
class Limit:
    """A search among the ways to train `num_runs` runs of the job's method. `policies` and `sizes` (of the groups that
    train together) are those allowed; `held` bytes are taken beside every way."""

    job: Job
    packs: Packs
    limit: int
    batch: int
    policies: Sequence[Policy] = POLICIES
    sizes: Sequence[int] = (1,)
    held: int = 0
    _found: dict[tuple[int, Policy, PackShape, bool], tuple[int, float]] = field(default_factory=dict)

    def choose(self) -> Chosen:
        """The fastest way that fits; UserError with the smallest limit that any fits."""
        first = Way(max(self.sizes), self.batch, self.policies[0])
        if within(self.limit, self.peak(first, probe=False)) and within(self.limit, self.peak(first)):
            return Chosen(first, self.peak(first), self.limit)
        least, floor = self.least()
        if not within(self.limit, floor):
            raise UserError(
                f"memory limit {show_size(self.limit)} is too small for {self.job.methods[0].name}: {least} takes "
                f"{show_size(floor)}; give --memory-limit {show_enough(enough(floor))}, a lower --max-length or a "
                f"smaller model{', or --pack-weights off' if self.held else ''}"
            )
        too_large = [first]
        for way in sorted(self.ways(), key=self._order):
            hopeless = self._estimate(way) > self.limit * (1 + MARGIN)
            if hopeless or any(other.needs_less_than(way) for other in too_large):
                continue
            if within(self.limit, self.peak(way)):
                return Chosen(way, self.peak(way), self.limit)
            too_large.append(way)
        return Chosen(least, floor, self.limit)

    def least(self) -> tuple[Way, int]:
        """The way that needs least, and its peak."""
        way = min(self.ways(), key=lambda way: (way.together, way.micro_batch, -POLICIES.index(way.activations)))
        return way, self.peak(way)

    def ways(self) -> Iterator[Way]:
        """All ways, the micro-batch halved again and again."""
        for together in self.sizes:
            micro = self.batch
            while True:
                yield from (Way(together, micro, policy) for policy in self.policies)
                if micro == 1:
                    break
                micro = (micro + 1) // 2

    def peak(self, way: Way, *, probe: bool = True) -> int:
        """Predicted peak in bytes; with `probe` the scratch of the CPU's matrix library too, whose measurement takes
        products of full size."""
        waiting = self.packs.waiting(way) if self.job.device == "cpu" else 0
        return self.held + waiting + max(self._predicted(way, shape, probe)[0] for shape in self.packs.largest(way))

    def cost(self, way: Way) -> float:
        """Of a few steps of all runs, in FLOPs with bytes at their exchange rate."""
        tokens, packs = self.packs.work(way)
        line = self._lines[way.activations].cost
        return line.slope * tokens + max(line.start, 0.0) * packs

    def _order(self, way: Way) -> tuple[float, int, int, int]:
        """Faster ways first; among equals the one closest to training without a limit."""
        return self.cost(way), -way.together, -way.micro_batch, POLICIES.index(way.activations)

    def _estimate(self, way: Way) -> float:
        """About the peak, without predicting it."""
        tokens = max(shape.num_tokens for shape in self.packs.largest(way))
        return self._lines[way.activations].peak.at(tokens) + self._masters(way) + self.held

    def _masters(self, way: Way) -> int:
        """Bytes that each further run takes whatever its packs."""
        return (way.together - 1) * MASTER_COPIES * self.job.methods[0].trainable_count(self.job.config)

    @cached_property
    def _lines(self) -> dict[Policy, _Lines]:
        """Peak (but for masters) and cost of a pack by its tokens under each policy, through the smallest and the
        largest way."""
        lines = {}
        for policy in self.policies:
            points = []
            for way in (Way(1, 1, policy), Way(max(self.sizes), self.batch, policy)):
                shape = max(self.packs.largest(way), key=lambda s: s.num_tokens)
                peak, cost = self._predicted(way, shape, False)
                points.append((shape.num_tokens, peak - self._masters(way), cost))
            (few, low, cheap), (many, high, dear) = points
            lines[policy] = _Lines(_Line.through(few, low, many, high), _Line.through(few, cheap, many, dear))
        return lines

    def _predicted(self, way: Way, shape: PackShape, probe: bool) -> tuple[int, float]:
        """Peak of a step over one pack, and the cost of its forward and backward pass."""
        key = way.together, way.activations, shape, probe
        if key not in self._found:
            job = replace(self.job, methods=self.job.methods[:1] * way.together, activations=way.activations)
            tally, log = step_prediction(job, [shape.pack()], probe=probe)
            charges = [charge for (phase,), charge in tally.by("phase").items() if phase != "optimizer"]
            rate = FLOPS_A_BYTE[job.device]
            self._found[key] = log.peak_bytes, float(sum(c.matrix + rate * c.bytes for c in charges))
        return self._found[key]
