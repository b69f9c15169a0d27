"""Rows in a folder: DIR/TASK/SPLIT.jsonl, .jsonl.gz or .parquet."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftdyno.engine.errors import UserError, first_line

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def task_folder(data_dir: Path, task: str) -> Path:
    """The task's folder; UserError lists what is there."""
    if not data_dir.is_dir():
        raise UserError(f"data folder {data_dir} does not exist or is not a folder")
    folder = data_dir / task
    if not folder.is_dir():
        there = sorted(item.name for item in data_dir.iterdir() if item.is_dir())
        close = difflib.get_close_matches(task, there, n=3, cutoff=0.4)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise UserError(f"data folder {data_dir} has no folder '{task}'{hint}; it has: {', '.join(there) or 'none'}")
    return folder


def split_files(folder: Path) -> dict[str, Path]:
    """Split name -> its file; two files of one split are an error."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((ending for ending in ENDINGS if path.name.endswith(ending)), None)
        if ending is None or not path.is_file():
            continue
        split = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".parquet")
        if split in found:
            raise UserError(f"{folder}: split '{split}' is there twice: {found[split].name} and {path.name}; keep one")
        found[split] = path
    return found


def split_file(folder: Path, split: str) -> Path:
    """File of a split; UserError lists the splits that are there."""
    files = split_files(folder)
    if split not in files:
        there = ", ".join(files) or f"none (expected {split}.jsonl, {split}.jsonl.gz or {split}.parquet)"
        raise UserError(f"{folder} has no split '{split}'; the splits there: {there}")
    return files[split]


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(row number from 1, row) of a file; for JSON lines the number is that of the line."""
    return _parquet_rows(path) if path.name.endswith(".parquet") else list(_json_rows(path))


def sha256(path: Path) -> str:
    """SHA-256 of the file's bytes as they lie on disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} row {number}: not JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: expected an object with columns, found {type(row).__name__}")
        yield number, row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.name.endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} row {number}: not UTF-8 ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} row {number + 1}: cannot be read ({first_line(error)}); is it whole?") from error


def _parquet_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'peftdyno[hf]'") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)}); is it whole?") from error
    return list(enumerate(rows, start=1))
