"""The comparison's JSON file: a record a section, each with where and when it was measured."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftdyno.bench import machine
from peftdyno.bench.compare.turns import Row, row_from
from peftdyno.bench.store import read_object
from peftdyno.engine.atomic import write_json
from peftdyno.engine.errors import UserError

SCHEMA_VERSION = 1


def module_command(module: str) -> str:
    """The command line of this process, which runs a module."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def section_record(
    rows: Sequence[Row],
    seconds: float,
    error: str,
    settings: Mapping[str, Any],
    threads: int,
    module: str = "peftdyno.bench.compare",
) -> dict[str, Any]:
    """All that is known of one finished or failed section, which this process measured as `module`."""
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "command": module_command(module),
        "versions": machine.versions(),
        "machine": {**machine.machine(), "threads": threads},
        "git": machine.git(),
        "settings": dict(settings),
        "error": error,
        "rows": [row.as_dict() for row in rows],
    }


class Results:
    """Sections by name, kept in a file that is whole at any time; sections measured earlier stay in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sections: dict[str, dict[str, Any]] = {}
        if path.exists():
            found = read_object(path)
            if found.get("schema_version") != SCHEMA_VERSION or not isinstance(found.get("sections"), dict):
                raise UserError(f"{path} is no comparison of this version; give another --out or remove it")
            self.sections = found["sections"]

    def put(self, name: str, record: dict[str, Any]) -> None:
        """Store a section in place of its earlier record."""
        self.sections[name] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"schema_version": SCHEMA_VERSION, "sections": self.sections})

    def rows(self, names: Sequence[str]) -> list[Row]:
        """Rows of the named sections, in that order."""
        return [row_from(row) for name in names if name in self.sections for row in self.sections[name]["rows"]]

    def errors(self, names: Sequence[str]) -> dict[str, str]:
        """What failed, by section."""
        found = {name: self.sections[name]["error"] for name in names if name in self.sections}
        return {name: error for name, error in found.items() if error}
