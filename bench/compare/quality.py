"""The command that trains the same runs here and with transformers + PEFT and sets their test scores side by side.

Both start from the same adapter, see the same examples in the same order, and have the same rate, schedule, clipping
and dropout rate; the masks differ. All adapters are scored by our generation, and some rows of each of theirs by
transformers' too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftdyno.bench import machine
from peftdyno.bench.compare.link import Worker, WorkerError, available_cores, thread_environment
from peftdyno.bench.compare.record import module_command
from peftdyno.bench.compare.rows import TaskRows, in_order, task_rows
from peftdyno.bench.compare.sides import tell
from peftdyno.bench.compare.step_sections import DROPOUT, LORA
from peftdyno.bench.tasks import get_task
from peftdyno.engine.atomic import write_json
from peftdyno.engine.errors import UserError
from peftdyno.engine.sources import resolve_model
from peftdyno.engine.tokenizer import Tokenizer

TASK, STAND_IN = "sst2", "gen-order"
SCORING_BATCH = 32
CROSS_CHECKED = 64
"""Rows of each reference adapter that transformers answers too."""
SIDES = ("ours", "reference")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of every run on both sides."""

    steps: int
    batch: int
    learning_rate: float
    dropout: float

    def optim(self) -> dict[str, Any]:
        """For our loop; the plain loop has the same."""
        return {"learning_rate": self.learning_rate, "weight_decay": 1e-5, "warmup_ratio": 0.1, "max_grad_norm": 1.0}


@dataclass
class Quality:
    """Workers, rows and settings of the comparison."""

    model: str
    task: str
    data: str | None
    rows: TaskRows
    training: Training
    limit: int | None
    folder: Path
    ours: Worker
    reference: Worker

    def train_ours(self, seed: int) -> dict[str, Any]:
        """Train a seed here and hand over its start and its end; seconds taken."""
        t = self.training
        options = {**LORA, "dropout": t.dropout}
        settings: dict[str, Any] = {"model": self.model, "method": "lora", "options": options, "rows": self.rows.train}
        self.ours.open(
            "ours.training",
            **settings,
            seeds=[seed],
            batch=t.batch,
            steps=t.steps,
            optim=t.optim(),
            share_prefix="auto",
        )
        self.ours.call("save", folders=[self._adapter("start", seed)])
        seconds = self.ours.call("finish")
        self.ours.call("save", folders=[self._adapter("ours", seed)])
        return {"seconds": seconds}

    def train_reference(self, seed: int) -> dict[str, Any]:
        """Train a seed with transformers + PEFT from the same start in the same order; seconds taken."""
        t = self.training
        self.reference.open(
            "plain.steps",
            model=self.model,
            adapter=self._adapter("start", seed),
            batches=in_order(self.rows.train, t.batch, seed, t.steps),
            learning_rate=t.learning_rate,
            schedule_steps=t.steps,
            seed=seed,
        )
        sample = self.reference.call("measure", steps=t.steps)
        self.reference.call("save", folder=self._adapter("reference", seed))
        return {"seconds": sample["seconds"]}

    def score(self, side: str, seed: int | None) -> dict[str, Any]:
        """Scores and predictions of a side's adapter, or of the untuned model."""
        self.ours.open(
            "ours.scoring", model=self.model, task=self.task, data=self.data, batch=SCORING_BATCH, limit=self.limit
        )
        return self.ours.call("score", adapter=None if seed is None else self._adapter(side, seed))

    def cross_check(self, seed: int, predictions: Sequence[str], tokenizer: Tokenizer) -> dict[str, int]:
        """How many of the first rows transformers answers with the same text."""
        prompts = self.rows.prompts[:CROSS_CHECKED]
        self.reference.open(
            "transformers.generation",
            model=self.model,
            adapter=self._adapter("reference", seed),
            prompts=prompts,
            batch=4,
            max_new_tokens=self.rows.max_new_tokens,
            eos_ids=list(self.rows.eos_ids),
            unit="examples",
        )
        answers = self.reference.call("tokens", max_new_tokens=self.rows.max_new_tokens)
        texts = [tokenizer.decode(tokens) for tokens in answers]
        same = sum(a == b for a, b in zip(texts, predictions, strict=False))
        return {"same": same, "rows": len(prompts)}

    def _adapter(self, side: str, seed: int) -> str:
        return str(self.folder / f"{side}-{seed}")


def compare(quality: Quality, seeds: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Train and score every seed on both sides."""
    metric = get_task(quality.task).metric
    tell("untuned model: scoring")
    untuned = quality.score("untuned", None)["scores"]
    runs = []
    for seed in seeds:
        for side, train in (("ours", quality.train_ours), ("reference", quality.train_reference)):
            tell(f"seed {seed}, {side}: training {quality.training.steps} steps")
            run = {"seed": seed, "side": side, **train(seed)}
            tell(f"seed {seed}, {side}: scoring")
            found = quality.score(side, seed)
            run["scores"] = found["scores"]
            if side == "reference":
                run["answered_alike"] = quality.cross_check(seed, found["predictions"], tokenizer)
            runs.append(run)
    return {"metric": metric, "untuned": untuned, "runs": runs}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each side's main figure, and their difference seed by seed."""
    metric = found["metric"]
    scores = {
        side: [run["scores"]["corrected"][metric] for run in found["runs"] if run["side"] == side] for side in SIDES
    }
    differences = [a - b for a, b in zip(scores["ours"], scores["reference"], strict=True)]
    figures = {**scores, "difference": differences}
    return {
        name: {"mean": statistics.mean(values), "deviation": _deviation(values)} for name, values in figures.items()
    }


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def page(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    metric, runs, t = record["metric"], record["runs"], record["training"]
    by_seed = {(run["side"], run["seed"]): run for run in runs}
    seeds = list(dict.fromkeys(run["seed"] for run in runs))
    lines = [
        f"# LoRA on {record['task']}: this engine and transformers + PEFT",
        "",
        f"{record['model']}, bf16, LoRA of rank {LORA['rank']} on {', '.join(LORA['target_modules'])}, dropout "
        f"{t['dropout']}, {t['steps']} steps of batch {t['batch']}, rate {t['learning_rate']:g}, warm-up and cosine. "
        "Both sides start from the same adapter and see the same examples in the same order; only dropout's masks "
        f"differ. Score: {metric} (corrected rules) on {record['test_rows']} test rows, for both by this engine's "
        "generation.",
        "",
        "| seed | untuned | this engine | transformers + PEFT | difference | seconds here | seconds there |",
        "|---|---|---|---|---|---|---|",
    ]
    base = _percent(record["untuned"]["corrected"][metric])
    for seed in seeds:
        ours, theirs = by_seed["ours", seed], by_seed["reference", seed]
        a, b = (run["scores"]["corrected"][metric] for run in (ours, theirs))
        times = f"{ours['seconds']:.0f} | {theirs['seconds']:.0f}"
        lines.append(f"| {seed} | {base} | {_percent(a)} | {_percent(b)} | {100 * (a - b):+.1f} | {times} |")
    means = [record["summary"][name] for name in (*SIDES, "difference")]
    lines.append(f"| mean ± sd | {base} | {' | '.join(_spread(m) for m in means)} | | |")
    alike = [run["answered_alike"] for run in runs if "answered_alike" in run]
    lines += [
        "",
        f"Of the rows that transformers' own generation answered with the reference's adapters, "
        f"{sum(a['same'] for a in alike)} of {sum(a['rows'] for a in alike)} have the same text.",
        "",
        *_provenance(record),
    ]
    return "\n".join(lines) + "\n"


def _provenance(record: dict[str, Any]) -> list[str]:
    where, versions = record["machine"], record["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    commit = record["git"]["commit"] if record["git"] else "unknown"
    lines = [
        f"- {record['finished']}, {where['processor']}, {where['threads']} threads, {packages}, commit {commit}",
        f"- `{record['command']}`",
    ]
    return [f"- {record['note']}", *lines] if record["note"] else lines


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _spread(figure: dict[str, Any]) -> str:
    deviation = "" if figure["deviation"] is None else f" ± {_percent(figure['deviation'])}"
    return _percent(figure["mean"]) + deviation


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m peftdyno.bench.compare.quality", description=__doc__)
    found.add_argument("--data", type=Path, help="folder of <task>/<split> files; a generated task without it")
    found.add_argument("--model", default="smollm2-135m")
    found.add_argument("--steps", type=int, default=300)
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--rate", type=float, default=5e-4)
    found.add_argument("--dropout", type=float, default=DROPOUT)
    found.add_argument("--seeds", default="42,123,456")
    found.add_argument("--limit-test", type=int, help="test rows; all by default")
    found.add_argument("--threads", type=int, default=available_cores())
    found.add_argument("--out", type=Path, default=Path("docs/results/sst2-lora"), help="without .md and .json")
    return found


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure and give the record."""
    files = resolve_model(options.model)
    if files.tokenizer_folder is None:
        raise UserError(f"--model {options.model} has no tokenizer.json; a task needs one")
    tokenizer = Tokenizer.load(files.tokenizer_folder)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    training = Training(steps=options.steps, batch=options.batch, learning_rate=options.rate, dropout=options.dropout)
    needed = training.steps * training.batch
    rows = task_rows(TASK, STAND_IN, tokenizer, options.data, needed, options.limit_test)
    environment = thread_environment(options.threads)
    workers = {side: Worker(side, environment) for side in SIDES}
    quality = Quality(
        model=str(files.weight_files[0].parent),
        task=rows.name,
        data=None if options.data is None else str(options.data),
        rows=rows,
        training=training,
        limit=options.limit_test,
        folder=folder,
        **workers,
    )
    try:
        found = compare(quality, seeds, tokenizer)
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "schema_version": 1,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": module_command("peftdyno.bench.compare.quality"),
        "versions": machine.versions(),
        "machine": {**machine.machine(), "threads": options.threads},
        "git": machine.git(),
        "model": options.model,
        "task": rows.name,
        "test_rows": len(rows.prompts),
        "note": rows.note,
        "training": vars(training),
        **found,
        "summary": summary(found),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; 1 where it failed."""
    options = parser().parse_args(words)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="peftdyno-") as folder:
            record = run(options, Path(folder))
    except (UserError, WorkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out.with_suffix(".json"), record)
    options.out.with_suffix(".md").write_text(page(record), encoding="utf-8")
    tell(f"{options.out}.md and .json written after {time.perf_counter() - start:.0f} s")
    print(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
