"""The worker processes of comparisons: jobs, faults, how they end, and that they wait without working."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from peftdyno.bench.compare import link
from peftdyno.bench.compare.link import Worker, WorkerError, WorkerTimeout, thread_environment


@pytest.fixture(scope="module")
def worker():
    process = Worker("ours", thread_environment(1))
    yield process
    process.close()


def test_a_worker_serves_jobs_and_names_faults(worker, tiny_model):
    with pytest.raises(WorkerError, match=r"ours: UserError.*ours\.steps"):
        worker.open("ours.step")
    batch = [{"tokens": [5, 6, 7, 8, 9], "num_prompt": 2}, {"tokens": [7, 5, 9], "num_prompt": 2}]
    options = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
    settings = {"model": str(tiny_model), "method": "lora", "options": options}
    settings |= {"batches": [batch], "learning_rate": 1e-3}
    worker.open("ours.steps", **settings)
    assert len(worker.call("trajectory", steps=2)["losses"]) == 2
    sample = worker.call("measure", steps=3)
    assert sample["units"] == 3 and sample["seconds"] > 0
    with pytest.raises(WorkerError, match="TypeError"):
        worker.call("measure", wrong=1)
    assert worker.call("measure_memory")["peak_bytes"] > 1e7


def test_an_idle_worker_uses_no_processor_time(worker):
    def processor_time() -> int:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    with pytest.raises(WorkerError):
        worker.open("nothing")
    time.sleep(0.2)
    before = processor_time()
    time.sleep(0.5)
    assert (processor_time() - before) / os.sysconf("SC_CLK_TCK") < 0.1


def test_a_worker_that_takes_too_long_is_ended(tiny_model):
    slow = Worker("slow", thread_environment(1))
    try:
        with pytest.raises(WorkerTimeout, match="slow: no answer after 0 s"):
            slow.open("ours.steps", 0.01, model=str(tiny_model))
        with pytest.raises(WorkerError, match="ended"):
            slow.call("measure", steps=1)
    finally:
        slow.close()


def test_a_worker_that_has_ended_says_what_it_left(monkeypatch, capfd):
    monkeypatch.setattr(link, "WORKER", "peftdyno.bench.compare.nothing")
    gone = Worker("gone", thread_environment(1))
    gone.process.wait()
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"gone: the process ended with status 1"):
            gone.call("measure", steps=1)
    gone.close()
    assert capfd.readouterr().err.count("No module named peftdyno.bench.compare.nothing") == 1


def test_the_last_words_of_a_worker_are_in_the_error(monkeypatch):
    monkeypatch.setattr(link, "WORKER", "peftdyno.bench.compare.nothing")
    gone = Worker("gone", thread_environment(1))
    try:
        with pytest.raises(WorkerError, match=r"status 1: .*No module named peftdyno\.bench\.compare\.nothing"):
            gone.open("ours.steps")
    finally:
        gone.close()


def test_a_failed_jobs_traceback_is_shown(worker, capfd):
    with pytest.raises(WorkerError, match=r"UserError"):
        worker.open("ours.step")
    assert "Traceback" in capfd.readouterr().err


def test_threads_wait_as_the_user_has_it() -> None:
    assert thread_environment(3) == {"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}
