"""PSCP against hand-worked values, its order in each cost, its bootstrap and its ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftdyno.bench.pscp import (
    Constants,
    Exponents,
    Inputs,
    bootstrap,
    exponent_grid,
    factors,
    interval,
    kendall_tau,
    pscp,
    rank_stability,
    ranks,
    uncertainty,
)

costs = st.floats(min_value=0, max_value=1e9)


def test_worked_example():
    # Costs equal to the constants halve the score each: 80 / 2^3 = 10.
    assert pscp(80, 5e8, 10, 94) == pytest.approx(10)
    # Exponents 2, 0.5 and 0: 80 / 4 / sqrt(2).
    exponents = Exponents(parameters=2, tflop=0.5, memory_gb=0)
    assert pscp(80, 5e8, 10, 94, exponents=exponents) == pytest.approx(20 / math.sqrt(2))


def test_no_cost_leaves_the_score():
    assert pscp(63.5, 0, 0, 0) == 63.5


def test_factors_and_extra_factors():
    parts = factors(1e8, 5, 47, Constants(parameters=1e8, tflop=5, memory_gb=47), extra=[(3.0, 1.0, 2.0)])
    assert parts == pytest.approx({"parameters": 0.5, "tflop": 0.5, "memory_gb": 0.5, "extra[0]": 1 / 16})
    constants = Constants(parameters=1e8, tflop=5, memory_gb=47)
    assert pscp(64, 1e8, 5, 47, constants, extra=[(3.0, 1.0, 2.0)]) == pytest.approx(0.5)


@given(score=st.floats(0.01, 100), values=st.tuples(costs, costs, costs), more=st.floats(1e-3, 10))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_higher_cost_never_raises_pscp(which, score, values, more):
    scale = (5e8, 10.0, 94.0)[which]
    dearer = list(values)
    dearer[which] += more * scale
    assert pscp(score, *dearer) < pscp(score, *values)


@given(low=st.floats(0, 99), step=st.floats(0.01, 1), values=st.tuples(costs, costs, costs))
def test_a_higher_score_raises_pscp(low, step, values):
    assert pscp(low + step, *values) > pscp(low, *values)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("field", ["score", "parameters", "tflop", "memory_gb"])
def test_bad_inputs_are_named(field, bad):
    values = {"score": 50.0, "parameters": 1.0, "tflop": 1.0, "memory_gb": 1.0} | {field: bad}
    with pytest.raises(ValueError, match=f"^{field} is "):
        pscp(**values)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="score is 101"):
        pscp(101, 1, 1, 1)
    with pytest.raises(ValueError, match=r"constants\.tflop is 0"):
        Constants(tflop=0)
    with pytest.raises(ValueError, match=r"exponents\.memory_gb is -1"):
        Exponents(memory_gb=-1)
    with pytest.raises(ValueError, match=r"^extra\[1\] is -2"):
        pscp(50, 1, 1, 1, extra=[(1, 1, 1), (-2, 1, 1)])
    with pytest.raises(ValueError, match=r"the constant of extra\[0\]"):
        pscp(50, 1, 1, 1, extra=[(1, 0, 1)])


def _runs(generator, tasks=12, seeds=5):
    means = generator.uniform(50, 80, size=(tasks, 1))
    return means + generator.normal(0, 4, size=(tasks, seeds))


def test_bootstrap_is_the_same_for_a_seed():
    scores = _runs(np.random.default_rng(3))
    memory = np.random.default_rng(4).uniform(20, 30, scores.shape)
    one, two = (bootstrap(scores, memory, 1e6, 0.1, seed=7, draws=50) for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, bootstrap(scores, memory, 1e6, 0.1, seed=8, draws=50))


def test_bootstrap_of_identical_runs_is_the_metric():
    drawn = bootstrap(np.full((3, 4), 60.0), 25.0, 1e7, 0.5, draws=20, extra=[(2.0, 4.0, 1.0)])
    assert drawn == pytest.approx(pscp(60, 1e7, 0.5, 25, extra=[(2.0, 4.0, 1.0)]))


def test_a_run_keeps_its_score_and_memory_together():
    # Score and memory fall together such that each run alone gives PSCP 30; mixing them would not.
    scores = np.array([[60.0], [90.0]])
    drawn = bootstrap(scores, scores / 30 * 94 - 94, 0, 0, over=("tasks",), draws=200)
    assert drawn == pytest.approx(30)


def test_seeds_alone_keep_every_task():
    scores = np.array([[10.0, 10.0], [90.0, 90.0]])
    assert bootstrap(scores, 0.0, 0, 0, over=("seeds",), draws=50) == pytest.approx(50)
    assert np.std(bootstrap(scores, 0.0, 0, 0, over=("tasks",), draws=50)) > 1


def test_methods_share_their_draws_of_tasks():
    scores = _runs(np.random.default_rng(0), seeds=1)
    first, second = (bootstrap(scores + shift, 0.0, 0, 0, over=("tasks",), draws=100) for shift in (0, 5))
    assert second - first == pytest.approx(5)


@pytest.mark.parametrize(("over", "least"), [(("seeds",), 0.85), (("tasks",), 0.88)])
def test_interval_covers_the_true_value(over, least):
    generator, hits, trials = np.random.default_rng(11), 0, 200
    task_means = generator.uniform(50, 80, size=(25, 1))
    truth = float(task_means.mean()) if over == ("seeds",) else 65.0
    for trial in range(trials):
        means = task_means if over == ("seeds",) else generator.uniform(50, 80, size=(25, 1))
        scores = means + generator.normal(0, 5, size=(25, 5))
        result = uncertainty(scores, 94.0, 0, 0, over=over, draws=300, seed=trial)
        hits += result.low <= truth / 2 <= result.high
    assert least <= hits / trials < 1


def test_estimate_lies_inside_its_interval():
    result = uncertainty(_runs(np.random.default_rng(1)), 27.0, 1e7, 0.0)
    assert result.low < result.estimate < result.high
    assert result.draws == 2000


def test_bootstrap_refuses_missing_and_misshapen_runs():
    scores = np.full((3, 2), 50.0)
    with pytest.raises(ValueError, match="scores holds a negative, missing"):
        bootstrap([[1.0, math.nan]], 1.0, 1, 1)
    with pytest.raises(ValueError, match="scores has shape"):
        bootstrap([1.0, 2.0], 1.0, 1, 1)
    with pytest.raises(ValueError, match="memory_gb has shape"):
        bootstrap(scores, [1.0, 2.0], 1, 1)
    with pytest.raises(ValueError, match="only one"):
        bootstrap(np.full((3, 1), 50.0), 1.0, 1, 1)
    with pytest.raises(ValueError, match="over is"):
        bootstrap(scores, 1.0, 1, 1, over=("runs",))
    with pytest.raises(ValueError, match="draws is 0"):
        bootstrap(scores, 1.0, 1, 1, draws=0)


def test_interval_of_known_draws():
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5, 95))
    with pytest.raises(ValueError, match="level is 95"):
        interval(np.arange(3.0), 95)


def test_ranks_share_ties():
    assert ranks({"a": 3.0, "b": 5.0, "c": 3.0, "d": 1.0}) == {"a": 2, "b": 1, "c": 2, "d": 4}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8))
def test_kendall_tau_agrees_with_scipy(pairs):
    stats = pytest.importorskip("scipy.stats")
    first, second = (list(values) for values in zip(*pairs, strict=True))
    assert kendall_tau(first, second) == pytest.approx(stats.kendalltau(first, second).statistic, nan_ok=True)


def test_rank_stability_by_hand():
    # Without a memory cost "big" leads; at exponent 1 and above its memory halves it and "small" leads.
    methods = {
        "small": Inputs(score=50, parameters=0, tflop=0, memory_gb=0),
        "big": Inputs(score=80, parameters=0, tflop=0, memory_gb=94),
    }
    grid = [Exponents(memory_gb=value) for value in (0, 1, 2, 3)]
    result = rank_stability(methods, grid)
    assert result.rank == {"small": 1, "big": 2}
    assert result.kept == {"small": 0.75, "big": 0.75}
    assert (result.best["big"], result.worst["big"]) == (1, 2)
    assert result.mean_tau == pytest.approx(0.5)
    assert (result.least_tau, result.settings) == (-1, 4)


def test_exponent_grid_is_every_combination():
    assert len(set(exponent_grid((0, 1, 2)))) == 27
