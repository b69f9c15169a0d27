"""The packs that a training will form, known before its first step: a step's examples follow from the seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from peftdyno.bench.byte_sizes import show_enough, show_size
from peftdyno.bench.memory_limit import Limit, Way, enough, within
from peftdyno.bench.rendering import Examples
from peftdyno.engine.accounting.memory_predict import pack_tensors, validation_memory
from peftdyno.engine.accounting.pack_shape import PackShape, largest
from peftdyno.engine.accounting.predict import Job as Predicted
from peftdyno.engine.activations import POLICIES
from peftdyno.engine.batching import batch_indices, packs_of, steps_per_epoch, training_sequences
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.pack import Pack, Root
from peftdyno.engine.pack import Sequence as PackSequence
from peftdyno.engine.panels import held_bytes
from peftdyno.engine.train import shares_prefix

if TYPE_CHECKING:
    from peftdyno.bench.base_model import BaseModel
    from peftdyno.bench.job import Job

TRIED = 8
"""Steps whose packs are built: those with the most tokens and labels before sequences share a prefix."""
SAMPLED = 4
"""Steps whose work stands for all."""


@dataclass(frozen=True)
class RunAhead:
    """What one run will train on."""

    examples: Examples
    seed: int
    steps: int
    batch: int

    def sequences(self, step: int, run: int) -> tuple[PackSequence, ...]:
        """The run's sequences of a step."""
        return training_sequences(self.examples, self.batch, self.seed, step, run) if step < self.steps else ()

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens with rows and labels of every sequence, [2, steps, batch], 0 where a step has fewer."""
        rows = len(self.examples)
        table = np.zeros((2, rows), dtype=np.int64)
        for i in self.examples.used(self.batch, self.seed, self.steps):
            example = self.examples[i]
            sequence = PackSequence(tokens=example.tokens, num_prompt=example.num_prompt)
            table[:, i] = len(sequence.inputs()), example.num_labels
        epoch = steps_per_epoch(rows, self.batch)
        room = epoch * self.batch - rows
        orders = (batch_indices(rows, rows, self.seed, k) for k in range(-(-self.steps // epoch)))
        epochs = [np.pad(table[:, order], ((0, 0), (0, room))) for order in orders]
        return np.concatenate(epochs, axis=1).reshape(2, -1, self.batch)[:, : self.steps]


@dataclass(frozen=True)
class TrainingPacks:
    """Packs of some runs of a method, trained in groups in the order given."""

    config: DecoderConfig
    runs: Sequence[RunAhead]
    share_prefix: bool
    root: Root | None
    _largest: dict[tuple[int, int], tuple[PackShape, ...]] = field(default_factory=dict)
    _work: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    _waiting: dict[tuple[int, int], int] = field(default_factory=dict)

    def largest(self, way: Way) -> Sequence[PackShape]:
        """The largest packs by each of their sizes, among all steps of all groups."""
        key = way.together, way.micro_batch
        if key not in self._largest:
            shapes = {PackShape.of(pack) for pack in self._large_packs(way)}
            self._largest[key] = largest(shapes, self.config)
        return self._largest[key]

    def waiting(self, way: Way) -> int:
        """Bytes of the arrays of the other packs of the step with the most."""
        key = way.together, way.micro_batch
        if key not in self._waiting:
            steps = {(g, step) for g, step, _ in self._large_places(way)}
            groups = list(self._groups(way))
            sizes = [[_array_bytes(p) for p in self._packs(groups[g], way, step)] for g, step in steps]
            self._waiting[key] = max(sum(found) - max(found) for found in sizes)
        return self._waiting[key]

    def work(self, way: Way) -> tuple[int, int]:
        """Tokens and packs of a few steps of all runs."""
        key = way.together, way.micro_batch
        if key not in self._work:
            last = max(run.steps for run in self.runs) - 1
            steps = sorted({round(last * i / (SAMPLED - 1)) for i in range(SAMPLED)})
            packs = [p for group in self._groups(way) for step in steps for p in self._packs(group, way, step)]
            self._work[key] = sum(pack.num_tokens for pack in packs), len(packs)
        return self._work[key]

    def _groups(self, way: Way) -> Iterator[Sequence[RunAhead]]:
        for start in range(0, len(self.runs), way.together):
            yield self.runs[start : start + way.together]

    def _packs(self, group: Sequence[RunAhead], way: Way, step: int) -> list[Pack]:
        """A step of a group; a group with fewer runs than the others has empty ones."""
        sequences = [run.sequences(step, j) for j, run in enumerate(group)]
        sequences += [()] * (way.together - len(group))
        return packs_of(sequences, way.micro_batch, self.share_prefix, self.root)

    def _large_packs(self, way: Way) -> Iterator[Pack]:
        groups = list(self._groups(way))
        for g, step, part in self._large_places(way):
            yield self._packs(groups[g], way, step)[part]

    def _large_places(self, way: Way) -> Iterable[tuple[int, int, int]]:
        """(group, step, number) of the packs with the most tokens, and with the most labels, before any prefix is
        shared."""
        places: dict[tuple[int, int, int], None] = {}
        for kind in (0, 1):
            found = []
            for g, group in enumerate(self._groups(way)):
                sums = _slice_sums(group, way.micro_batch)[kind]
                for place in np.argsort(sums, axis=None)[-TRIED:]:
                    step, part = np.unravel_index(place, sums.shape)
                    if sums[step, part]:
                        found.append((int(sums[step, part]), (g, int(step), int(part))))
            places |= dict.fromkeys(place for _, place in sorted(found)[-TRIED:])
        return places


def _array_bytes(pack: Pack) -> int:
    return sum(tensor.nbytes for tensor in pack_tensors(pack))


def _slice_sums(group: Sequence[RunAhead], micro_batch: int) -> np.ndarray:
    """Tokens and labels of every pack of a group, [2, steps, packs of a step]."""
    steps = max(run.steps for run in group)
    parts = -(-max(run.batch for run in group) // micro_batch)
    sums = np.zeros((2, steps, parts), dtype=np.int64)
    for run in group:
        room = parts * micro_batch - run.batch
        slices = np.pad(run.sizes, ((0, 0), (0, 0), (0, room))).reshape(2, run.steps, parts, micro_batch)
        sums[:, : run.steps] += slices.sum(3)
    return sums


def predicted_job(job: Job, base: BaseModel) -> Predicted:
    """One run of the job, as predictions take it."""
    decoder = base.decoder
    return Predicted(
        config=decoder.config,
        methods=(job.method,),
        dtype=decoder.dtype,
        device=decoder.device.type,
        quant=decoder.weights.quantisation,
    )


def search(job: Job, base: BaseModel, limit: int, sizes: Sequence[int]) -> Limit:
    """Among the ways to train a job whose settings have a memory limit, in groups of one of the sizes."""
    settings = job.settings
    runs = [
        RunAhead(
            Examples(job.task, rows.train, base.tokenizer, settings.max_length), seed, job.steps(i), settings.batch
        )
        for i, (rows, seed) in enumerate(zip(job.rows, settings.seeds, strict=True))
    ]
    share = shares_prefix(settings.share_prefix, job.method)
    return Limit(
        job=predicted_job(job, base),
        packs=TrainingPacks(base.decoder.config, runs, share, job.method.root()),
        limit=limit,
        batch=min(settings.micro_batch or settings.batch, settings.batch),
        policies=(settings.activations,) if settings.activations else POLICIES,
        sizes=sizes,
        held=held_bytes(base.decoder, backward=True) if settings.pack_weights == "on" else 0,
    )


def within_limit(job: Job, base: BaseModel) -> tuple[Job, str | None]:
    """The job with the activation policy, the micro-batch and the rows of validation that its memory limit asks for,
    and what was chosen; its runs stay together. Panels of weights that were asked for count; those that may be kept are
    only where the way and the rows stay as they are without. UserError where nothing fits."""
    settings = job.settings
    limit = settings.memory_limit
    if limit is None:
        return job, None
    found = search(job, base, limit, (len(settings.seeds),))
    chosen = found.choose()
    rows = validation_rows(job, base, limit, found.held) if settings.evaluate_every else settings.rows_at_a_time()
    lowered = "" if rows == settings.rows_at_a_time() else f", validation {rows} rows at a time"
    changed = {"activations": chosen.way.activations, "micro_batch": chosen.way.micro_batch, "evaluation_batch": rows}
    if settings.pack_weights == "auto" and not _room(job, base, limit, chosen.peak_bytes, rows):
        changed["pack_weights"], lowered = "off", f"{lowered}, weights not packed"
    return replace(job, settings=settings.model_copy(update=changed)), f"{chosen}{lowered}"


def _room(job: Job, base: BaseModel, limit: int, peak: int, rows: int) -> bool:
    """Whether panels fit beside training, and beside as many rows of validation."""
    panels = held_bytes(base.decoder, backward=True)
    if not within(limit, peak + panels):
        return False
    try:
        return not job.settings.evaluate_every or validation_rows(job, base, limit, panels) == rows
    except UserError:
        return False


def validation_rows(job: Job, base: BaseModel, limit: int, held: int = 0) -> int:
    """Validation rows of each run that fit at a time beside `held` bytes, halved from those of the settings; UserError
    where one does not. A prefix that rows share is computed once for all of them."""
    settings = job.settings
    sequences = [
        tuple(
            PackSequence(tokens=e.tokens, num_prompt=e.num_prompt, run=j, ordinal=i)
            for i, e in enumerate(Examples(job.task, rows.validation, base.tokenizer, settings.max_length))
        )
        for j, rows in enumerate(job.rows)
    ]
    predicted = replace(predicted_job(job, base), methods=(job.method,) * len(job.rows))
    count = settings.rows_at_a_time()
    while True:
        packs = packs_of(sequences, count, True, job.method.root())
        if not packs:
            return count
        ends = {max(packs, key=lambda p: p.num_tokens), max(packs, key=lambda p: p.labels.rows.numel())}
        for probe in (False, True):
            peak = held + max(validation_memory(predicted, pack, probe=probe).peak_bytes for pack in ends)
            if not within(limit, peak):
                break
        else:
            return count
        if count == 1:
            raise UserError(
                f"memory limit {show_size(limit)} is too small for validation, which takes {show_size(peak)}; give "
                f"--memory-limit {show_enough(enough(peak))}, or --set evaluate_every=0 for none"
            )
        count = (count + 1) // 2


def group_size(job: Job, base: BaseModel, at_most: int) -> int:
    """How many runs of a job train together within its memory limit; `at_most` holds without one."""
    limit, runs = job.settings.memory_limit, len(job.settings.seeds)
    if limit is None or runs == 0:
        return at_most
    even = {-(-runs // groups) for groups in range(1, runs + 1)}
    sizes = sorted({size for size in even if size <= at_most} | {min(at_most, runs)})
    return search(job, base, limit, sizes).choose().way.together


def fits_together(job: Job, base: BaseModel) -> bool:
    """Whether there is a way to train all runs of the job at once within its memory limit."""
    limit = job.settings.memory_limit
    return limit is None or within(limit, search(job, base, limit, (len(job.settings.seeds),)).least()[1])
