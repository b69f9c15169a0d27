"""Folders that appear whole or not at all, and the cache of converted models with their checksums."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from peftdyno.engine.errors import UserError

MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """Where converted models are kept: ``PEFTDYNO_CACHE``, else ``~/.cache/peftdyno``."""
    return Path(os.environ.get("PEFTDYNO_CACHE") or Path.home() / ".cache" / "peftdyno").expanduser()


@contextmanager
def publish_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder beside the wanted one, and renames it when the block ends well.

    Files are synced before the rename, and the partial folder is removed when the block raises.
    Raises UserError where the wanted folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not empty; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{uuid4().hex[:12]}.partial"
    partial.mkdir()
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        os.replace(partial, folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Has the system write a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time work on a cache entry."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, source: Mapping[str, str]) -> None:
    """Writes the checksum of every file of a folder, and where they came from."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    text = json.dumps({"source": dict(source), "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def verified_manifest(folder: Path) -> dict[str, str] | None:
    """The manifest's source if every file of the folder still has its checksum, else None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, source = manifest["files"], manifest["source"]
        intact = all(sha256_of(folder / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return source if intact and isinstance(source, dict) else None
