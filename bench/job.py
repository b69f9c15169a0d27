"""A job: one method on one task, a run a seed, trained together, scored together, each with its own record."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftdyno.bench import model_card
from peftdyno.bench.base_model import BaseModel
from peftdyno.bench.data import Loader, Splits, load_rows, splits
from peftdyno.bench.evaluate import Evaluation, evaluate
from peftdyno.bench.packs_ahead import within_limit
from peftdyno.bench.progress import Progress
from peftdyno.bench.record import Measured, make_record
from peftdyno.bench.rendering import Examples
from peftdyno.bench.settings import JobSettings
from peftdyno.bench.step_costs import inference_costs, training_costs
from peftdyno.bench.step_summary import summarise
from peftdyno.bench.steps import FILE, StepLog
from peftdyno.bench.store import RECORD, RunRecord, finished_record, read_object, write_record
from peftdyno.bench.task import Task
from peftdyno.bench.tasks import TASKS, get_task
from peftdyno.bench.tasks_file import apply_tasks_file
from peftdyno.engine import train as training
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.adapters.peft_format import save_adapter
from peftdyno.engine.atomic import remove_partials, write_json
from peftdyno.engine.batching import steps_per_epoch
from peftdyno.engine.border import fit_borders
from peftdyno.engine.errors import UserError
from peftdyno.engine.optim import OptimConfig
from peftdyno.engine.panels import packed_weights

CLAIM = "job.json"
"""Which job a folder belongs to, from before its first step on."""
ADAPTER = "adapter"
PREDICTIONS = "predictions.jsonl"
DEFAULT_EPOCHS = 10.0
IDENTITY_EXCLUDES = {
    "model", "data", "tasks_file", "seeds", "threads", "device", "activations", "memory_limit", "graphs",
}  # fmt: skip
"""Settings that do not tell a job from another: what they lead to is in its identity instead, or does not matter."""


def find_task(name: str, tasks_file: Path | None) -> Task:
    """A built-in task, or one that a tasks file words, divides or adds."""
    return get_task(name, None if tasks_file is None else apply_tasks_file(TASKS, tasks_file).tasks)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Settings with what they name: task, method, and a run's rows for each seed."""

    settings: JobSettings
    task: Task
    method: Method
    rows: tuple[Splits, ...]

    @classmethod
    def prepare(cls, settings: JobSettings, load: Loader | None = None) -> Job:
        """Look everything up and read the data, each file once, but not the model; UserError for whatever is wrong
        with them."""
        load = load or functools.cache(load_rows)
        method = settings.build_method()
        task = find_task(settings.task, settings.tasks_file)
        limits = {f"{split}_limit": getattr(settings, f"limit_{split}") for split in ("train", "validation", "test")}
        rows = tuple(splits(task, settings.data, seed, load=load, **limits) for seed in settings.seeds)
        return cls(settings=settings, task=task, method=method, rows=rows)

    def with_seeds(self, seeds: Sequence[int]) -> Job:
        """The same job with some of its seeds."""
        rows = tuple(self.rows[self.settings.seeds.index(seed)] for seed in seeds)
        settings = self.settings.model_copy(update={"seeds": tuple(seeds)})
        return dataclasses.replace(self, settings=settings, rows=rows)

    def steps(self, run: int) -> int:
        """Steps of a run."""
        if self.settings.steps is not None:
            return self.settings.steps
        epochs = self.settings.epochs or DEFAULT_EPOCHS
        return math.ceil(epochs * steps_per_epoch(len(self.rows[run].train), self.settings.batch))

    def optim(self) -> OptimConfig:
        """Optimizer and schedule; rate and decay are the method's where the settings name none."""
        s, m = self.settings, self.method
        return OptimConfig(
            learning_rate=m.learning_rate if s.learning_rate is None else s.learning_rate,
            weight_decay=m.weight_decay if s.weight_decay is None else s.weight_decay,
            warmup_ratio=s.warmup_ratio,
            schedule=s.schedule,
            max_grad_norm=s.max_grad_norm,
        )

    def fingerprint(self, run: int, base: BaseModel) -> str:
        """Hash of all that a run's result follows from."""
        sources = {name: source.sha256 for name, source in self.rows[run].sources.items()}
        return digest(
            {
                "settings": self.settings.model_dump(mode="json", exclude=IDENTITY_EXCLUDES),
                "method": dataclasses.asdict(self.method),
                "optim": dataclasses.asdict(self.optim()),
                "steps": self.steps(run),
                "seed": self.settings.seeds[run],
                "task": self.task.declaration(),
                "data": sources,
                "model": base.identity,
            }
        )

    def fingerprints(self, base: BaseModel) -> list[str]:
        """The runs' fingerprints."""
        return [self.fingerprint(run, base) for run in range(len(self.rows))]

    def baseline_key(self, base: BaseModel) -> str:
        """Hash of all that the untuned model's score follows from."""
        names = ("limit_test", "max_length", "dtype", "quant", "kernels", "pack_weights")
        settings = {name: getattr(self.settings, name) for name in names}
        test = self.rows[0].sources["test"].sha256
        return digest({"settings": settings, "task": self.task.declaration(), "data": test, "model": base.identity})

    def label(self) -> str:
        """Method, task and seeds in a few words."""
        seeds = ",".join(map(str, self.settings.seeds))
        return f"{self.settings.method} {self.settings.task} seed {seeds}"


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a job writes: `runs` has a folder a run; `work` holds checkpoints, `baseline` the untuned model's
    predictions."""

    runs: tuple[Path, ...]
    work: Path
    baseline: Path

    @classmethod
    def under(cls, out: Path, seeds: Sequence[int]) -> Places:
        """The folder itself for one seed, a folder a seed below it for several."""
        runs = (out,) if len(seeds) == 1 else tuple(out / f"seed-{seed}" for seed in seeds)
        return cls(runs=runs, work=out, baseline=out / "baseline")


def finished_records(job: Job, base: BaseModel, places: Places) -> list[RunRecord] | None:
    """The records where every run of the job is finished already."""
    found = [finished_record(path, key) for path, key in zip(places.runs, job.fingerprints(base), strict=True)]
    return None if None in found else [record for record in found if record is not None]


def run_job(job: Job, base: BaseModel, places: Places, progress: Progress) -> list[RunRecord]:
    """Train, score and record; continues what an earlier call of the same job began."""
    keys = job.fingerprints(base)
    for path, key in {places.work: digest(keys), **dict(zip(places.runs, keys, strict=True))}.items():
        _claim(path, key, job)
        remove_partials(path)
    job, chosen = within_limit(job, base)
    if chosen is not None:
        progress.say(chosen)
    bank, measured = _train(job, base, places, digest(keys), progress)
    measured.state.events[:0] = [] if chosen is None else [chosen]
    for run, path in enumerate(places.runs):
        save_adapter(bank, run, path / ADAPTER, base.hub_name, base.files.family)
    tuned: list[Evaluation] | None = None
    if job.settings.evaluate:
        tuned = _score(job, base, bank, [path / PREDICTIONS for path in places.runs], "tuned", progress, measured)
        untuned = _score(job, base, base.untuned(), [places.baseline / PREDICTIONS], "untuned", progress, measured)
        measured.baseline = untuned[0]
    records = []
    for run, path in enumerate(places.runs):
        record = make_record(job, base, bank, run, keys[run], measured, None if tuned is None else tuned[run])
        _split_metrics(places.work, path, run)
        model_card.write(path / ADAPTER, bank, run, base.hub_name, record)
        write_record(path, record)
        records.append(record)
    shutil.rmtree(places.work / "checkpoints", ignore_errors=True)
    return records


def _claim(folder: Path, key: str, job: Job) -> None:
    """Mark a folder as this job's; UserError where it is another's."""
    path = folder / CLAIM
    if path.exists():
        held = read_object(path)
        if held.get("fingerprint") != key:
            raise UserError(
                f"{folder} holds the unfinished job '{held.get('label')}' of other settings or data; "
                "give another --out or remove that folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"fingerprint": key, "label": job.label(), "settings": job.settings.model_dump(mode="json")})


def _train(
    job: Job, base: BaseModel, places: Places, fingerprint: str, progress: Progress
) -> tuple[AdapterBank, Measured]:
    """The bank with each run's best masters, and what training cost."""
    settings, seeds = job.settings, job.settings.seeds
    decoder = dataclasses.replace(base.decoder, activations=settings.activations or "keep")
    bank = AdapterBank.create(decoder.config, [job.method] * len(seeds), seeds, decoder.weights)
    fit_borders(decoder.weights, bank, decoder.device)
    examples = [
        {s: Examples(job.task, getattr(rows, s), base.tokenizer, settings.max_length) for s in ("train", "validation")}
        for rows in job.rows
    ]
    data = [
        training.RunData(**own, optim=job.optim(), steps=job.steps(run), batch=settings.batch)
        for run, own in enumerate(examples)
    ]
    config = training.TrainConfig(
        micro_batch=settings.micro_batch,
        share_prefix=settings.share_prefix,
        evaluate_every=settings.evaluate_every,
        evaluation_batch=settings.rows_at_a_time(),
        save_every=settings.save_every,
        graphs=settings.graphs if settings.memory_limit is None or decoder.device.type == "cpu" else "off",
    )
    ledger = Ledger.of(decoder, bank)
    gc.collect()  # what earlier jobs left in cycles would count as memory of this one
    with (
        StepLog(places.work, ledger, decoder, bank) as log,
        packed_weights(decoder, settings.pack_weights, backward=True) as ledger.panel_bytes,  # while memory is measured
        progress.training(job.label()) as tell,
    ):

        def after_step(done: int, total: int, loss: float, tokens: int) -> None:
            log.append(done, tokens)
            tell(done, total, loss, tokens)

        state = training.train(
            decoder, bank, data, config, places.work, fingerprint=fingerprint, ledger=ledger, progress=after_step
        )
    cut = [
        {
            "train": own["train"].num_cut(own["train"].used(settings.batch, seed, job.steps(run))),
            "validation": own["validation"].num_cut(set(range(len(own["validation"])))) if config.evaluate_every else 0,
        }
        for run, (own, seed) in enumerate(zip(examples, seeds, strict=True))
    ]
    steps = summarise(places.work / FILE)
    measured = Measured(
        state=state,
        steps=steps,
        work=places.work,
        cut=cut,
        costs=training_costs(ledger, places.work, steps),
        inference=inference_costs(ledger, job.method),
    )
    return bank, measured


def _score(
    job: Job,
    base: BaseModel,
    bank: AdapterBank,
    files: Sequence[Path],
    which: str,
    progress: Progress,
    measured: Measured,
) -> list[Evaluation]:
    """Score the runs of a bank on the test rows, which are the same for every seed."""
    settings = job.settings
    with measured.watch(which, base.decoder, bank), progress.scoring(f"{which} model, {job.label()}") as tell:
        return evaluate(
            base.decoder,
            bank,
            base.tokenizer,
            job.task,
            job.rows[0].test,
            files,
            batch=settings.rows_at_a_time(),
            max_length=settings.max_length,
            pack_weights=settings.pack_weights,
            progress=tell,
        )


def _split_metrics(work: Path, folder: Path, run: int) -> None:
    """A run's own metrics.jsonl out of that of the runs trained with it."""
    if folder == work:
        return
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    own = [{name: [v[run]] if isinstance(v, list) else v for name, v in line.items()} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (folder / RECORD).exists()
