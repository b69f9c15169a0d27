"""Runs of a grid by transformers and PEFT, one after another on the same rows in the same order: batches padded to
their longest row, AdamW, cosine with warm-up, gradients clipped at 1, bf16, as PEFT-Bench trains (arXiv:2511.21285)."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.gpu.hf_step import base_model
from peftdyno.bench.gpu.sizes import Grid, Sizes
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.batching import Example, training_sequences
from peftdyno.engine.families import family_of
from peftdyno.engine.weights import empty_weights

IGNORED = -100
"""The label that transformers leaves out of the loss."""
WARM_UP_RATIO = 0.1


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """input_ids, labels and attention_mask [batch, longest], padded on the right."""
    width = max(len(row["tokens"]) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        tokens, n = torch.tensor(row["tokens"]), len(row["tokens"])
        ids[i, :n], mask[i, :n] = tokens, 1
        labels[i, row["num_prompt"] : n] = tokens[row["num_prompt"] :]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def peft_config(name: str, sizes: Sizes) -> Any:
    """PEFT's config of our method at its defaults."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    config = sizes.config(sizes.layers_of_hf)
    bank = AdapterBank.empty(config, [METHODS[name]()], [0])
    weights = empty_weights(config)
    bank.method.derive(bank, weights)
    fields, _ = bank.method.to_peft(bank, 0, family_of(config))
    fields = {**fields, "task_type": "CAUSAL_LM", "inference_mode": False}
    return PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")](**fields)


@dataclass
class Runs:
    """One base model and the runs on it, by HF Trainer or by a plain loop."""

    sizes: Sizes
    device: torch.device
    trainer: bool
    base: Any = field(init=False)

    def __post_init__(self) -> None:
        self.base = base_model(self.sizes, self.device)

    def seconds(self, name: str, runs: Sequence[tuple[int, int]], rows: Sequence[list[Example]]) -> float:
        """From the end of the warm-up to that of the last step, of the one run in `runs`."""
        import peft

        ((task, seed),) = runs
        torch.manual_seed(seed)
        tuned = peft.get_peft_model(self.base, peft_config(name, self.sizes))
        trained, expected = tuned.get_nb_trainable_parameters()[0], METHODS[name]().trainable_count(self.sizes.config())
        assert trained == expected, (name, trained, expected)
        data = self._ordered(rows[task], seed)
        clock = Clock(self.sizes.grid, self.device)
        (self._by_trainer if self.trainer else self._by_loop)(tuned.train(), data, METHODS[name], clock)
        if hasattr(tuned.base_model, "unload"):
            self.base = tuned.unload()
        return clock.ends[-1] - clock.ends[0]

    def _ordered(self, rows: list[Example], seed: int) -> list[dict[str, Any]]:
        """The rows of all steps, one behind another."""
        grid = self.sizes.grid
        steps = [training_sequences(rows, grid.batch, seed, step, 0) for step in range(grid.steps)]
        return [{"tokens": list(s.tokens), "num_prompt": s.num_prompt} for step in steps for s in step]

    def _by_loop(self, model: Any, data: list[dict[str, Any]], method: Any, clock: Clock) -> None:
        from transformers import get_cosine_schedule_with_warmup

        grid = self.sizes.grid
        trained = [p for p in model.parameters() if p.requires_grad]
        options = {"lr": method.learning_rate, "weight_decay": method.weight_decay}
        optimizer = torch.optim.AdamW(trained, fused=self.device.type == "cuda", **options)
        schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARM_UP_RATIO * grid.steps), grid.steps)
        for step in range(grid.steps):
            batch = padded(data[step * grid.batch : (step + 1) * grid.batch])
            model(**{name: value.to(self.device) for name, value in batch.items()}).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.tick()

    def _by_trainer(self, model: Any, data: list[dict[str, Any]], method: Any, clock: Clock) -> None:
        from torch.utils.data import SequentialSampler
        from transformers import PrinterCallback, Trainer, TrainerCallback

        class Ticks(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.tick()

        class InOrder(Trainer):  # type: ignore[misc]
            def _get_train_sampler(self, *_: Any) -> Any:
                return SequentialSampler(data)  # type: ignore[arg-type]

        with tempfile.TemporaryDirectory(prefix="peftdyno-") as folder:
            trainer = InOrder(
                model=model, args=self._arguments(folder, method), train_dataset=data, data_collator=padded,
                callbacks=[Ticks()],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()

    def _arguments(self, folder: str, method: Any) -> Any:
        from transformers import TrainingArguments

        grid, cuda = self.sizes.grid, self.device.type == "cuda"
        return TrainingArguments(
            output_dir=folder,
            max_steps=grid.steps,
            per_device_train_batch_size=grid.batch,
            learning_rate=method.learning_rate,
            weight_decay=method.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(WARM_UP_RATIO * grid.steps),
            max_grad_norm=1.0,
            bf16=cuda,
            use_cpu=not cuda,
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )


class Clock:
    """Times of the ends of the warm-up and of the last step."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.timed, self.device, self.done = (grid.warm_up, grid.steps), device, 0
        self.ends: list[float] = []

    def tick(self) -> None:
        """At the end of a step."""
        self.done += 1
        if self.done in self.timed:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
