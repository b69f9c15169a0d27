"""Our side of scoring: the untuned model and any adapters on a task's test rows, whoever trained them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftdyno.bench.base_model import load_base
from peftdyno.bench.data import load_test
from peftdyno.bench.evaluate import Evaluation, evaluate
from peftdyno.bench.scoring import load_bank
from peftdyno.bench.tasks import get_task

MAX_LENGTH = 2048


@dataclass
class OurScoring:
    """Test rows of a task; `limit` of them, or all."""

    model: str
    task: str
    data: str | None
    batch: int
    limit: int | None = None

    def __post_init__(self) -> None:
        self.base = load_base(self.model, "bf16", "cpu")
        self.declared = get_task(self.task)
        self.rows = load_test(self.declared, self.data, self.limit).rows

    def score(self, adapter: str | None = None) -> dict[str, Any]:
        """Scores by rule and the predicted texts of an adapter, or of the untuned model."""
        bank = load_bank(self.base, [] if adapter is None else [Path(adapter)])
        with tempfile.TemporaryDirectory(prefix="peftdyno-") as folder:
            (found,) = self._evaluate(bank, Path(folder))
        return {"scores": found.scores, "predictions": found.predictions}

    def _evaluate(self, bank: Any, folder: Path) -> list[Evaluation]:
        return evaluate(
            self.base.decoder,
            bank,
            self.base.tokenizer,
            self.declared,
            self.rows,
            [folder / "predictions.jsonl"],
            batch=self.batch,
            max_length=MAX_LENGTH,
        )
