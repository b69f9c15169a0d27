"""What a compiled kernel uses, read off its machine code with the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from triton import knobs

_MATRIX = re.compile(r"\b(HMMA|HGMMA|QGMMA|IMMA|UTC\w*MMA)\b")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    """Registers a thread, spilled bytes, kinds of tensor-core instruction, and instructions of the longest loop, of the
    whole kernel where there is none."""

    registers: int
    spills: int
    matrix: str
    longest: int


def read(binary: bytes) -> MachineCode:
    """A kernel's machine code as the driver loads it; raises CalledProcessError where it is none."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, listing = _dump("-res-usage", file.name), _dump("-sass", file.name)
    registers, stack, local = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    matrix = "+".join(sorted(set(_MATRIX.findall(listing))))
    return MachineCode(
        registers, stack + local, matrix, max(_loops(listing), default=len(_INSTRUCTION.findall(listing)))
    )


def _dump(option: str, file: str) -> str:
    command = [str(knobs.nvidia.cuobjdump.path), option, file]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _loops(listing: str) -> Iterator[int]:
    """Instructions from the target of each branch that goes back to the branch itself."""
    code = [(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(listing)]
    places = [at for at, _, _ in code]
    for i, (at, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < at:
            yield i - places.index(int(target[1], 16)) + 1
