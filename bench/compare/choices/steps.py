"""Whole training steps: what dropout, low-rank terms, the host and the number of tokens cost."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peftdyno.bench.compare.choices.lines import Line, milliseconds
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.ours_steps import OurSteps
from peftdyno.bench.compare.rows import TokenRow, text_batch
from peftdyno.bench.compare.step_sections import DROPOUT, LORA, RATE
from peftdyno.bench.compare.turns import Measure, Sample, in_turns
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.pack import Sequence as PackSequence
from peftdyno.engine.pack import build_pack
from peftdyno.engine.weight_files import save_model
from peftdyno.engine.weights import random_weights

WITH_DROPOUT = {**LORA, "dropout": DROPOUT}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", WITH_DROPOUT),
    "lora-no-dropout": ("lora", {**LORA, "dropout": 0.0}),
    "bitfit": ("bitfit", {}),
    "ln-tuning": ("ln-tuning", {}),
}
"""Column -> method and options."""
OVER = tuple((name, "lora") for name in VARIANTS if name != "lora")
NARROW = 32
"""Width of everything in the model whose steps are the host's time."""
HOST_TOKENS = 8
"""Tokens of a sequence there."""


def step(setting: Setting) -> list[Line]:
    """LoRA's step with and without dropout beside methods without low-rank terms."""
    sizes = setting.sizes
    batch = text_batch(sizes.batch, sizes.length, setting.texts)
    what = f"step of {sizes.batch} x {sizes.length} tokens, all labelled"
    return [Line(name="step", what=what, unit="ms", cells=_variants(setting.model, batch, setting.repeats), over=OVER)]


def overhead(setting: Setting) -> list[Line]:
    """The same steps of a model with as many layers of tiny width: what Python and autograd take."""
    config, rows = narrow(setting.config), setting.sizes.batch
    tokens = torch.randint(3, config.vocab_size, (rows, HOST_TOKENS)).tolist()
    batch = [TokenRow(tuple(row), 1).plain() for row in tokens]
    with tempfile.TemporaryDirectory(prefix="peftdyno-") as folder:
        save_model(Path(folder), random_weights(config, torch.bfloat16), config)
        cells = _variants(folder, batch, setting.repeats)
    what = f"step of {rows} x {HOST_TOKENS} tokens, {config.num_hidden_layers} layers of width {NARROW}"
    return [Line(name="step", what=what, unit="ms", cells=cells)]


def narrow(config: DecoderConfig) -> DecoderConfig:
    """As many layers of the smallest useful width."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": NARROW}
    return replace(config, hidden_size=NARROW, intermediate_size=NARROW, vocab_size=4 * NARROW, **heads)


def tokens(setting: Setting) -> list[Line]:
    """LoRA's steps over few and many tokens with one label a sequence: next to nothing of the head's loss;
    and how many tokens a step of a task has."""
    sizes = setting.sizes
    batches = {rows * sizes.length: text_batch(rows, sizes.length, setting.texts) for rows in (1, sizes.batch)}
    measures = {
        str(count): _measure(setting.model, "lora", WITH_DROPOUT, _last_labelled(batch))
        for count, batch in batches.items()
    }
    samples = in_turns(measures, setting.repeats)
    per_token = {f"{name} tokens": milliseconds(_a_unit(found, int(name))) for name, found in samples.items()}
    whole = {f"{name} tokens": milliseconds(found) for name, found in samples.items()}
    few, many = per_token
    return [
        Line(name="step", what="a step, its last tokens labelled", unit="ms", cells=whole),
        Line(name="token", what="a token of it", unit="ms", cells=per_token, over=((few, many),)),
        _pack_line(setting),
    ]


HASTENED = ("launched", "replayed", "panels", "panels, replayed")
"""Columns: --graphs off launches, on replays; --pack-weights on keeps panels."""


def hastened(setting: Setting) -> list[Line]:
    """LoRA's steps launched, replayed from tapes, and with panels of the weights, in turns."""
    sizes, rows = setting.sizes, _batches(setting)[: setting.sizes.task_batches]
    labelled, long = ([text_batch(sizes.batch, n * sizes.length, setting.texts)] for n in (1, 4))
    works = (
        ("shared", f"steps of {sizes.batch} labelled texts, prefix shared", rows, True),
        ("repeated", f"steps of {sizes.batch} labelled texts, prefix repeated", rows, False),
        ("labelled", f"steps of {sizes.batch} x {sizes.length} tokens, all labelled", labelled, False),
        ("long", f"steps of {sizes.batch} x {4 * sizes.length} tokens, all labelled", long, False),
    )
    return [_hastened_line(setting, *work) for work in works]


def _hastened_line(setting: Setting, name: str, what: str, batches: list[list[Any]], share: bool) -> Line:
    settings = {"model": setting.model, "method": "lora", "options": WITH_DROPOUT, "learning_rate": RATE}
    plain, taped = (OurSteps(**settings, batches=batches, share_prefix=share) for _ in range(2))
    taped.settle("on")
    steps = len(batches)
    measures: list[Measure] = [
        lambda _: plain.measure(steps),
        lambda _: taped.measure(steps),
        lambda _: plain.measure_packed(steps),
        lambda _: taped.measure_packed(steps),
    ]
    samples = in_turns(dict(zip(HASTENED, measures, strict=True)), setting.repeats)
    cells = {column: milliseconds(found) for column, found in samples.items()}
    return Line(name=name, what=what, unit="ms", cells=cells, over=tuple((c, HASTENED[0]) for c in HASTENED[1:]))


def _batches(setting: Setting) -> list[list[Any]]:
    """The labelled texts, a batch after another."""
    size = setting.sizes.batch
    return [setting.texts[i : i + size] for i in range(0, len(setting.texts) - size + 1, size)]


def _pack_line(setting: Setting) -> Line:
    """How many tokens a step of the labelled texts has."""
    size = setting.sizes.batch
    batches = [[_sequence(row) for row in batch] for batch in _batches(setting)]
    cells = {
        name: tuple(float(build_pack(batch, share_prefix=shared, losses_only=True).num_tokens) for batch in batches)
        for name, shared in (("prefix shared", True), ("prefix repeated", False))
    }
    return Line(
        name="pack", what=f"{size} of the labelled texts, over {len(batches)} batches", unit="tokens", cells=cells
    )


def _sequence(row: Mapping[str, Any]) -> PackSequence:
    return PackSequence(tokens=tuple(row["tokens"]), num_prompt=row["num_prompt"])


def _variants(model: str, batch: list[dict[str, Any]], repeats: int) -> dict[str, tuple[float, ...]]:
    """Milliseconds of each variant's step, in turns."""
    measures = {name: _measure(model, method, options, batch) for name, (method, options) in VARIANTS.items()}
    return {name: milliseconds(found) for name, found in in_turns(measures, repeats).items()}


def _measure(model: str, method: str, options: dict[str, Any], batch: list[dict[str, Any]]) -> Measure:
    """A turn: one step, the same batch each time."""
    steps = OurSteps(model=model, method=method, options=options, batches=[batch], learning_rate=RATE)
    return lambda _: steps.measure(1)


def _last_labelled(batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a label on their last token alone."""
    return [TokenRow(tuple(row["tokens"]), len(row["tokens"]) - 1).plain() for row in batch]


def _a_unit(samples: Sequence[Sample], units: int) -> list[Sample]:
    """Samples whose work is counted in other units."""
    return [{**sample, "units": units} for sample in samples]
