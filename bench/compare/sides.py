"""Both sides of a section: their worker processes, the settings they share, and where they hand things over."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftdyno.bench.compare.equal_work import LabelNoise, Trajectory, UnequalWork, check_exact_steps, check_steps
from peftdyno.bench.compare.link import Worker, WorkerError, thread_environment
from peftdyno.bench.compare.rows import TaskRows

Tell = Callable[[str], None]
CHECK_STEPS = 4
CHECK_RATE = 2e-4
"""Learning rate of the compared steps: the losses move, and bf16's first steps of AdamW stay close to fp32's."""

CHECK_RATES = {"p-tuning": 1e-5}
"""Where that rate throws the loss up: through the recurrent encoder one step moves every virtual token far."""
ILL_CONDITIONED = ("p-tuning", "prefix-tuning")
"""Methods at whose random start bf16's own error hides whether the sides' gradients agree."""


def tell(text: str) -> None:
    """Progress goes to standard error."""
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured: rounds kept of each comparison, and steps a turn (None: each section's own)."""

    repeats: int = 5
    steps: int | None = None
    compile_seconds: float = 30.0
    """Time in which torch.compile must have finished its first step."""

    def steps_or(self, default: int) -> int:
        """Steps of a turn."""
        return default if self.steps is None else self.steps


@dataclass
class Sides:
    """What a section works with. `model` is a folder that both sides read; `scratch` holds adapters."""

    model: str
    classification: TaskRows
    reasoning: TaskRows
    plan: Plan
    scratch: Path
    threads: int
    tell: Tell = tell
    ours: Worker = field(init=False)
    reference: Worker = field(init=False)

    def __post_init__(self) -> None:
        self.environment = thread_environment(self.threads)
        self.ours, self.reference = self._pair()

    def _pair(self) -> tuple[Worker, Worker]:
        return Worker("ours", self.environment), Worker("reference", self.environment)

    def close(self) -> None:
        """End both processes."""
        self.ours.close()
        self.reference.close()

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Processes that have done nothing yet, for what follows; they end with it."""
        kept = self.ours, self.reference
        self.ours, self.reference = self._pair()
        try:
            yield
        finally:
            self.close()
            self.ours, self.reference = kept

    @contextmanager
    def another(self, name: str) -> Iterator[Worker]:
        """One more process, which ends with it."""
        worker = Worker(name, self.environment)
        try:
            yield worker
        finally:
            worker.close()

    def folder(self, name: str) -> str:
        """A place for an adapter."""
        return str(self.scratch / name)

    def check_plain(
        self,
        method: str,
        options: dict[str, Any],
        batches: list[Any],
        name: str,
        steps: int = CHECK_STEPS,
        compiled: Worker | None = None,
    ) -> dict[str, Any]:
        """Compare steps without dropout by our step and the plain loop, over the batches and round again;
        UnequalWork where they differ. In fp32 on both sides for a method that is `ILL_CONDITIONED`. `compiled` computes
        the plain loop's steps by torch.compile; WorkerError where they are further from fp32's than ours may be."""
        exact = method in ILL_CONDITIONED
        self.tell(f"  {name}: comparing {steps} steps{' in fp32' if exact else ''}")
        rate = CHECK_RATES.get(method, CHECK_RATE)
        settings = {"model": self.model, "batches": batches, "learning_rate": rate}
        self.ours.open("ours.steps", **settings, method=method, options=options, dtype="fp32" if exact else "bf16")
        folder = self.folder(f"check-{name}")
        self.ours.call("save", folder=folder)
        ours = Trajectory(**self.ours.call("trajectory", steps=steps))
        found, labels = {}, {}
        if exact:
            self.reference.open("plain.steps", **settings, adapter=folder, dtype="fp32")
            return check_exact_steps(ours, Trajectory(**self.reference.call("trajectory", steps=steps)))
        for dtype in ("bf16", "fp32"):
            self.reference.open("plain.steps", **settings, adapter=folder, dtype=dtype)
            labels[dtype] = self.reference.call("label_losses")
            found[dtype] = Trajectory(**self.reference.call("trajectory", steps=steps))
        judged = found["bf16"], found["fp32"], LabelNoise(labels["bf16"], labels["fp32"])
        check = check_steps(ours, *judged)
        if compiled is not None:
            allowed = self.plan.compile_seconds
            compiled.open("plain.steps", allowed, **settings, adapter=folder, compiled=True)
            check_compiled(Trajectory(**compiled.call("trajectory", allowed, steps=steps)), *judged)
        return check


def check_compiled(compiled: Trajectory, eager: Trajectory, exact: Trajectory, noise: LabelNoise) -> None:
    """WorkerError unless the compiled loop does the eager one's steps: its rate would be that of other work."""
    try:
        check_steps(compiled, eager, exact, noise)
    except UnequalWork as error:
        sides = {"its": compiled, "the eager loop's": eager, "fp32's": exact}
        losses = ", ".join(f"{name} {' '.join(f'{loss:.4f}' for loss in t.losses)}" for name, t in sides.items())
        raise WorkerError(f"its steps are not those of the loop that it compiles; losses: {losses}") from error
