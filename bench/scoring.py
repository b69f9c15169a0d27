"""Scoring without training: a model, or any number of its adapters, on a task; eval.json is the record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftdyno.bench import machine
from peftdyno.bench.base_model import BaseModel
from peftdyno.bench.data import Loaded
from peftdyno.bench.evaluate import Evaluation, evaluate
from peftdyno.bench.job import digest
from peftdyno.bench.peak_memory import PeakMemory
from peftdyno.bench.progress import Progress
from peftdyno.bench.store import read_object
from peftdyno.bench.task import Task
from peftdyno.engine.accounting.meter import kept_tensors
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.peft_format import CONFIG_FILE, bank_from_adapters
from peftdyno.engine.atomic import remove_partials, write_json
from peftdyno.engine.builtin_configs import find_builtin
from peftdyno.engine.errors import UserError
from peftdyno.engine.model_cache import sha256_of
from peftdyno.engine.panels import PackWeights

RECORD = "eval.json"
SCHEMA_VERSION = 1
UNTUNED = "untuned"


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is scored, on which rows, and how."""

    task: Task
    test: Loaded
    adapters: tuple[Path, ...]
    batch: int
    max_length: int
    pack_weights: PackWeights = "auto"

    def key(self, base: BaseModel) -> str:
        """Hash of all that the scores follow from."""
        files = [{path.name: sha256_of(path) for path in sorted(folder.glob("adapter_*"))} for folder in self.adapters]
        rows = [self.test.source.sha256, len(self.test.rows)]
        values = {"task": self.task.declaration(), "rows": rows, "max_length": self.max_length, "adapters": files}
        return digest({**values, "model": base.identity, "dtype": base.dtype, "quant": base.quant})

    def names(self) -> list[str]:
        """A folder name for each adapter, or that of the untuned model."""
        if not self.adapters:
            return [UNTUNED]
        return [f"adapter-{i}" for i in range(len(self.adapters))]


def base_name(adapter: Path) -> str:
    """The name of the model an adapter belongs to, as its config says; a built-in one by its short name."""
    path = adapter / CONFIG_FILE
    name = read_object(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path} names no base model; give --model")
    builtin = find_builtin(name)
    return name if builtin is None else builtin.short_names[0]


def load_bank(base: BaseModel, adapters: Sequence[Path]) -> AdapterBank:
    """Adapters as the runs of one bank, or the untuned model where there are none."""
    if not adapters:
        return base.untuned()
    decoder = base.decoder
    return bank_from_adapters(adapters, decoder.config, decoder.weights, base.files.family)


def score(scoring: Scoring, base: BaseModel, out: Path, progress: Progress) -> dict[str, Any]:
    """Score and write OUT/eval.json and a predictions.jsonl an adapter; continues a killed scoring of the same kind."""
    key = scoring.key(base)
    _claim(out, key)
    bank = load_bank(base, scoring.adapters)
    start = time.perf_counter()
    files = [out / "predictions.jsonl"] if len(scoring.names()) == 1 else [out / f"{n}.jsonl" for n in scoring.names()]
    memory = PeakMemory(base.decoder.device, kept_tensors(base.decoder, bank))
    with memory, progress.scoring(f"{scoring.task.name}") as tell:
        found = evaluate(
            base.decoder,
            bank,
            base.tokenizer,
            scoring.task,
            scoring.test.rows,
            files,
            batch=scoring.batch,
            max_length=scoring.max_length,
            pack_weights=scoring.pack_weights,
            progress=tell,
        )
        if memory.meter is not None:
            memory.meter.mark("evaluation")
    seconds = time.perf_counter() - start
    record = {
        **_about(scoring, base, key),
        "results": [
            _result(name, path, file, one)
            for name, path, file, one in zip(scoring.names(), scoring.adapters or (None,), files, found, strict=True)
        ],
        "time": {"load": base.load_seconds, "evaluation": seconds},
        "memory": memory.figures(),
    }
    write_json(out / RECORD, record)
    return record


def _about(scoring: Scoring, base: BaseModel, key: str) -> dict[str, Any]:
    task = scoring.task
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": key,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": machine.command(),
        "versions": machine.versions(),
        "machine": machine.machine(),
        "git": machine.git(),
        "model": base.describe(),
        "task": {"name": task.name, "metric": task.metric, "category": task.category},
        "data": {**scoring.test.source.as_dict(), "rows_used": len(scoring.test.rows)},
        "settings": {
            "batch": scoring.batch,
            "max_length": scoring.max_length,
            "pack_weights": scoring.pack_weights,
        },
    }


def _result(name: str, adapter: Path | None, file: Path, found: Evaluation) -> dict[str, Any]:
    where = {} if adapter is None else {"adapter": str(adapter)}
    return {"name": name, **where, "predictions": file.name, "scores": found.scores, "cut_sequences": found.num_cut}


def _claim(out: Path, key: str) -> None:
    """Mark the folder as this scoring's; UserError where it holds something else."""
    path = out / "scoring.json"
    if (out / "job.json").exists():
        raise UserError(f"{out} holds a training run; give another --out")
    if path.exists() and read_object(path).get("fingerprint") != key:
        raise UserError(f"{out} holds the scores of other data, adapters or settings; give another --out or remove it")
    write_json(path, {"fingerprint": key})
    remove_partials(out)
