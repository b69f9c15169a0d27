"""What bf16 does to the loss of a label and to the mean of a batch: whether labels err independently."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.compare.choices.lines import Line
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.ours_steps import base, new_bank
from peftdyno.bench.compare.plain_loop import causal_model
from peftdyno.bench.compare.rows import TokenRow
from peftdyno.bench.compare.step_sections import LORA
from peftdyno.engine.pack import Sequence as PackSequence
from peftdyno.engine.pack import build_pack


def noise(setting: Setting) -> list[Line]:
    """Root mean squares over the errors of labels and over the means of batches, of transformers' bf16 and of ours
    against transformers in fp32; and what the means would have if labels, or sequences, erred independently.

    Nothing is timed: a repeat would give the same.
    """
    batches = _batches(setting)
    exact = _by_transformers(setting.model, batches, "fp32")
    sides = {"transformers": _by_transformers(setting.model, batches, "bf16"), "ours": _by_us(setting.model, batches)}
    errors = {side: [a - b for a, b in zip(found, exact, strict=True)] for side, found in sides.items()}
    labels = sum(len(found) for found in exact) / len(batches)
    rms = {side: _rms(torch.cat(found)) for side, found in errors.items()}
    means = {side: _rms(torch.stack([error.mean() for error in found])) for side, found in errors.items()}
    size = setting.sizes.batch
    return [
        _line("label", f"a label, over {len(batches)} batches of {size} sequences, {labels:.1f} labels each", rms),
        _line("batch", "the mean of a batch", means),
        _line("sequences", f"it, if {size} sequences erred independently", _over(rms, size)),
        _line("labels", f"it, if {labels:.1f} labels erred independently", _over(rms, labels)),
    ]


def _line(name: str, what: str, values: dict[str, float]) -> Line:
    return Line(name=name, what=what, unit="rms of the loss", cells={side: (value,) for side, value in values.items()})


def _over(values: dict[str, float], count: float) -> dict[str, float]:
    return {side: value / math.sqrt(count) for side, value in values.items()}


def _rms(errors: Tensor) -> float:
    return errors.square().mean().sqrt().item()


def _batches(setting: Setting) -> list[list[TokenRow]]:
    """The first batches of the texts."""
    size = setting.sizes.batch
    count = min(setting.sizes.noise_batches, len(setting.texts) // size)
    rows = [TokenRow.read(row) for row in setting.texts[: count * size]]
    return [rows[i * size : (i + 1) * size] for i in range(count)]


@torch.no_grad()
def _by_transformers(folder: str, batches: Sequence[Sequence[TokenRow]], dtype: str) -> list[Tensor]:
    """Losses of each batch's labels, a sequence at a time."""
    model: Any = causal_model(folder, dtype).eval()
    found = []
    for batch in batches:
        losses = []
        for row in batch:
            logits = model(torch.tensor([row.tokens])).logits[0].float()
            first = max(row.num_prompt, 1)
            labels = torch.tensor(row.tokens[first:])
            losses.append(torch.nn.functional.cross_entropy(logits[first - 1 : -1], labels, reduction="none"))
        found.append(torch.cat(losses))
    return found


@torch.no_grad()
def _by_us(folder: str, batches: Sequence[Sequence[TokenRow]]) -> list[Tensor]:
    """The same by this program, a batch at a time; LoRA at its start changes nothing."""
    decoder, _ = base(folder)
    bank = new_bank(decoder, "lora", LORA, [0])
    bank.begin(0, training=False)
    found = []
    for batch in batches:
        sequences = [PackSequence(tokens=row.tokens, num_prompt=row.num_prompt) for row in batch]
        found.append(decoder.losses(build_pack(sequences), bank).float())
    return found
