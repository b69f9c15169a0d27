"""Section `grid`: short runs as PEFT-Bench has them, of several methods on several tasks with several seeds. Together
as a sweep trains them (the seeds of a method and task), and one after another: by us, and by HF Trainer and PEFT.

Timed from the end of a training's warm-up to the end of its last step; models are made and loaded off the clock. Steps
are enough for training to record and replay them where it would, and what it records later is on the clock.
"""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peftdyno.bench.gpu import hf_grid
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Grid, Sizes
from peftdyno.bench.gpu.step import release
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.batching import Example
from peftdyno.engine.border import fit_borders
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.optim import OptimConfig
from peftdyno.engine.train import RunData, TrainConfig, train
from peftdyno.engine.weights import random_weights

TOGETHER = "grid together, seeds of a method and task"
ALL_TOGETHER = "grid together, tasks and seeds of a method"
ALONE = "grid one after another, ours"
TRAINER = "grid one after another, HF Trainer + PEFT"
LOOP = "grid one after another, transformers + PEFT in a plain loop"

Run = tuple[int, int]
"""Task and seed."""
Groups = list[tuple[str, list[Run]]]
"""Of each training: the method, and the runs that train together."""


def theirs(rows: Mapping[str, Any]) -> str:
    """The row of transformers and PEFT: by HF Trainer, by a plain loop where accelerate is not installed.

    Raises KeyError where there is neither.
    """
    found = [name for name in (TRAINER, LOOP) if "runs_per_hour" in rows.get(name, {})]
    if not found:
        raise KeyError(TRAINER)
    return found[0]


def groups(grid: Grid, arrangement: str) -> Groups:
    """The trainings of an arrangement."""
    seeds = grid.seeds if arrangement in (TOGETHER, ALL_TOGETHER) else grid.alone
    runs = list(itertools.product(range(len(grid.tasks)), range(seeds)))
    if arrangement == ALL_TOGETHER:
        parts = [runs]
    elif arrangement == TOGETHER:
        parts = [[run for run in runs if run[0] == task] for task in range(len(grid.tasks))]
    else:
        parts = [[run] for run in runs]
    return [(method, part) for method in grid.methods for part in parts]


def examples(grid: Grid, task: int, vocabulary: int) -> list[Example]:
    """Random rows that begin with the task's instruction and end with two labels."""
    shared, shortest, longest = grid.tasks[task]
    generator = torch.Generator().manual_seed(task)

    def draw(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (n,), generator=generator).tolist())

    instruction = draw(shared)
    lengths = torch.randint(shortest, longest + 1, (grid.rows,), generator=generator).tolist()
    return [Example(tokens=instruction + draw(n - shared), num_prompt=n - 2) for n in lengths]


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row an arrangement."""
    ours = {TOGETHER: 120.0, ALONE: 60.0, ALL_TOGETHER: 120.0}
    wanted = [name for name, takes in ours.items() if section.wants(name, takes)]
    if wanted:
        config = sizes.config()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        decoder = Decoder(config, random_weights(config, dtype, device=device))
        for name in wanted:
            with section.attempt(name):
                section.add(name, **_row(sizes, groups(sizes.grid, name), _ours(decoder, sizes.grid)))
        del decoder
        release(device)
    name = TRAINER if importlib.util.find_spec("accelerate") else LOOP
    if section.wants(name, takes=120.0):
        with section.attempt(name):
            one = hf_grid.Runs(sizes, device, trainer=name == TRAINER).seconds
            section.add(name, **_row(sizes, groups(sizes.grid, name), one))
        release(device)


def _row(sizes: Sizes, trainings: Groups, one: Callable[..., float]) -> dict[str, Any]:
    """Seconds of all trainings, and what follows for runs of as many steps."""
    grid = sizes.grid
    rows = [examples(grid, task, sizes.config().vocab_size) for task in range(len(grid.tasks))]
    seconds = sum(one(name, runs, rows) for name, runs in trainings)
    count = sum(len(runs) for _, runs in trainings)
    each = seconds / (grid.steps - grid.warm_up) / count
    return {
        "runs": count,
        "trainings": len(trainings),
        "steps": grid.steps,
        "seconds": seconds,
        "seconds_a_step_of_a_run": each,
        "runs_per_hour": 3600 / (each * grid.steps),
    }


def _ours(decoder: Decoder, grid: Grid) -> Callable[[str, Sequence[Run], Sequence[list[Example]]], float]:
    """What trains a group as the command does, without validation and checkpoints."""

    def seconds(name: str, runs: Sequence[Run], rows: Sequence[list[Example]]) -> float:
        cls = METHODS[name]
        bank = AdapterBank.create(decoder.config, [cls()] * len(runs), [seed for _, seed in runs], decoder.weights)
        fit_borders(decoder.weights, bank, decoder.device)
        rates = {"learning_rate": cls.learning_rate, "warmup_ratio": hf_grid.WARM_UP_RATIO}
        optim = OptimConfig(**rates, weight_decay=cls.weight_decay)
        data = [
            RunData(train=rows[task], validation=(), optim=optim, steps=grid.steps, batch=grid.batch)
            for task, _ in runs
        ]
        clock, settings = hf_grid.Clock(grid, decoder.device), TrainConfig(evaluate_every=0, save_every=0)
        with tempfile.TemporaryDirectory(prefix="peftdyno-") as folder:
            train(decoder, bank, data, settings, Path(folder), progress=lambda *_: clock.tick())
        return clock.ends[-1] - clock.ends[0]

    return seconds
