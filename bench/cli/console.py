"""What commands print: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from peftdyno.bench.progress import Progress, RowProgress, TrainProgress

OUT = Console(soft_wrap=True)
ERR = Console(stderr=True, soft_wrap=True)
LINES = 10
"""Lines of progress of one training or scoring where stderr is no terminal."""


def print_json(value: Any) -> None:
    """Indented JSON on stdout and nothing else."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table whose columns after the first are aligned to the right where they hold numbers."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        numbers = i > 0 and all(row[i][:1].isdigit() or row[i][:1] in "-+" for row in rows if row[i])
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def progress_for(quiet: bool) -> Progress:
    """Bars on a terminal, a few lines elsewhere, nothing where it is to be quiet."""
    if quiet:
        return Progress()
    progress = BarProgress() if ERR.is_terminal else LineProgress()
    _tell_news(progress)
    return progress


class News(logging.Handler):
    """Passes on what the engine has to say, such as that a model is being downloaded."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.INFO)
        self.progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        self.progress.say(record.getMessage())


def _tell_news(progress: Progress) -> None:
    logger = logging.getLogger("peftdyno")
    logger.handlers = [News(progress)]
    logger.setLevel(logging.INFO)


def _remaining(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Rate:
    """Tokens a second and the time left, from what this process has done so far."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first: int | None = None
        self.tokens = 0

    def see(self, done: int, total: int, tokens: int) -> tuple[float, str]:
        """(tokens a second, time left)."""
        if self.first is None:
            self.first = done - 1
        self.tokens += tokens
        spent = max(time.monotonic() - self.start, 1e-9)
        left = spent * (total - done) / max(done - self.first, 1)
        return self.tokens / spent, _remaining(left)


class LineProgress(Progress):
    """A line now and then."""

    @contextmanager
    def training(self, label: str) -> Iterator[TrainProgress]:
        rate = Rate()

        def tell(done: int, total: int, loss: float, tokens: int) -> None:
            speed, left = rate.see(done, total, tokens)
            if done == total or done % max(1, total // LINES) == 0:
                self.say(f"{label}: step {done}/{total}, loss {loss:.4f}, {speed:.0f} tokens/s, {left} left")

        yield tell

    @contextmanager
    def scoring(self, label: str) -> Iterator[RowProgress]:
        told = 0

        def tell(done: int, total: int) -> None:
            nonlocal told
            if done == total or (done - told) * 4 >= total:
                told = done
                self.say(f"{label}: {done}/{total} rows")

        yield tell

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class BarProgress(Progress):
    """A bar for each training and scoring."""

    @contextmanager
    def training(self, label: str) -> Iterator[TrainProgress]:
        rate = Rate()
        with _bar() as bar:
            task = bar.add_task(label, total=None, news="")

            def tell(done: int, total: int, loss: float, tokens: int) -> None:
                speed, left = rate.see(done, total, tokens)
                news = f"loss {loss:.4f}  {speed:.0f} tokens/s  {left} left"
                bar.update(task, completed=done, total=total, news=news)

            yield tell

    @contextmanager
    def scoring(self, label: str) -> Iterator[RowProgress]:
        rate = Rate()
        with _bar() as bar:
            task = bar.add_task(label, total=None, news="")

            def tell(done: int, total: int) -> None:
                left = rate.see(done, total, 0)[1]
                bar.update(task, completed=done, total=total, news=f"{left} left")

            yield tell

    def say(self, text: str) -> None:
        ERR.print(text, style="dim", highlight=False)


def _bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[news]}"))
    return RichProgress(*columns, console=ERR)
