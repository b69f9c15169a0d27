"""Sweeps: the grid, what trains together, what is skipped, and what a failure leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftdyno.bench import sweep as sweeps
from peftdyno.bench.base_model import load_base
from peftdyno.bench.progress import Progress
from peftdyno.bench.sweep import Sweep
from peftdyno.engine.errors import UserError


def values(model: Path, data: Path, **more):
    common = {"model": str(model), "data": data, "dtype": "fp32", "steps": 2, "batch": 2, "limit_test": 4}
    return {**common, "methods": "lora,ia3", "tasks": "sst2", "seeds": "1,2,3", **more}


@pytest.fixture(scope="module")
def base(tiny_model: Path):
    return load_base(str(tiny_model), "fp32", "cpu")


@pytest.fixture
def groups(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """The groups that were run, in order."""
    seen = []
    run_job = sweeps.run_job

    def watched(job, *rest):
        seen.append((job.settings.method, job.settings.seeds))
        return run_job(job, *rest)

    monkeypatch.setattr(sweeps, "run_job", watched)
    return seen


def run(base, out: Path, given, together="auto"):
    return Sweep.plan(out, given, together).run(base, Progress())


def test_seeds_train_together_and_finished_runs_are_skipped(base, tiny_data, tmp_path: Path, groups) -> None:
    given = values(base.files.name, tiny_data)
    first = run(base, tmp_path, given)
    assert groups == [("lora", (1, 2, 3)), ("ia3", (1, 2, 3))]
    assert len(first.trained) == 6 and not first.failed and not first.skipped
    second = run(base, tmp_path, {**given, "seeds": "1,2,3,4"}, together=2)
    assert groups[2:] == [("lora", (4,)), ("ia3", (4,))]
    assert len(second.skipped) == 6 and second.trained == ["lora sst2 seed 4", "ia3 sst2 seed 4"]
    assert json.loads((tmp_path / "sweep.json").read_text())["grid"]["seeds"] == [1, 2, 3, 4]
    assert len(list((tmp_path / "baselines").iterdir())) == 1, "the untuned model is scored once a task"


def test_group_size(base, tiny_data, tmp_path: Path, groups) -> None:
    run(base, tmp_path, values(base.files.name, tiny_data, methods="ia3"), together=2)
    assert groups == [("ia3", (1, 2)), ("ia3", (3,))]


def test_an_unfinished_group_stays_together(base, tiny_data, tmp_path: Path, groups, monkeypatch) -> None:
    given = values(base.files.name, tiny_data, methods="ia3")

    def stop(job, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("peftdyno.bench.job._score", stop)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path, given)
    run(base, tmp_path, {**given, "seeds": "1,2,3,4"})
    assert groups == [("ia3", (1, 2, 3)), ("ia3", (1, 2, 3)), ("ia3", (4,))]


def test_a_failure_is_recorded_and_does_not_stop_the_others(base, tiny_data, tmp_path: Path, monkeypatch) -> None:
    given = values(base.files.name, tiny_data, seeds="1")
    run_job = sweeps.run_job

    def broken(job, *rest):
        if job.settings.method == "lora":
            raise RuntimeError("the machine is on fire")
        return run_job(job, *rest)

    with monkeypatch.context() as context:
        context.setattr(sweeps, "run_job", broken)
        outcome = run(base, tmp_path, given)
    assert outcome.trained == ["ia3 sst2 seed 1"]
    assert outcome.failed == {"lora sst2 seed 1": "the machine is on fire"}
    note = json.loads((tmp_path / "runs/lora/sst2/seed-1/failure.json").read_text())
    assert note["kind"] == "RuntimeError" and "in broken" in note["traceback"]
    again = run(base, tmp_path, given)
    assert again.trained == ["lora sst2 seed 1"] and again.skipped == ["ia3 sst2 seed 1"]
    assert not (tmp_path / "runs/lora/sst2/seed-1/failure.json").exists()


def test_a_task_without_data_fails_alone(base, tiny_data, tmp_path: Path) -> None:
    outcome = run(base, tmp_path, values(base.files.name, tiny_data, tasks="rte,sst2", methods="ia3", seeds="1"))
    assert outcome.trained == ["ia3 sst2 seed 1"]
    assert "has no folder 'rte'" in outcome.failed["ia3 rte seed 1"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"methods": "lora,lorra"}, "unknown method 'lorra'; did you mean lora"),
        ({"tasks": "sst3"}, "unknown task 'sst3'; did you mean sst2"),
        ({"seeds": "one"}, "seed 'one' must be a whole number"),
        ({"methods": None}, "a sweep needs methods"),
        ({"lora": {"rnk": 2}}, "unknown lora setting 'rnk'"),
        ({"svft": {"rank": 2}}, "unknown section of settings 'svft'"),
        ({"stepz": 2}, "unknown setting 'stepz'"),
    ],
)
def test_wrong_grids_are_refused_before_anything_runs(tiny_model, tiny_data, tmp_path, more, message) -> None:
    with pytest.raises(UserError) as error:
        Sweep.plan(tmp_path / "sweep", values(tiny_model, tiny_data, **more))
    assert message in str(error.value) and not (tmp_path / "sweep").exists()


def test_other_settings_need_another_folder(tiny_model, tiny_data, tmp_path: Path) -> None:
    Sweep.plan(tmp_path, values(tiny_model, tiny_data, methods="lora"))
    with pytest.raises(UserError, match="a sweep with steps 2, now it is 3"):
        Sweep.plan(tmp_path, values(tiny_model, tiny_data, methods="lora", steps=3))
    with pytest.raises(UserError, match=r"a sweep with lora None, now it is \{'rank': 2\}"):
        Sweep.plan(tmp_path, values(tiny_model, tiny_data, methods="lora", lora={"rank": 2}))
    Sweep.plan(tmp_path, values(tiny_model, tiny_data, methods="lora,ia3", ia3={"learning_rate": 0.1}))
