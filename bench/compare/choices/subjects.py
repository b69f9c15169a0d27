"""The subjects by name, and the job of a worker process that measures one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peftdyno.bench.compare.choices.decoding import decode
from peftdyno.bench.compare.choices.four_bit import four_bit
from peftdyno.bench.compare.choices.label_noise import noise
from peftdyno.bench.compare.choices.lines import Line
from peftdyno.bench.compare.choices.memory_ways import memory_ways
from peftdyno.bench.compare.choices.products import products
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.choices.steps import hastened, overhead, step, tokens
from peftdyno.bench.compare.choices.stream import stream

SUBJECTS: dict[str, Callable[[Setting], list[Line]]] = {
    "products": products,
    "step": step,
    "overhead": overhead,
    "tokens": tokens,
    "hastened": hastened,
    "decode": decode,
    "stream": stream,
    "memory-ways": memory_ways,
    "four-bit": four_bit,
    "noise": noise,
}
"""Name -> what is measured, in the order of the tables."""


@dataclass
class Subject:
    """One subject under a setting, both as JSON names them."""

    name: str
    setting: dict[str, Any]

    def measure(self) -> dict[str, dict[str, Any]]:
        """Records of its lines by name."""
        return {line.name: line.record() for line in SUBJECTS[self.name](Setting.read(self.setting))}
