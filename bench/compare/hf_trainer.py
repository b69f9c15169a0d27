"""The reference: HF Trainer and PEFT as PEFT-Bench configures them (arXiv:2511.21285): bf16, batch 4 padded to its
longest row, no packing, no cache, AdamW, cosine with a tenth of warm-up, gradients clipped at 1."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from peftdyno.bench.compare.handover import with_adapter
from peftdyno.bench.compare.plain_loop import causal_model, padded


class StepClock(TrainerCallback):
    """Clock at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the update."""
        self.ends.append(time.perf_counter())


@dataclass
class TrainerRuns:
    """Training runs one after another: run i has its own adapter and its rows in the order given."""

    model: str
    adapters: list[str]
    rows: list[list[dict[str, Any]]]
    batch: int
    steps: int
    optim: dict[str, Any]
    dtype: str = "bf16"
    models: dict[int, Any] = field(default_factory=dict)

    def measure(self, run: int) -> dict[str, float]:
        """Seconds of one run from the end of the first step, which is not counted, to the end of the last; units are
        examples."""
        clock = StepClock()
        self._train(run % len(self.adapters), clock, log=False)
        steps = len(clock.ends) - 1
        return {"seconds": clock.ends[-1] - clock.ends[0], "units": float(steps * self.batch)}

    def trajectory(self) -> dict[str, list[float]]:
        """Losses and gradient norms of the first run's steps."""
        log = self._train(0, StepClock(), log=True)
        return {"losses": [line["loss"] for line in log], "norms": [line["grad_norm"] for line in log]}

    def _train(self, run: int, clock: StepClock, *, log: bool) -> list[dict[str, Any]]:
        torch.manual_seed(run)
        model = with_adapter(causal_model(self.model, self.dtype), self.adapters[run], trainable=True)
        with tempfile.TemporaryDirectory(prefix="peftdyno-") as folder:
            trainer = Trainer(
                model=model,
                args=self._arguments(folder, log),
                train_dataset=self.rows[run],
                data_collator=padded,
                callbacks=[clock],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [line for line in trainer.state.log_history if "grad_norm" in line]

    def _arguments(self, folder: str, log: bool) -> TrainingArguments:
        return TrainingArguments(
            output_dir=folder,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch,
            learning_rate=self.optim["learning_rate"],
            weight_decay=self.optim["weight_decay"],
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(self.optim["warmup_ratio"] * self.steps),
            max_grad_norm=self.optim["max_grad_norm"],
            bf16=self.dtype == "bf16",
            use_cpu=True,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_strategy="steps" if log else "no",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
