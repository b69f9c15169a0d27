"""A decoding step of several sequences: with and without panels, by what it is made of, beside reading the weights."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.compare.choices.lines import Line, milliseconds
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.choices.stream import reading
from peftdyno.bench.compare.ours_steps import base, new_bank
from peftdyno.bench.compare.products import OperatorClock
from peftdyno.bench.compare.step_sections import DROPOUT, LORA
from peftdyno.bench.compare.turns import Sample, in_turns, timed
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.generate import generate
from peftdyno.engine.pack import Sequence
from peftdyno.engine.panels import PackWeights, packed_weights

PARTS = ("attention", "products", "other operators", "rest")


@dataclass
class Watched(Decoder):
    """A decoder that notes when each of its passes begins, and times the operators of every second one after the
    first, which reads the prompts."""

    begins: list[float] = field(default_factory=list)
    clocks: list[OperatorClock] = field(default_factory=list)

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the decoder computes them."""
        number = len(self.begins)
        self.begins.append(time.perf_counter())
        if number == 0 or number % 2:
            return super().logits(*args, **kwargs)
        self.clocks.append(OperatorClock())
        with self.clocks[-1]:
            return super().logits(*args, **kwargs)

    def plain_seconds(self) -> list[float]:
        """Of the steps without a clock, all that happens between two passes included."""
        return [b - a for a, b in zip(self.begins[1::2], self.begins[2::2], strict=True)]


@dataclass
class Decoding:
    """Greedy decoding of a setting's first prompts by an adapter at its start."""

    setting: Setting

    def __post_init__(self) -> None:
        self.decoder, _ = base(self.setting.model)
        self.bank = new_bank(self.decoder, "lora", {**LORA, "dropout": DROPOUT}, [0])
        prompts = self.setting.prompts[: self.setting.sizes.few_rows]
        self.prompts = [Sequence(tokens=tuple(prompt), num_prompt=len(prompt)) for prompt in prompts]

    def turn(self, choice: PackWeights) -> Sample:
        """Seconds of the median step, of its parts, and of making the panels, with their bytes.

        Parts are from steps with a clock around each operator, which lengthens what lies between operators: the rest
        is what a plain step has beside them. It is rather too small, for watched operators go through the dispatcher.
        """
        start = time.perf_counter()
        with packed_weights(self.decoder, choice) as held:
            made = time.perf_counter() - start
            watched = Watched(self.decoder.config, self.decoder.weights)
            new = 1 + 2 * self.setting.sizes.decode_steps
            generate(watched, self.bank, self.prompts, max_new_tokens=new, eos_ids=())
        step = statistics.median(watched.plain_seconds())
        parts = [_parts(clock) for clock in watched.clocks]
        medians = {kind: statistics.median(found[kind] for found in parts) for kind in PARTS[:-1]}
        rest = step - sum(medians.values())
        return {"units": 1.0, "seconds": step, **medians, "rest": rest, "made": made, "held": float(held)}


def _parts(clock: OperatorClock) -> dict[str, float]:
    """Seconds of a step by kind of operator."""
    parts = dict.fromkeys(PARTS[:-1], 0.0)
    for name, operator in clock.operators.items():
        kind = "attention" if "attention" in name else "products" if operator.product_flops else "other operators"
        parts[kind] += operator.seconds
    return parts


def decode(setting: Setting) -> list[Line]:
    """A step's time and parts without and with panels, and how long reading as many bytes as the weights have takes."""
    decoding = Decoding(setting)
    weights = torch.ones(decoding.decoder.weights.num_bytes() // 4)
    read = reading(weights)
    samples = in_turns(
        {
            "no panels": lambda _: decoding.turn("off"),
            "panels": lambda _: decoding.turn("on"),
            "reading": lambda _: {**timed(read), "units": 1.0},
        },
        setting.repeats,
    )
    plain, packed = samples["no panels"], samples["panels"]
    held = packed[0]["held"]
    sides = {"no panels": plain, "panels": packed} if held else {"no panels": plain}
    over = (("panels", "no panels"),) if held else ()
    what = f"a step of {len(decoding.prompts)} sequences"
    note = "" if held else "this processor has no panels"
    lines = [
        Line(name="step", what=what, unit="ms", cells=_cells(sides, "seconds"), over=over, note=note),
        *(Line(name=_field(part), what=f"{part} of it", unit="ms", cells=_cells(sides, part)) for part in PARTS),
        Line(
            name="floor",
            what=f"reading {weights.nbytes / 1e6:.0f} MB, as many as the weights have",
            unit="ms",
            cells={"no panels": milliseconds(samples["reading"])},
        ),
    ]
    return [*lines, *_panel_lines(packed)] if held else lines


def _panel_lines(samples: list[Sample]) -> list[Line]:
    """What keeping the panels takes."""
    made = {"panels": tuple(sample["made"] for sample in samples)}
    held = {"panels": tuple(sample["held"] / 1e6 for sample in samples[:1])}
    return [
        Line(name="make", what="making the panels", unit="s", cells=made),
        Line(name="size", what="their size", unit="MB", cells=held),
    ]


def _cells(sides: dict[str, list[Sample]], name: str) -> dict[str, tuple[float, ...]]:
    return {side: tuple(1e3 * sample[name] for sample in samples) for side, samples in sides.items()}


def _field(part: str) -> str:
    return part.replace(" ", "_")
