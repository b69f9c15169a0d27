"""Files that appear whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftdyno.engine.errors import UserError

PARTIAL = ".partial-"
"""Beginning of the name of a file or folder still being written."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what was written there takes the name `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{PARTIAL}{os.getpid()}-{path.name}"
    try:
        with disk_errors(path):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it takes the name `path` at the end, in place of an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{PARTIAL}{os.getpid()}-{path.name}"
    old = path.parent / f"{PARTIAL}{os.getpid()}-old-{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(path):
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                sync(file)
            sync(temporary)
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full or read-only disk as one line that says what could not be written; what was there before is kept."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise UserError(f"cannot write {path}: {error.strerror}; what was there before is kept") from error
        raise


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def remove_partials(folder: Path) -> None:
    """Delete what a killed writer left behind in a folder."""
    for path in folder.glob(f"{PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
