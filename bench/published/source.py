"""Reads published.json: the printed figures and the settings they belong to."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

from ..pscp import Constants, Exponents, Inputs


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class Settings:
    """Sizes of the methods in the benchmark's configurations."""

    lora_rank: int
    prompt_tokens: int
    p_tuning_hidden: int
    prefix_tokens: int
    prefix_hidden: int


@dataclass(frozen=True)
class PrintedTable:
    """One PSCP table as printed: its exponents and the figure of each method."""

    exponents: Exponents
    pscp: dict[str, float]


@dataclass(frozen=True)
class Published:
    """Everything in published.json that the tables need. Scores in percent, memory in GB of 1e9 bytes."""

    source: dict[str, str]
    model: str
    shape: Shape
    settings: Settings
    tokens: int
    base_tflop: float
    constants: Constants
    performance: dict[str, float]
    parameters: dict[str, int]
    inference_tflop: dict[str, float]
    memory_gb: dict[str, float]
    tables: tuple[PrintedTable, ...]
    bitfit: tuple[PrintedTable, ...]
    scores: dict[str, dict[str, float]]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose inputs are published."""
        return tuple(self.performance)

    @property
    def scored(self) -> tuple[str, ...]:
        """The methods whose score on every data set is published."""
        return tuple(name for name in self.methods if name in self.scores)

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets, in the order of the printed tables."""
        return tuple(self.scores["base"])

    def printed_inputs(self, method: str) -> Inputs:
        """The inputs as printed, FLOPs above the printed base."""
        return Inputs(
            score=self.performance[method],
            parameters=self.parameters[method],
            # Both are printed to two decimals, so their difference has two; rounding removes float noise.
            tflop=round(self.inference_tflop[method] - self.base_tflop, 2),
            memory_gb=self.memory_gb[method],
        )


def _exponents(beta: dict[str, float]) -> Exponents:
    return Exponents(parameters=beta["p"], tflop=beta["f"], memory_gb=beta["m"])


@functools.cache
def published() -> Published:
    """The project's copy of the published figures."""
    data = json.loads(resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8"))
    inputs = data["pscp_inputs"]
    return Published(
        source=data["source"],
        model=data["model"],
        shape=Shape(**data["model_shape"]),
        settings=Settings(**data["settings"]),
        tokens=data["tokens"],
        base_tflop=data["base_inference_tflop"],
        constants=Constants(**data["pscp_constants"]),
        performance={name: row["performance"] for name, row in inputs.items()},
        parameters={name: row["trainable_parameters"] for name, row in inputs.items()},
        inference_tflop={name: row["inference_tflop"] for name, row in inputs.items()},
        memory_gb={name: row["memory_gb"] for name, row in inputs.items()},
        tables=tuple(PrintedTable(_exponents(row["beta"]), row["pscp"]) for row in data["pscp_tables"]),
        bitfit=tuple(PrintedTable(_exponents(row["beta"]), {"bitfit": row["pscp"]}) for row in data["pscp_bitfit"]),
        scores=data["scores"],
    )
