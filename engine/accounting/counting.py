"""Counter: sees every operator that runs and charges its cost to the phase, owner and layer that the scope names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftdyno.engine.accounting.conventions import full_square_extra
from peftdyno.engine.accounting.dispatch_mode import DispatchMode
from peftdyno.engine.accounting.formulas import FORMULAS
from peftdyno.engine.accounting.scope import Owner, Scope
from peftdyno.engine.accounting.tally import Place, Tally
from peftdyno.kernels.library import COSTS, Cost


class UnknownOperator(RuntimeError):
    """An operator ran that has no cost formula."""


class Counter(DispatchMode):
    """Counts while it is entered; it may be entered again and goes on with the same tally."""

    def __init__(self, scope: Scope, tally: Tally | None = None) -> None:
        super().__init__()
        self.scope = scope
        self.tally = Tally() if tally is None else tally

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.charge(func, args, result)
        return result

    def charge(self, func: Any, args: Sequence[Any], result: Any) -> Cost:
        """Charge one call; raises UnknownOperator where there is no formula."""
        namespace, name = func.namespace, func._opname
        scope = self.scope
        if namespace == "peftdyno":
            if name not in COSTS:
                raise UnknownOperator(f"peftdyno::{name} has no cost formula; give it one where it is registered")
            owned = COSTS[name](*args)
            extra = full_square_extra(name, args)
            self._add("base", name, owned.base, extra)
            self._add("adapter", name, owned.adapter, 0)
            return owned.base + owned.adapter
        formula = FORMULAS.get(name) if namespace == "aten" else None
        if formula is None:
            raise UnknownOperator(f"{func} has no cost formula; add one to the table of plain operators")
        cost = formula(args, result)
        self._add(scope.running_owner(), name, cost, 0)
        return cost

    def _add(self, owner: Owner, name: str, cost: Cost, extra: int) -> None:
        if cost != Cost() or extra:
            scope = self.scope
            self.tally.add(Place(scope.phase, owner, scope.layer, name), cost, extra)
