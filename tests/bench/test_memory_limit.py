"""Sizes as people write them, the choice among ways to train, packs known ahead, and trainings within a limit."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from peftdyno.bench.base_model import load_base
from peftdyno.bench.byte_sizes import parse_size, show_enough, show_size
from peftdyno.bench.job import Job, Places, run_job
from peftdyno.bench.memory_limit import Limit, Way, within
from peftdyno.bench.packs_ahead import search, validation_rows, within_limit
from peftdyno.bench.progress import Progress
from peftdyno.bench.settings import make_settings
from peftdyno.bench.store import read_record
from peftdyno.bench.sweep import Sweep
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.predict import Job as Predicted
from peftdyno.engine.activations import POLICIES
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.batching import packs_of
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.panels import held_bytes
from peftdyno.kernels import memory


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("900MB", 900_000_000), ("2e9", 2_000_000_000), (12345, 12345), ("1.5 kib", 1536), ("7B", 7)],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "8 GiBs", "-3GB", "0", "1e999", "4GiB 2MiB", "nan", True, [8]])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(UserError, match="no size of memory"):
        parse_size(text)


@pytest.mark.parametrize("size", [1, 999, 10**6, 2**30, 10**10 + 7])
def test_enough_is_enough(size: int) -> None:
    assert size <= parse_size(show_enough(size)) <= size + 2**20
    assert parse_size(show_size(2**33)) == 2**33


@dataclass
class Plain:
    """Sequences of one length."""

    job: Predicted
    batch: int
    length: int
    runs: int

    def largest(self, way: Way) -> tuple[PackShape, ...]:
        job = replace(self.job, methods=self.job.methods * way.together)
        return (PackShape.of(job.plain_pack(way.micro_batch, self.length)),)

    def waiting(self, way: Way) -> int:
        return 0

    def work(self, way: Way) -> tuple[int, int]:
        passes = -(-self.runs // way.together) * -(-self.batch // way.micro_batch)
        return self.runs * self.batch * self.length, passes


CONFIG = DecoderConfig(
    family="llama", vocab_size=400, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
)  # fmt: skip


def plain_limit(limit: int) -> Limit:
    job = Predicted(config=CONFIG, methods=(METHODS["lora"](),))
    return Limit(job=job, packs=Plain(job, 4, 48, 3), limit=limit, batch=4, sizes=(1, 2, 3))


def test_the_choice_is_that_of_trying_everything() -> None:
    everything = plain_limit(1 << 40)
    ways = sorted(everything.ways(), key=everything._order)
    assert len(ways) == len(set(ways)) == 3 * 3 * 3
    peaks = {way: everything.peak(way) for way in ways}
    assert everything.choose().way == ways[0] == Way(3, 4, "keep")
    chosen = set()
    for peak in sorted(peaks.values())[::5]:
        found = plain_limit(int(1.011 * peak))
        first = next(way for way in ways if within(found.limit, peaks[way]))
        assert found.choose().way == first and found.choose().peak_bytes == peaks[first]
        chosen.add(first)
    assert len(chosen) > 3


def test_what_costs_most_is_given_up_last() -> None:
    """Where no micro-batch can be halved: first pointwise results, then all but the layers' inputs."""
    job = Predicted(config=CONFIG, methods=(METHODS["lora"](),))
    limit = Limit(job=job, packs=Plain(job, 1, 200, 1), limit=1 << 40, batch=1)
    peaks = [limit.peak(Way(1, 1, policy)) for policy in POLICIES]
    assert peaks[0] > peaks[1] > peaks[2]
    for peak, policy in zip(peaks, POLICIES, strict=True):
        assert replace(limit, limit=int(1.011 * peak)).choose().way == Way(1, 1, policy)


def test_a_limit_that_nothing_fits_names_the_smallest() -> None:
    with pytest.raises(UserError, match="recompute, micro-batch 1 takes") as error:
        plain_limit(1000).choose()
    words = str(error.value).split()
    smallest = parse_size(words[words.index("--memory-limit") + 1].rstrip(","))
    assert plain_limit(smallest).choose().way == Way(1, 1, "recompute")
    with pytest.raises(UserError):
        plain_limit(int(0.95 * smallest)).choose()


def test_peaks_fall_along_every_axis() -> None:
    limit = plain_limit(1)
    for one, other in itertools.permutations(limit.ways(), 2):
        if one.needs_less_than(other):
            assert limit.peak(one) <= limit.peak(other), (one, other)


@pytest.fixture(scope="module")
def base(tiny_model: Path):
    return load_base(str(tiny_model), "fp32", "cpu")


def job_of(base, data: Path, **more) -> Job:
    values = {"model": base.files.name, "data": data, "dtype": "fp32", "task": "sst2", "steps": 5, "batch": 4}
    return Job.prepare(make_settings({**values, "seeds": (1, 2, 3), "evaluate": False, **more}))


@pytest.mark.parametrize("share", ["on", "off"])
@pytest.mark.parametrize("method", ["lora", "prompt-tuning"])
def test_the_largest_packs_of_all_steps_are_found(base, tiny_data: Path, share: str, method: str) -> None:
    job = job_of(base, tiny_data, share_prefix=share, method=method, steps=13)
    packs = search(job, base, 1, (1, 2, 3)).packs
    for together, micro_batch in itertools.product((1, 2, 3), (1, 2, 3, 4)):
        way = Way(together, micro_batch, "keep")
        tokens, labels = [], []
        for start in range(0, 3, together):
            group = packs.runs[start : start + together]
            for step in range(13):
                sequences = [run.sequences(step, j) for j, run in enumerate(group)]
                formed = packs_of(sequences, micro_batch, share == "on", job.method.root())
                tokens += [pack.num_tokens for pack in formed]
                labels += [pack.labels.rows.numel() for pack in formed]
        found = packs.largest(way)
        assert max(shape.num_tokens for shape in found) == max(tokens)
        assert max(shape.num_label_rows for shape in found) == max(labels)


def test_no_limit_leaves_a_job_as_it_is(base, tiny_data: Path) -> None:
    job = job_of(base, tiny_data)
    assert within_limit(job, base) == (job, None)


@pytest.mark.skipif(not memory.available(), reason="needs the compiled extension, which records allocations")
@pytest.mark.parametrize("tight", [0.9, 0.6, 0.0])
def test_a_training_stays_within_its_limit(base, tiny_data: Path, tmp_path: Path, tight: float) -> None:
    """Its adapter is that of the same micro-batch with everything kept."""
    job = job_of(base, tiny_data, seeds=(1, 2), batch=6, evaluation_batch=1)
    free = search(job, base, 1 << 40, (2,))
    highest, lowest = free.choose().peak_bytes, free.least()[1]
    limit = int(1.02 * (lowest + tight * (highest - lowest)))
    limited = job_of(base, tiny_data, seeds=(1, 2), batch=6, evaluation_batch=1, memory_limit=limit)
    assert limited.fingerprints(base) == job.fingerprints(base)
    places = Places.under(tmp_path / "limited", (1, 2))
    record = run_job(limited, base, places, Progress())[0]
    assert record.events[0].startswith(f"memory limit {show_size(limit)}: {record.settings['activations']}, micro-b")
    assert record.settings["activations"] != "keep" or record.settings["micro_batch"] < 6
    assert record.memory.measured_peak_bytes <= limit
    same = job_of(base, tiny_data, seeds=(1, 2), batch=6, micro_batch=record.settings["micro_batch"])
    run_job(same, base, Places.under(tmp_path / "same", (1, 2)), Progress())
    files = [tmp_path / name / "seed-1/adapter/adapter_model.safetensors" for name in ("limited", "same")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_validation_has_fewer_rows_at_a_time_where_they_would_not_fit(base, tiny_data: Path, threads) -> None:
    threads(1)  # each has scratch of its own
    job = job_of(base, tiny_data, seeds=(1, 2), evaluation_batch=8)
    counts = [validation_rows(job, base, limit) for limit in (1 << 40, 860_000, 780_000)]
    assert counts[0] == 8 and counts == sorted(counts, reverse=True) and 8 > counts[2] >= 1, counts
    with pytest.raises(UserError, match="too small for validation"):
        validation_rows(job, base, 1000)
    roomy = replace(job, settings=job.settings.model_copy(update={"memory_limit": 1 << 40}))
    assert "validation" not in within_limit(roomy, base)[1]


@pytest.mark.skipif(not memory.available(), reason="needs the compiled extension, which records allocations")
def test_panels_count(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Asked for, they leave less to the rest; where they may be kept, nothing gives way to them."""
    narrow = load_base(str(tiny_model), "bf16", "cpu")
    held = held_bytes(narrow.decoder, backward=True)
    if not held:
        pytest.skip("this processor has no panels")

    def job(**more) -> Job:
        return job_of(narrow, tiny_data, dtype="bf16", seeds=(1,), batch=6, evaluation_batch=1, **more)

    def chosen(limit: float, choice: str) -> tuple[str, str | None]:
        limited, said = within_limit(job(memory_limit=int(limit), pack_weights=choice), narrow)
        return limited.settings.pack_weights, said

    free = search(job(), narrow, 1 << 40, (1,))
    peak, least = free.choose().peak_bytes, free.least()[1]
    roomy = 1.02 * (peak + held)
    assert chosen(roomy, "auto")[0] == "auto" and "keep, micro-batch 6" in chosen(roomy, "on")[1]
    assert chosen(1.02 * peak, "auto") == ("off", f"{chosen(1.02 * peak, 'off')[1]}, weights not packed")
    with pytest.raises(UserError, match="or --pack-weights off"):
        chosen(1.02 * least, "on")
    tight = int(1.02 * (least + held))
    packed = job(memory_limit=tight, pack_weights="on")
    record = run_job(packed, narrow, Places.under(tmp_path, (1,)), Progress())[0]
    assert least + held // 2 < record.memory.predicted_peak_bytes and record.memory.measured_peak_bytes <= tight


def test_a_sweep_splits_its_groups(base, tiny_data: Path, tmp_path: Path) -> None:
    """A group larger than the limit trains as smaller ones, which need no smaller micro-batch."""
    job = job_of(base, tiny_data, steps=2, batch=1, activations="recompute")
    peaks = {size: search(job, base, 1 << 40, (size,)).choose().peak_bytes for size in (1, 2, 3)}
    limit = int(1.011 * peaks[2])
    assert limit < peaks[3]
    values = {
        "model": base.files.name, "data": tiny_data, "dtype": "fp32", "steps": 2, "batch": 1, "tasks": "sst2",
        "methods": "lora", "seeds": "1,2,3", "evaluate": False, "activations": "recompute", "memory_limit": limit,
        "evaluation_batch": 1,
    }  # fmt: skip
    outcome = Sweep.plan(tmp_path, values).run(base, Progress())
    assert len(outcome.trained) == 3, outcome.failed
    together = [read_record(tmp_path / f"runs/lora/sst2/seed-{seed}/run.json").runs_together for seed in (1, 2, 3)]
    assert together == [2, 2, 1]
    again = Sweep.plan(tmp_path, {**values, "memory_limit": None}).run(base, Progress())
    assert len(again.skipped) == 3 and not again.trained


def test_on_the_command_line(shell, tmp_path: Path) -> None:
    line = ("train", "--task", "sst2", *shell.job("--no-eval", "--out", tmp_path))
    assert "'plenty' is no size of memory" in shell.fails(*line, "--memory-limit", "plenty")
    assert "give --memory-limit" in shell.fails(*line, "--memory-limit", "10kB")
    ran = shell(*line, "--memory-limit", "1GiB", "--activations", "recompute", "--json")
    assert ran.status == 0 and ran.json["events"][0].startswith("memory limit 1.0 GiB: recompute, micro-batch 2, ")
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["activations"] == "recompute"
    assert torch.is_grad_enabled()
