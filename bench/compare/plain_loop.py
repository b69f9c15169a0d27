"""The reference: transformers and PEFT in a plain PyTorch loop, with or without torch.compile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.compare.handover import with_adapter
from peftdyno.bench.compare.memory import resident_peak, storage_bytes, traced_peak
from peftdyno.bench.compare.rows import TokenRow
from peftdyno.bench.compare.turns import timed

IGNORED = -100
"""The label that transformers leaves out of the loss."""


def causal_model(folder: str, dtype: str) -> Any:
    """transformers' model in bf16 with its own default attention; fp32 means bf16's values in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.use_cache = False
    return model.float() if dtype == "fp32" else model


def padded(batch: Sequence[Mapping[str, Any]], pad: int = 0) -> dict[str, Tensor]:
    """input_ids, labels and attention_mask, padded on the right to the batch's longest row."""
    rows = [TokenRow.read(row) for row in batch]
    width = max(len(row.tokens) for row in rows)
    blank = [width - len(row.tokens) for row in rows]
    ids = [[*row.tokens, *[pad] * n] for row, n in zip(rows, blank, strict=True)]
    labels = [
        [*[IGNORED] * row.num_prompt, *row.tokens[row.num_prompt :], *[IGNORED] * n]
        for row, n in zip(rows, blank, strict=True)
    ]
    mask = [[1] * len(row.tokens) + [0] * n for row, n in zip(rows, blank, strict=True)]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }


@dataclass
class PlainSteps:
    """Steps of AdamW with clipping over fixed batches, one after another and round again.

    The rate is constant, or with `schedule_steps` a cosine with a tenth of warm-up.
    """

    model: str
    adapter: str
    batches: list[list[dict[str, Any]]]
    learning_rate: float
    weight_decay: float = 1e-5
    schedule_steps: int = 0
    dtype: str = "bf16"
    compiled: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.wrapped = with_adapter(causal_model(self.model, self.dtype), self.adapter, trainable=True).train()
        self.parameters = [p for p in self.wrapped.parameters() if p.requires_grad]
        options = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        self.optimizer = torch.optim.AdamW(self.parameters, **options)
        self.schedule = self._schedule()
        self.inputs = [padded(batch) for batch in self.batches]
        self.run = torch.compile(self.wrapped) if self.compiled else self.wrapped
        self.step = 0

    def _schedule(self) -> Any:
        if not self.schedule_steps:
            return None
        from transformers import get_cosine_schedule_with_warmup

        warm_up = -(-self.schedule_steps // 10)
        return get_cosine_schedule_with_warmup(self.optimizer, warm_up, self.schedule_steps)

    def trajectory(self, steps: int) -> dict[str, list[float]]:
        """Losses and gradient norms of the next steps."""
        found = [self.take_step() for _ in range(steps)]
        return {"losses": [loss for loss, _ in found], "norms": [norm for _, norm in found]}

    def label_losses(self) -> list[float]:
        """Cross-entropy of each label of the first batch."""
        inputs = self.inputs[0]
        with torch.no_grad():
            logits = self.wrapped(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
        width = inputs["input_ids"].shape[1]
        logits, labels = logits[:, -width:-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
        return losses[labels != IGNORED].tolist()

    def measure(self, steps: int) -> dict[str, float]:
        """Seconds of some steps."""
        return timed(lambda: self._run(steps))

    def measure_memory(self) -> dict[str, float]:
        """One step's time and the largest resident set while it ran."""
        return resident_peak(self.take_step)

    def allocated_peak(self) -> dict[str, int] | None:
        """Bytes that PyTorch's allocator held at most during a step; None where nothing records it."""
        traced = traced_peak(self.take_step)
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        held = storage_bytes([*self.wrapped.parameters(), *self.wrapped.buffers(), *moments])
        return None if traced is None else {"held": held, "step": traced}

    def save(self, folder: str) -> None:
        """The adapter in PEFT's own files."""
        self.wrapped.save_pretrained(folder)

    def _run(self, steps: int) -> int:
        for _ in range(steps):
            self.take_step()
        return steps

    def take_step(self) -> tuple[float, float]:
        """Forward, backward, clip, update: the loss and the gradient's norm."""
        loss = self.run(**self.inputs[self.step % len(self.inputs)]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item(), norm.item()
