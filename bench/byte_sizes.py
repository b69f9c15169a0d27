"""Sizes of memory as people write them: 8GiB, 900MB, 2e9."""

from __future__ import annotations

import math
import re

from peftdyno.engine.errors import UserError

UNITS = {
    "": 1, "B": 1,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_PATTERN = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")


def parse_size(value: object) -> int:
    """Bytes of a number or a text with a unit; UserError where it is not a size of at least one byte."""
    found = _PATTERN.fullmatch(str(value).strip())
    unit = None if found is None else UNITS.get(found[2].upper())
    size = 0.0 if found is None or unit is None else float(found[1]) * unit
    if not 1 <= size < math.inf:
        raise UserError(f"'{value}' is no size of memory; give bytes or a unit, e.g. 8GiB, 900MB or 2e9")
    return int(size)


def show_size(size: int) -> str:
    """A size in the largest of GiB, MiB and KiB that it holds."""
    unit = next((name for name in ("GiB", "MiB") if size >= UNITS[name.upper()]), "KiB")
    return f"{size / UNITS[unit.upper()]:.1f} {unit}"


def show_enough(size: int) -> str:
    """The least whole number of MiB that holds a size (of KiB below 10 MiB), as the command line takes it."""
    unit = "MiB" if size >= 10 * UNITS["MIB"] else "KiB"
    return f"{-(-size // UNITS[unit.upper()])}{unit}"
