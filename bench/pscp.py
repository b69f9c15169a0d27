"""PSCP: the mean task score of a fine-tuning method, discounted by what the method costs.

    PSCP = P * (1 + Mp/Cp)^-bp * (1 + Mf/Cf)^-bf * (1 + Mm/Cm)^-bm          (arXiv:2511.21285)

P is the mean score in percent, Mp the trainable parameters, Mf the inference TFLOP above the base model's, Mm
the mean over runs of the peak training memory in GB (1e9 bytes). Every cost may only lower the score.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from peftdyno.engine.errors import UserError

Array = NDArray[np.float64]
ExtraFactor = tuple[float, float, float]


def _check(name: str, value: float, *, positive: bool = False, most: float = math.inf) -> None:
    """Refuses what is not a finite number in [0, most], or (0, most] when `positive`."""
    allowed = f"{'above' if positive else 'at least'} 0" + ("" if most == math.inf else f" and at most {most:g}")
    if not math.isfinite(value) or value < 0 or value > most or (positive and value == 0):
        raise UserError(f"{name} is {value}; it must be a finite number {allowed}")


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The cost that halves a score at exponent 1; the defaults are the published ones."""

    parameters: float = 5e8
    tflop: float = 10.0
    memory_gb: float = 94.0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(f"constants.{field.name}", getattr(self, field.name), positive=True)


@dataclass(frozen=True, kw_only=True)
class Exponents:
    """How strongly each cost counts; 0 leaves a cost out."""

    parameters: float = 1.0
    tflop: float = 1.0
    memory_gb: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(f"exponents.{field.name}", getattr(self, field.name))


PUBLISHED_CONSTANTS = Constants()
ALL_ONE = Exponents()


def factors(
    parameters: float,
    tflop: float,
    memory_gb: float,
    constants: Constants = PUBLISHED_CONSTANTS,
    exponents: Exponents = ALL_ONE,
    extra: Sequence[ExtraFactor] = (),
) -> dict[str, float]:
    """The factor (1 + value/constant)^-exponent of each cost, in (0, 1].

    `tflop` is the inference cost above the base model's. `extra` holds (value, constant, exponent) triples,
    for example time or energy; their factors are named extra[0], extra[1], ... Raises UserError, naming the
    field, for a value that is negative or not finite.
    """
    costs = {"parameters": parameters, "tflop": tflop, "memory_gb": memory_gb}
    terms = {name: (value, getattr(constants, name), getattr(exponents, name)) for name, value in costs.items()}
    terms |= {f"extra[{index}]": triple for index, triple in enumerate(extra)}
    for name, (value, constant, exponent) in terms.items():
        _check(name, value)
        _check(f"the constant of {name}", constant, positive=True)
        _check(f"the exponent of {name}", exponent)
    return {name: (1 + value / constant) ** -exponent for name, (value, constant, exponent) in terms.items()}


def pscp(
    score: float,
    parameters: float,
    tflop: float,
    memory_gb: float,
    constants: Constants = PUBLISHED_CONSTANTS,
    exponents: Exponents = ALL_ONE,
    extra: Sequence[ExtraFactor] = (),
) -> float:
    """PSCP in percent: `score` (percent) times every factor of `factors`."""
    _check("score", score, most=100)
    return score * math.prod(factors(parameters, tflop, memory_gb, constants, exponents, extra).values())


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What PSCP needs to know of one method."""

    score: float
    parameters: float
    tflop: float
    memory_gb: float

    def pscp(self, exponents: Exponents = ALL_ONE, constants: Constants = PUBLISHED_CONSTANTS) -> float:
        """PSCP of these inputs."""
        return pscp(self.score, self.parameters, self.tflop, self.memory_gb, constants, exponents)


@dataclass(frozen=True)
class Uncertainty:
    """A PSCP and its percentile interval over bootstrap draws."""

    estimate: float
    low: float
    high: float
    level: float
    draws: int


def _runs(name: str, values: ArrayLike, shape: tuple[int, ...] | None = None) -> Array:
    """Finite, non-negative values as a [tasks, seeds] array; a scalar is spread over `shape`."""
    array = np.asarray(values, dtype=np.float64)
    if shape is not None and array.ndim == 0:
        array = np.broadcast_to(array, shape)
    if array.ndim != 2 or array.size == 0 or (shape is not None and array.shape != shape):
        wanted = "[tasks, seeds]" if shape is None else f"{list(shape)} like the scores, or one number"
        raise UserError(f"{name} has shape {list(array.shape)}; it must be {wanted}")
    if not np.isfinite(array).all() or (array < 0).any():
        raise UserError(f"{name} holds a negative, missing or infinite value; give one finite number for every run")
    return array


def _resampled(
    shape: tuple[int, int], over: Sequence[str], draws: int, seed: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Task and seed indices, each [draws, tasks, seeds]; seeds are drawn anew inside every drawn task."""
    tasks, seeds = shape
    for name, count in (("tasks", tasks), ("seeds", seeds)):
        if name in over and count < 2:
            raise UserError(f"over names {name}, but there is only one; a single one carries no spread to resample")
    if not over or set(over) - {"tasks", "seeds"}:
        raise UserError(f"over is {tuple(over)}; it must name 'tasks', 'seeds' or both")
    generator = np.random.default_rng(seed)
    # The tasks are drawn first, so methods of different numbers of seeds still share their draws of tasks.
    task = generator.integers(tasks, size=(draws, tasks)) if "tasks" in over else np.tile(np.arange(tasks), (draws, 1))
    full = (draws, tasks, seeds)
    seed_index = generator.integers(seeds, size=full) if "seeds" in over else np.broadcast_to(np.arange(seeds), full)
    return np.broadcast_to(task[:, :, None], full), seed_index


def bootstrap(
    scores: ArrayLike,
    memory_gb: ArrayLike,
    parameters: float,
    tflop: float,
    *,
    constants: Constants = PUBLISHED_CONSTANTS,
    exponents: Exponents = ALL_ONE,
    extra: Sequence[ExtraFactor] = (),
    over: Sequence[str] = ("tasks", "seeds"),
    draws: int = 2000,
    seed: int = 0,
) -> Array:
    """PSCP of `draws` resamples of the runs, [draws].

    `scores` is [tasks, seeds] in percent; `memory_gb` has the same shape, or is one number for all runs. A
    run keeps its score and memory together. With the same `seed` every method draws the same tasks, so the
    difference of two methods' draws is a paired comparison. Raises UserError for a missing run: it is never
    skipped.
    """
    runs = _runs("scores", scores)
    memory = _runs("memory_gb", memory_gb, runs.shape)
    if draws < 1:
        raise UserError(f"draws is {draws}; it must be at least 1")
    task, seed_index = _resampled((runs.shape[0], runs.shape[1]), over, draws, seed)
    score_draws = runs[task, seed_index].mean(axis=(1, 2))
    memory_draws = memory[task, seed_index].mean(axis=(1, 2))
    fixed = factors(parameters, tflop, 0.0, constants, exponents, extra)
    memory_factor = (1 + memory_draws / constants.memory_gb) ** -exponents.memory_gb
    return np.asarray(score_draws * math.prod(fixed.values()) * memory_factor)


def interval(draws: Array, level: float = 0.95) -> tuple[float, float]:
    """The central percentile interval of bootstrap draws."""
    if not 0 < level < 1:
        raise UserError(f"level is {level}; it must lie between 0 and 1")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def uncertainty(
    scores: ArrayLike,
    memory_gb: ArrayLike,
    parameters: float,
    tflop: float,
    *,
    constants: Constants = PUBLISHED_CONSTANTS,
    exponents: Exponents = ALL_ONE,
    extra: Sequence[ExtraFactor] = (),
    over: Sequence[str] = ("tasks", "seeds"),
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Uncertainty:
    """PSCP of all runs and its bootstrap interval; arguments as for `bootstrap`."""
    drawn = bootstrap(
        scores,
        memory_gb,
        parameters,
        tflop,
        constants=constants,
        exponents=exponents,
        extra=extra,
        over=over,
        draws=draws,
        seed=seed,
    )
    score, memory = (float(np.asarray(runs, dtype=np.float64).mean()) for runs in (scores, memory_gb))
    estimate = pscp(score, parameters, tflop, memory, constants, exponents, extra)
    return Uncertainty(estimate, *interval(drawn, level), level, draws)


def ranks(values: Mapping[str, float]) -> dict[str, int]:
    """Rank of each method, 1 the highest; equal values share the better rank."""
    return {name: 1 + sum(other > value for other in values.values()) for name, value in values.items()}


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b of two orderings: 1 the same, -1 the reverse; NaN where one is all ties."""
    upper = np.triu_indices(len(first), k=1)
    one, two = (np.sign(np.subtract.outer(values, values))[upper] for values in (first, second))
    scale = math.sqrt(float(np.abs(one).sum()) * float(np.abs(two).sum()))
    return float((one * two).sum()) / scale if scale else math.nan


@dataclass(frozen=True)
class RankStability:
    """How the ranks of methods hold as the exponents vary: shares are of the settings of the grid."""

    rank: dict[str, int]
    kept: dict[str, float]
    best: dict[str, int]
    worst: dict[str, int]
    mean_tau: float
    least_tau: float
    settings: int


def exponent_grid(values: Iterable[float] = (0.5, 1, 2, 3, 4)) -> list[Exponents]:
    """Every combination of the values over the three costs."""
    axis = tuple(values)
    return [Exponents(parameters=p, tflop=f, memory_gb=m) for p in axis for f in axis for m in axis]


def rank_stability(
    methods: Mapping[str, Inputs],
    grid: Sequence[Exponents],
    reference: Exponents = ALL_ONE,
    constants: Constants = PUBLISHED_CONSTANTS,
) -> RankStability:
    """Compares the methods' order at `reference` with their order at every setting of `grid`."""
    if len(methods) < 2 or not grid:
        raise UserError(f"ranks need two methods and one setting; there are {len(methods)} and {len(grid)}")
    start = {name: inputs.pscp(reference, constants) for name, inputs in methods.items()}
    varied = [{name: inputs.pscp(setting, constants) for name, inputs in methods.items()} for setting in grid]
    rank, ranked = ranks(start), [ranks(values) for values in varied]
    taus = [kendall_tau(list(start.values()), list(values.values())) for values in varied]
    return RankStability(
        rank=rank,
        kept={name: sum(row[name] == rank[name] for row in ranked) / len(grid) for name in methods},
        best={name: min(row[name] for row in ranked) for name in methods},
        worst={name: max(row[name] for row in ranked) for name in methods},
        mean_tau=float(np.mean(taus)),
        least_tau=min(taus),
        settings=len(grid),
    )
