"""Kernels compiled without a GPU, held to their limits; `make aot` compiles all of them for every architecture."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftdyno.kernels.library import every_primitive
from peftdyno.kernels.triton import OPERATORS, ahead


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process that compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_kernel_holds_its_limits_on_hopper() -> None:
    result = python("-m", "peftdyno.kernels.triton.ahead", "--arch", "90", "--only", "lora: dB, rank 16")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MMA" in result.stdout and "Warning" not in result.stderr, result.stderr


def test_a_broken_limit_is_found() -> None:
    code = (
        "from dataclasses import replace; from peftdyno.kernels.triton import ahead, compiled, rotary\n"
        "limits = compiled.Limits(registers=8, matrix=compiled.WIDE)\n"
        "print(ahead.measure(replace(rotary.COMPILED[0], limits=limits), 90).broken)"
    )
    found = python("-c", code)
    assert "registers > 8" in found.stdout and "no tensor cores instead of HGMMA" in found.stdout, found.stderr


@pytest.mark.parametrize(
    ("name", "tokens", "columns", "warps", "broken"),
    [
        ("lora: masked dx, rank 16", 32, 128, 4, "HMMA instead of HGMMA"),
        ("lora: dA, dropout, rank 16", 32, 64, 8, "instructions an element > 13.0"),
    ],
    ids=["too few rows for Hopper's wide products", "too few elements a thread"],
)
def test_a_worse_tile_is_found(name: str, tokens: int, columns: int, warps: int, broken: str) -> None:
    """By the one limit that tells."""
    code = (
        "from dataclasses import replace; from peftdyno.kernels.triton import ahead, skinny\n"
        f"case = next(case for case in skinny.COMPILED if case.name == {name!r})\n"
        f"constants = case.constants | {{'TOKENS': {tokens}, 'BLOCK': {columns}}}\n"
        f"worse = replace(case, tile='', constants=constants, num_warps={warps})\n"
        "print(ahead.measure(case, 90).broken, ahead.measure(worse, 90).broken)"
    )
    found = python("-c", code)
    assert found.stdout.strip() == f"() ({broken!r},)", found.stdout + found.stderr


def test_flat_parameters_are_addressed_in_64_bits() -> None:
    """Full fine-tuning trains more than 2**31 values a run."""
    code = "from peftdyno.kernels.triton import adamw, ahead\nprint(ahead.compiled(adamw.COMPILED[0], 90).asm['ttir'])"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    offsets = [line for line in result.stdout.splitlines() if "tt.addptr" in line and "tensor<" in line]
    assert len(offsets) >= 4, result.stderr
    assert all("xi64>" in line for line in offsets), offsets


def test_every_operator_has_a_kernel() -> None:
    assert set(OPERATORS) == set(every_primitive()), "an explicit choice of Triton never falls back"


def test_every_launched_kernel_is_compiled_ahead() -> None:
    """What host code launches by `kernel[grid](...)`, which is all there is."""
    folder = Path(ahead.__file__).parent
    launched = {(file.stem, name) for file in folder.glob("*.py") for name in launches(ast.parse(file.read_text()))}
    listed = {(case.kernel.fn.__module__.split(".")[-1], case.kernel.fn.__name__) for case in ahead.cases()}
    assert listed == launched and len(listed) > 20


def launches(tree: ast.Module) -> set[str]:
    """Names of a module's own functions that are called with a grid."""
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [
        node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
    ]
    return {call.value.id for call in calls if isinstance(call.value, ast.Name)} & own
