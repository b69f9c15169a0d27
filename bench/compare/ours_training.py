"""Our side of a whole training: the loop as the command runs it, for one seed or several together."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftdyno.bench.compare.handover import hand_over
from peftdyno.bench.compare.ours_steps import base, new_bank
from peftdyno.bench.compare.rows import TokenRow
from peftdyno.engine.batching import Example
from peftdyno.engine.optim import OptimConfig
from peftdyno.engine.panels import PackWeights, packed_weights
from peftdyno.engine.train import RunData, TrainConfig, train


@dataclass
class OurTraining:
    """Trains a run a seed, together, each on all rows in its seed's order. Neither validates nor saves."""

    model: str
    method: str
    options: dict[str, Any]
    rows: list[dict[str, Any]]
    seeds: list[int]
    batch: int
    steps: int
    optim: dict[str, Any]
    share_prefix: Literal["auto", "on", "off"] = "auto"

    def __post_init__(self) -> None:
        self.decoder, self.family = base(self.model)
        tokens = [TokenRow.read(row) for row in self.rows]
        examples = [Example(tokens=row.tokens, num_prompt=row.num_prompt) for row in tokens]
        optim = OptimConfig(**self.optim)
        self.data = [
            RunData(train=examples, validation=(), optim=optim, steps=self.steps, batch=self.batch) for _ in self.seeds
        ]
        self._start()

    def _start(self) -> None:
        self.bank = new_bank(self.decoder, self.method, self.options, self.seeds)

    def save(self, folders: list[str]) -> None:
        """Hand each run's adapter over in PEFT's form."""
        for run, folder in enumerate(folders):
            hand_over(self.bank, run, Path(folder), self.family)

    def trajectory(self) -> dict[str, list[float]]:
        """Losses and gradient norms of the first run's steps."""
        self._start()
        records = self._train()[1]
        return {"losses": [r["loss"][0] for r in records], "norms": [r["grad_norm"][0] for r in records]}

    def finish(self) -> float:
        """Train to the end, in seconds; `save` then hands the trained adapters over."""
        start = time.perf_counter()
        self._start()
        self._train()
        return time.perf_counter() - start

    def _train(self) -> tuple[list[float], list[dict[str, Any]]]:
        """Clock at the end of each step, and the lines of the log."""
        ends: list[float] = []

        def after(*_: object) -> None:
            ends.append(time.perf_counter())
            self._after(ends)

        config = TrainConfig(share_prefix=self.share_prefix, evaluate_every=0, save_every=0)
        with tempfile.TemporaryDirectory(prefix="peftdyno-") as folder:
            train(
                self.decoder, self.bank, self.data, config, Path(folder),
                progress=after,
            )  # fmt: skip
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        return ends, [json.loads(line) for line in lines]

    def _after(self, ends: list[float]) -> None:
        """Called after each step."""


@dataclass
class LongTraining(OurTraining):
    """One training that goes on from turn to turn, in a thread of its own, and waits in between: for what pays only
    after many steps, as recordings do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._asked, self._over = queue.SimpleQueue[int](), queue.SimpleQueue[list[float] | Exception]()
        self._due = 0
        threading.Thread(target=self._go, daemon=True).start()

    def advance(self, steps: int, pack_weights: PackWeights = "off") -> dict[str, float]:
        """Seconds of the next steps, the first of which is not counted; units are runs' examples. With panels of the
        weights while they last where asked for, which change no result."""
        with packed_weights(self.decoder, pack_weights, backward=True):
            self._asked.put(steps)
            found = self._over.get()
        if isinstance(found, Exception):
            raise found
        ends = found[-steps:]
        return {"seconds": ends[-1] - ends[0], "units": float((steps - 1) * self.batch * len(self.seeds))}

    def _after(self, ends: list[float]) -> None:
        self._due -= 1
        if self._due > 0:
            return
        if len(ends) > 1:
            self._over.put(list(ends))
        self._due = self._asked.get()

    def _go(self) -> None:
        try:
            self._train()
            self._over.put(RuntimeError(f"the training of {self.steps} steps is over"))
        except Exception as error:  # whatever ended the thread is told to whoever waits for it
            self._over.put(error)
