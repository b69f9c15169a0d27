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
        """Rows of the named sections, in that order, as far as they were measured where the newest was."""
        return [row_from(row) for section in self._here(names).values() for row in section["rows"]]

    def errors(self, names: Sequence[str]) -> dict[str, str]:
        """What failed, by section, where the newest was measured."""
        return {name: section["error"] for name, section in self._here(names).items() if section["error"]}

    def elsewhere(self, names: Sequence[str]) -> dict[str, str]:
        """Sections that were measured in another place than the newest, and where."""
        here = self._here(names)
        return {name: _place(self.sections[name]) for name in names if name in self.sections and name not in here}

    def _here(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        if not self.sections:
            return {}
        place = _place(max(self.sections.values(), key=lambda section: section["finished"]))
        found = {name: self.sections[name] for name in names if name in self.sections}
        return {name: section for name, section in found.items() if _place(section) == place}


def _place(section: Mapping[str, Any]) -> str:
    """Processor, instruction set and threads: figures of two places do not go together."""
    found = section["machine"]
    return f"{found['processor']}, {found.get('cpu_kernels') or 'kernels not noted'}, {found['threads']} threads"
