"""Tally: costs added up by phase, owner, layer and operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from peftdyno.engine.accounting.scope import Owner, Phase
from peftdyno.kernels.library import Cost


@dataclass(frozen=True)
class Charge:
    """What was charged to one place: FLOPs by class, bytes, and how many operations.

    `matrix` counts attention over the pairs that are attended (the causal convention), `matrix_full` as if every
    token attended to its whole sequence (the full-square convention).
    """

    matrix: int = 0
    matrix_full: int = 0
    pointwise: int = 0
    reduction: int = 0
    bytes: int = 0
    calls: int = 0

    def __add__(self, other: Charge) -> Charge:
        return Charge(*(getattr(self, name) + getattr(other, name) for name in CLASSES))

    def __mul__(self, times: int) -> Charge:
        return Charge(*(getattr(self, name) * times for name in CLASSES))

    @property
    def flops(self) -> int:
        """FLOPs of all classes, causal attention."""
        return self.matrix + self.pointwise + self.reduction


CLASSES = tuple(f.name for f in fields(Charge))


@dataclass(frozen=True)
class Place:
    """Where a cost arises. `layer` is -1 before the first layer and num_layers after the last."""

    phase: Phase
    owner: Owner
    layer: int
    operator: str


@dataclass
class Tally:
    """Charges by place."""

    charges: dict[Place, Charge] = field(default_factory=lambda: defaultdict(Charge))

    def add(self, place: Place, cost: Cost, full_square_extra: int = 0) -> None:
        """Charge one operation's cost."""
        full = cost.matrix + full_square_extra
        self.charges[place] += Charge(cost.matrix, full, cost.pointwise, cost.reduction, cost.bytes, 1)

    def merge(self, other: Tally) -> None:
        """Add everything of another tally."""
        for place, charge in other.charges.items():
            self.charges[place] += charge

    def by(self, *names: str) -> dict[tuple[str | int, ...], Charge]:
        """Sums over all but the named fields of `Place`; places that cost nothing at all are left out."""
        sums: dict[tuple[str | int, ...], Charge] = defaultdict(Charge)
        for place, charge in self.charges.items():
            sums[tuple(getattr(place, name) for name in names)] += charge
        return {key: charge for key, charge in sums.items() if charge != Charge(calls=charge.calls)}

    def total(self) -> Charge:
        """The sum of all charges."""
        return sum(self.charges.values(), Charge())


def nested(sums: Mapping[tuple[str | int, ...], Charge]) -> dict[str, dict[str, dict[str, int]]]:
    """{phase: {owner: {class: value}}} out of sums by (phase, owner)."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for (phase, owner), charge in sorted(sums.items()):
        values = {name: getattr(charge, name) for name in CLASSES}
        table.setdefault(str(phase), {})[str(owner)] = values
    return table
