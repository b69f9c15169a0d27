"""A worker process as its parent sees it: one JSON line asks, one answers; between them the worker waits on a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

WORKER = "peftdyno.bench.compare.worker"


class WorkerError(RuntimeError):
    """What went wrong in a worker, in one line."""


class WorkerTimeout(WorkerError):
    """A worker did not answer in time; it has been ended."""


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_environment(threads: int) -> dict[str, str]:
    """Variables under which both sides run: as many threads. How threads wait is left as users have it; one without
    work sleeps long before the other side's turn is over."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


class Worker:
    """One side's process. It serves one job at a time and is silent on its standard output; what it writes to standard
    error is kept in a file and shown where something fails."""

    def __init__(self, side: str, environment: Mapping[str, str]) -> None:
        self.side = side
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, **quiet, **environment},
        )
        self.pending = b""
        self.shown = 0

    def open(self, job: str, timeout: float | None = None, **settings: Any) -> Any:
        """Replace the worker's job; its settings are the job's fields."""
        return self._ask({"open": job, "arguments": settings}, timeout)

    def call(self, method: str, timeout: float | None = None, **arguments: Any) -> Any:
        """Result of a method of the open job. WorkerError where it failed, WorkerTimeout after `timeout` seconds."""
        return self._ask({"call": method, "arguments": arguments}, timeout)

    def close(self) -> None:
        """End the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # a request that an ended process did not take
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()

    def _ask(self, request: dict[str, Any], timeout: float | None) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        reply = json.loads(self._line(timeout))
        if "error" in reply:
            self._show_errors()
            raise WorkerError(f"{self.side}: {reply['error']}")
        return reply["result"]

    def _line(self, timeout: float | None) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self.pending:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([descriptor], [], [], left)[0]:
                self.process.kill()
                self._show_errors()
                raise WorkerTimeout(f"{self.side}: no answer after {timeout:.0f} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise self._ended()
            self.pending += piece
        line, _, self.pending = self.pending.partition(b"\n")
        return line

    def _ended(self) -> WorkerError:
        status = self.process.wait()
        last = self._show_errors()
        return WorkerError(f"{self.side}: the process ended with status {status}{': ' if last else ''}{last}")

    def _show_errors(self) -> str:
        """Pass what the worker wrote to standard error since the last time on to ours; its last line."""
        new = os.pread(self.errors.fileno(), os.fstat(self.errors.fileno()).st_size - self.shown, self.shown)
        self.shown += len(new)
        text = new.decode(errors="replace")
        sys.stderr.write(text)
        return next(reversed(text.strip().splitlines()), "")
