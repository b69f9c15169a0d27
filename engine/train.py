"""The training loop: next packs, forward, loss of each run, backward, step, maybe evaluate, maybe save."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from peftdyno.engine import checkpoint
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.batching import Example, packs_of, training_sequences
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.errors import UserError
from peftdyno.engine.graphs import GraphChoice, Recorder
from peftdyno.engine.optim import AdamW, OptimConfig, clip_factors, gradient_norms
from peftdyno.engine.pack import Pack
from peftdyno.engine.pack import Sequence as PackSequence
from peftdyno.engine.recorded_steps import step_graphs
from peftdyno.engine.replayed_steps import ReplayedSteps

SharePrefix = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What one run of the bank trains on: tokenised examples, and its rate and schedule."""

    train: Sequence[Example]
    validation: Sequence[Example]
    optim: OptimConfig
    steps: int
    batch: int

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError("no training example")
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"steps {self.steps} and batch {self.batch} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all runs of a bank share. `micro_batch` is in sequences of each run."""

    micro_batch: int | None = None
    share_prefix: SharePrefix = "auto"
    evaluate_every: float = 0.05
    """Validation loss every this share of the steps; 0 never."""
    evaluation_batch: int = 32
    save_every: float = 0.05
    log_every: int = 1
    graphs: GraphChoice | Recorder = "auto"
    """Whether micro-batches are recorded and replayed (`step_graphs`)."""


@dataclass
class RunState:
    """Where a run stands."""

    best_loss: float = math.inf
    best_step: int = -1
    stopped: str = ""
    """Why the run ended before its last step; empty while it goes on."""

    def live(self, step: int, data: RunData) -> bool:
        """Whether the run takes part in a step."""
        return not self.stopped and step < data.steps


@dataclass
class TrainState:
    """All that changes while training: what a checkpoint holds."""

    bank: AdapterBank
    optimizer: AdamW
    best: Tensor
    """[R, P] masters of each run's best validation loss so far."""
    runs: list[RunState]
    micro_batch: int
    step: int = 0
    events: list[str] = field(default_factory=list)
    """What happened out of the ordinary: out of memory, a NaN, a checkpoint that did not load."""


Progress = Callable[[int, int, float, int], None]
"""Called after a step with (steps done, steps in all, mean loss, tokens of the step)."""


def train(
    decoder: Decoder,
    bank: AdapterBank,
    data: Sequence[RunData],
    config: TrainConfig,
    folder: Path,
    *,
    fingerprint: str = "",
    ledger: Ledger | None = None,
    progress: Progress | None = None,
) -> TrainState:
    """Train every run of the bank on its data; `bank.flat` ends as each run's best masters.

    Resumes from `folder/checkpoints` where a checkpoint of the same `fingerprint` lies there, and then ends with
    the same bits as if never interrupted. Appends a line a step to `folder/metrics.jsonl`. A run whose loss or
    gradient is not finite stops with its last good masters; the others go on. Out of memory halves the
    micro-batch and repeats the step. Raises UserError where memory is out at one sequence, or the disk is full.
    """
    ledger = ledger or Ledger(decoder.scope, on=False)
    num_steps = max(run.steps for run in data)
    state = _initial_state(bank, data, config)
    metrics = _resume(state, folder, fingerprint)
    share = shares_prefix(config.share_prefix, bank.method)
    graphs = step_graphs(config.graphs, decoder, bank, num_steps)
    with metrics:
        while state.step < num_steps:
            step = state.step
            live = [run.live(step, d) for run, d in zip(state.runs, data, strict=True)]
            if not any(live):
                break
            with ledger.phase("data"):
                sequences = [
                    training_sequences(d.train, d.batch, seed, step, j) if live[j] else ()
                    for j, (d, seed) in enumerate(zip(data, bank.seeds, strict=True))
                ]
                packs = packs_of(sequences, state.micro_batch, share, bank.root)
            try:
                losses, num_tokens = forward_backward(decoder, bank, packs, step, ledger, graphs)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                ledger.abandon_step()
                _halve_micro_batch(state, error, step, folder)
                continue
            with ledger.phase("optimizer", owner="adapter", layer=-1):
                record = _update(state, data, losses, live) | {"tokens": num_tokens}
            ledger.end_step()
            if graphs is not None and graphs.complaint:
                state.events.append(graphs.complaint)
                graphs = None
            if _due(state.step, num_steps, config.evaluate_every):
                with ledger.phase("evaluation"):
                    record["validation_loss"] = _validate(decoder, state, data, config)
            if state.step % config.log_every == 0 or "validation_loss" in record:
                metrics.append(record)
            if progress is not None:  # before a checkpoint, so that whoever notes steps has all that one stands for
                finite = [loss for loss, alive in zip(losses, live, strict=True) if alive and math.isfinite(loss)]
                progress(state.step, num_steps, sum(finite) / max(len(finite), 1), num_tokens)
            if _due(state.step, num_steps, config.save_every):
                _save(state, folder, fingerprint, metrics)
    for run, best, last in zip(state.runs, state.best, bank.flat, strict=True):
        if run.best_step < 0 and not run.stopped:
            best.copy_(last)
    with torch.no_grad():
        bank.flat.copy_(state.best)
    return state


def _update(
    state: TrainState, data: Sequence[RunData], losses: Sequence[float], live: Sequence[bool]
) -> dict[str, Any]:
    """One step of the optimizer for the live runs whose loss and gradient are finite; what the log says of it."""
    norms = gradient_norms(state.bank)
    _stop_broken(state, losses, norms, live, state.step)
    going = [alive and not run.stopped for alive, run in zip(live, state.runs, strict=True)]
    configs = [d.optim for d in data]
    rates = [d.optim.rate(state.step, d.steps) for d in data]
    state.optimizer.step(state.bank, configs, rates, clip_factors(norms, configs), going)
    state.step += 1
    return {"step": state.step, "loss": _rounded(losses), "grad_norm": _rounded(norms), "rate": rates}


def forward_backward(
    decoder: Decoder,
    bank: AdapterBank,
    packs: Sequence[Pack],
    step: int,
    ledger: Ledger,
    graphs: ReplayedSteps | None = None,
) -> tuple[list[float], int]:
    """Gradients of a step's packs into `bank.gradient`; each run's loss and the number of tokens computed.

    A run's loss is the sum over its labels of weight * cross-entropy: their mean where the weights say so. A step that
    `graphs` takes is replayed.
    """
    if graphs is None or not graphs.takes(packs):
        return _launched(decoder, bank, packs, step, ledger)
    if ledger.counting:  # the results are the replay's, whichever steps are counted
        _launched(decoder, bank, packs, step, ledger)
        ledger = Ledger(decoder.scope, on=False)
    return graphs.forward_backward(packs, step, ledger)


def _launched(
    decoder: Decoder, bank: AdapterBank, packs: Sequence[Pack], step: int, ledger: Ledger
) -> tuple[list[float], int]:
    """`forward_backward` with every kernel launched."""
    with ledger.phase("forward", owner="adapter", layer=-1):
        bank.zero_grad()
        bank.begin(step, training=True)
    totals = torch.zeros(bank.num_runs)
    num_tokens = 0
    for pack in packs:
        pack = pack.to(decoder.device)
        ledger.see(pack)
        with ledger.phase("forward"):
            losses = decoder.losses(pack, bank) * pack.labels.weight
        with ledger.phase("backward"):
            losses.sum().backward()
            totals += run_sums(losses.detach(), pack)
        num_tokens += pack.num_tokens
    with ledger.phase("backward", owner="adapter", layer=-1):
        bank.finish()
    return totals.tolist(), num_tokens


def run_sums(losses: Tensor, pack: Pack) -> Tensor:
    """Sum over each run's labels, [R] on the CPU."""
    offsets = pack.labels.run_offsets
    return torch.stack([losses[a:b].sum() for a, b in itertools.pairwise(offsets)]).cpu()


def validation_loss(
    decoder: Decoder, bank: AdapterBank, examples: Sequence[Sequence[Example]], batch: int
) -> list[float]:
    """Each run's mean loss a label over its examples; NaN for a run without any. The prefix is always shared: no
    dropout acts here."""
    bank.begin(0, training=False)
    sums, counts = torch.zeros(bank.num_runs, dtype=torch.float64), torch.zeros(bank.num_runs)
    sequences = [
        tuple(PackSequence(tokens=e.tokens, num_prompt=e.num_prompt, run=j, ordinal=i) for i, e in enumerate(run))
        for j, run in enumerate(examples)
    ]
    with torch.no_grad():
        for pack in packs_of(sequences, batch, True, bank.root):
            pack = pack.to(decoder.device)
            sums += run_sums(decoder.losses(pack, bank), pack)
            counts += torch.tensor(pack.labels.run_offsets).diff()
    means: list[float] = (sums / counts).tolist()
    return means


def _validate(decoder: Decoder, state: TrainState, data: Sequence[RunData], config: TrainConfig) -> list[float | None]:
    """Validation loss of the live runs; keeps the masters of those that improved."""
    live = [run.live(state.step - 1, d) for run, d in zip(state.runs, data, strict=True)]
    examples = [d.validation if alive else () for d, alive in zip(data, live, strict=True)]
    losses = validation_loss(decoder, state.bank, examples, config.evaluation_batch)
    for j, (run, loss) in enumerate(zip(state.runs, losses, strict=True)):
        if live[j] and loss < run.best_loss:
            run.best_loss, run.best_step = loss, state.step
            state.best[j].copy_(state.bank.flat[j])
    return _rounded(losses)


def _stop_broken(
    state: TrainState, losses: Sequence[float], norms: Sequence[float], live: Sequence[bool], step: int
) -> None:
    """Stop the runs whose loss or gradient is not finite, before they are updated with it."""
    for j, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if live[j] and not (math.isfinite(loss) and math.isfinite(norm)):
            run = state.runs[j]
            run.stopped = f"loss {loss} and gradient norm {norm} at step {step + 1}"
            if run.best_step < 0:
                state.best[j].copy_(state.bank.flat[j])
            state.events.append(f"run {j} stopped: {run.stopped}; its masters before that step are kept")
            state.bank.gradient[j].zero_()


def _halve_micro_batch(state: TrainState, error: Exception, step: int, folder: Path) -> None:
    """Out of memory: try the step again with half the sequences at a time; any other error goes on up."""
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        raise error
    if state.micro_batch == 1:
        raise UserError(
            f"out of memory at step {step + 1} with one sequence at a time; checkpoints in {folder} are kept; "
            "shorten --max-length or use a smaller model"
        ) from error
    state.micro_batch = (state.micro_batch + 1) // 2
    state.events.append(f"out of memory at step {step + 1}: micro-batch is now {state.micro_batch}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shares_prefix(choice: SharePrefix, method: Method) -> bool:
    """`auto` shares where it is exact: with adapter dropout a shared prefix is another sample."""
    return choice == "on" or (choice == "auto" and not method.uses_dropout())


def _due(step: int, num_steps: int, share: float) -> bool:
    """Whether something done every `share` of the steps is due after `step` steps; the last step always is."""
    if share <= 0:
        return False
    return step == num_steps or step % max(1, round(share * num_steps)) == 0


def _rounded(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN: a value that is not finite is null."""
    return [value if math.isfinite(value) else None for value in values]


def _initial_state(bank: AdapterBank, data: Sequence[RunData], config: TrainConfig) -> TrainState:
    largest = max(d.batch for d in data)
    return TrainState(
        bank=bank,
        optimizer=AdamW.create(bank),
        best=bank.flat.clone(),
        runs=[RunState() for _ in data],
        micro_batch=min(config.micro_batch or largest, largest),
    )


class _Metrics:
    """`metrics.jsonl`, a line a logged step; flushed before each checkpoint so that it can be cut back there."""

    def __init__(self, path: Path, size: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("ab")
        self.file.truncate(size)

    def append(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record).encode() + b"\n")
        self.file.flush()

    def size(self) -> int:
        return self.file.tell()

    def __enter__(self) -> _Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _save(state: TrainState, folder: Path, fingerprint: str, metrics: _Metrics) -> None:
    tensors = {
        "flat": state.bank.flat, "best": state.best, "first": state.optimizer.first, "second": state.optimizer.second,
    }  # fmt: skip
    values = {
        "fingerprint": fingerprint,
        "updates": state.optimizer.updates,
        "runs": [asdict(run) | {"best_loss": _rounded([run.best_loss])[0]} for run in state.runs],
        "micro_batch": state.micro_batch,
        "events": state.events,
        "metrics_size": metrics.size(),
    }
    checkpoint.save(folder / "checkpoints", state.step, tensors, values)


def _resume(state: TrainState, folder: Path, fingerprint: str) -> _Metrics:
    """Bring `state` to the newest checkpoint of the same fingerprint and cut the metrics back to it.

    UserError where the folder holds another job's checkpoint.
    """
    found, complaints = checkpoint.load_latest(folder / "checkpoints")
    if found is None:
        state.events += complaints
        return _Metrics(folder / "metrics.jsonl", 0)
    values = found.values
    if values["fingerprint"] != fingerprint:
        raise UserError(f"{folder} holds the checkpoints of another job; give another --out or remove the folder")
    with torch.no_grad():
        state.bank.flat.copy_(found.tensors["flat"])
    state.best.copy_(found.tensors["best"])
    state.optimizer.first.copy_(found.tensors["first"])
    state.optimizer.second.copy_(found.tensors["second"])
    state.optimizer.updates = list(values["updates"])
    for run, kept in zip(state.runs, values["runs"], strict=True):
        best = math.inf if kept["best_loss"] is None else kept["best_loss"]
        run.best_loss, run.best_step, run.stopped = best, kept["best_step"], kept["stopped"]
    state.micro_batch, state.step = min(values["micro_batch"], state.micro_batch), found.step
    state.events = [*values["events"], *complaints]
    return _Metrics(folder / "metrics.jsonl", values["metrics_size"])
