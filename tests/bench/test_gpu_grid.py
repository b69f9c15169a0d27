"""The grid of runs on the GPU machine: every arrangement trains the same runs, and both sides train the same."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from peftdyno.bench.gpu import grid
from peftdyno.bench.gpu.hf_grid import IGNORED, Runs, padded
from peftdyno.bench.gpu.sizes import FULL, TINY
from peftdyno.engine.batching import training_sequences
from peftdyno.engine.recorded_steps import LEAST_STEPS


@pytest.mark.parametrize("arrangement", [grid.TOGETHER, grid.ALL_TOGETHER, grid.ALONE])
def test_every_arrangement_trains_each_run_once(arrangement: str) -> None:
    trainings = grid.groups(FULL.grid, arrangement)
    runs = [(method, *run) for method, group in trainings for run in group]
    seeds = FULL.grid.alone if arrangement == grid.ALONE else FULL.grid.seeds
    assert len(set(runs)) == len(runs) == len(FULL.grid.methods) * len(FULL.grid.tasks) * seeds
    sizes = {len(group) for _, group in trainings}
    assert sizes == {{grid.TOGETHER: 5, grid.ALL_TOGETHER: 10, grid.ALONE: 1}[arrangement]}


def test_a_training_is_long_enough_to_be_recorded() -> None:
    assert FULL.grid.steps >= LEAST_STEPS and FULL.grid.warm_up < FULL.grid.steps


def test_rows_are_as_long_as_the_benchmark_s() -> None:
    for task, (shared, shortest, longest) in enumerate(FULL.grid.tasks):
        rows = grid.examples(FULL.grid, task, 1000)
        lengths = [len(row.tokens) for row in rows]
        assert 60 <= shortest <= min(lengths) and max(lengths) <= longest <= 200
        assert len({row.tokens[:shared] for row in rows}) == 1 and {row.num_labels for row in rows} == {2}


def test_a_plain_loop_stands_for_the_trainer_only_where_that_was_not_measured() -> None:
    row = {"runs_per_hour": 1.0}
    assert grid.theirs({grid.LOOP: row, grid.TRAINER: row}) == grid.TRAINER
    assert grid.theirs({grid.LOOP: row, grid.TRAINER: {"ok": False}}) == grid.LOOP
    with pytest.raises(KeyError):
        grid.theirs({})


def test_padding_carries_no_label() -> None:
    batch = padded([{"tokens": [5, 6, 7], "num_prompt": 2}, {"tokens": [8, 9], "num_prompt": 1}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7], [IGNORED, 9, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("by_trainer", [False, True], ids=["loop", "trainer"])
def test_peft_trains_what_we_train_on_the_same_rows(by_trainer: bool) -> None:
    pytest.importorskip("peft")
    if by_trainer:
        pytest.importorskip("accelerate")
    sizes = replace(TINY, grid=replace(TINY.grid, methods=FULL.grid.methods))
    rows = [grid.examples(sizes.grid, task, sizes.config().vocab_size) for task in range(2)]
    theirs = Runs(sizes, torch.device("cpu"), trainer=by_trainer)
    ordered = theirs._ordered(rows[1], 3)
    ours = [s for step in range(sizes.grid.steps) for s in training_sequences(rows[1], sizes.grid.batch, 3, step, 0)]
    assert [tuple(row["tokens"]) for row in ordered] == [s.tokens for s in ours]
    for method in sizes.grid.methods:
        assert theirs.seconds(method, [(1, 3)], rows) > 0.0
        assert not any(p.requires_grad for p in theirs.base.parameters()), f"{method} left something behind"
