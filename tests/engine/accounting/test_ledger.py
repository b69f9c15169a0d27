"""A ledger over a training: which steps are timed and counted, and that accounting costs next to nothing."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from peftdyno.engine.accounting import closed_form
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.meter import Meter, metered
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.accounting.summary import summary
from peftdyno.engine.accounting.work import Work, total_work
from peftdyno.engine.train import TrainConfig, train
from peftdyno.kernels import memory

from ..tiny_job import job, tiny_bank, tiny_decoder

PHASES = {"data", "forward", "backward", "optimizer"}


def trained(folder: Path, steps: int = 8, **options: object) -> Ledger:
    """The ledger of a short training."""
    decoder = tiny_decoder()
    bank = tiny_bank(decoder)
    ledger = Ledger.of(decoder, bank, **options)
    train(decoder, bank, [job(steps=steps)], TrainConfig(evaluate_every=0), folder, ledger=ledger)
    return ledger


def test_summary_of_a_training(tmp_path: Path) -> None:
    found = summary(trained(tmp_path, every=4))
    assert found["steps"]["counted"] == [0, 4]
    assert found["steps"]["finished"] == 8
    assert (found["steps"]["warm_up"], found["steps"]["timed"]) == (3, 3)
    assert found["flops"]["counted"] == found["flops"]["predicted"]
    assert found["flops_equal_by_layer"]
    assert set(found["time"]) == PHASES
    assert all(t["p10"] <= t["median"] <= t["p90"] and t["count"] == 3 for t in found["time"].values())
    assert found["memory"]["predicted_peak_bytes"] == sum(found["memory"]["predicted_by_category"].values())


def test_all_steps_summed_from_their_work_are_what_they_counted(tmp_path: Path) -> None:
    ledger = trained(tmp_path, steps=5, every=1)
    subject = ledger.subject
    work = total_work([Work.of(subject.config, pack) for step in ledger.packs for pack in step])
    work = Work.from_dict(json.loads(json.dumps(asdict(work))))
    counted = ledger.counter.tally.by("phase", "owner", "layer").items()
    matrices = {place: (c.matrix, c.matrix_full) for place, c in counted if (c.matrix, c.matrix_full) != (0, 0)}
    assert closed_form.training(subject.config, subject.methods, work, 5) == matrices
    shape = ledger.packs[0][0]
    assert PackShape.from_dict(json.loads(json.dumps(shape.as_dict()))) == shape


class Told(Meter):
    """A meter that notes what it is told."""

    def __init__(self) -> None:
        self.stages: list[str | None] = []

    def mark(self, stage) -> None:
        self.stages.append(stage)


def test_a_meter_is_told_where_steps_and_evaluations_end(tmp_path: Path) -> None:
    decoder = tiny_decoder()
    bank = tiny_bank(decoder)
    ledger = Ledger.of(decoder, bank)
    ledger.meter = Told()
    train(decoder, bank, [job(steps=4)], TrainConfig(evaluate_every=0.5), tmp_path, ledger=ledger)
    assert ledger.meter.stages == ["training", "training", "evaluation"] * 2
    ledger.abandon_step()
    assert ledger.meter.stages[-1] is None


@pytest.mark.skipif(not memory.available(), reason="needs the compiled extension, which records allocations")
def test_a_meter_keeps_stages_apart() -> None:
    kept = [torch.zeros(100), torch.zeros(10)]
    kept.append(kept[0].view(10, 10))
    with metered(torch.device("cpu"), kept) as meter:
        large = torch.zeros(1000)
        del large
        meter.mark("training")
        small = torch.zeros(50)
        meter.mark("evaluation")
        meter.mark(None)
    assert meter.peaks == {"training": 440 + 4000, "evaluation": 440 + small.nbytes}


def test_counting_leaves_training_as_it_is(tmp_path: Path) -> None:
    results = []
    for name, options in (("with", {"every": 1}), ("without", {"on": False})):
        decoder = tiny_decoder()
        bank = tiny_bank(decoder)
        ledger = Ledger.of(decoder, bank, **options)
        train(decoder, bank, [job(steps=4)], TrainConfig(evaluate_every=0), tmp_path / name, ledger=ledger)
        results.append(bank.flat.clone())
    assert torch.equal(*results)


def test_off_records_nothing(tmp_path: Path) -> None:
    ledger = trained(tmp_path, on=False)
    assert (ledger.packs, ledger.clock.read(), ledger.sampled, ledger.counter) == ([], [], [], None)


def test_a_shape_gives_back_a_pack_of_the_same_shape() -> None:
    decoder = tiny_decoder()
    bank = tiny_bank(decoder, seeds=(0, 1))
    from peftdyno.engine.pack import Sequence, build_pack

    sequences = [Sequence(tokens=(1, 2, 3, 4 + i, 9), num_prompt=2, run=i % 2, ordinal=i) for i in range(4)]
    shape = PackShape.of(build_pack(sequences, num_runs=bank.num_runs, share_prefix=True))
    assert PackShape.of(shape.pack()) == shape


@pytest.mark.parametrize("on", [True, False])
def test_accounting_takes_microseconds_a_step(on: bool) -> None:
    """An unsampled step enters five phases; a step of training takes tens of milliseconds and more."""
    decoder = tiny_decoder()
    ledger = Ledger.of(decoder, tiny_bank(decoder), on=on)
    ledger.num_steps = 1
    steps, start = 200, time.perf_counter()
    for _ in range(steps):
        for phase in ("data", "forward", "forward", "backward", "optimizer"):
            with ledger.phase(phase):
                pass
        ledger.end_step()
    assert (time.perf_counter() - start) / steps < 1e-3


def test_an_abandoned_step_leaves_no_trace() -> None:
    ledger = Ledger(Scope())
    with ledger.phase("forward"):
        pass
    ledger.abandon_step()
    ledger.end_step()
    assert ledger.clock.read() == [{}]
