"""The house style that a machine can check: arrows between packages, sizes, names, and the README's tree."""

import ast
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("engine", "kernels", "bench")
MAY_IMPORT = {
    "kernels": {"kernels"},
    "engine": {"engine", "kernels"},
    "bench": {"bench", "engine", "kernels"},
}
PROUD_LINES, MAX_LINES = 60, 120
TRITON_LINES, LOOP_LINES = 120, 150
MAX_FILE_LINES = 450
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}


def package_files() -> list[Path]:
    return sorted(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))


def all_files() -> list[Path]:
    rest = [file for name in ("tests", "docs") for file in sorted((ROOT / name).rglob("*.py"))]
    return [*package_files(), *rest, ROOT / "setup.py"]


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(source: str, module: str) -> set[str]:
    """Full names that imports may bind; `module` is the full name of their file, `.__init__` included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def wrong_arrows(source: str, module: str) -> set[str]:
    """Packages of ours that a module imports and its own package must not know."""
    targets = {name.split(".")[1] for name in imported(source, module) if name.startswith("peftdyno.")}
    return (targets & set(PACKAGES)) - MAY_IMPORT[module.split(".")[1]]


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("kernels.glu", "import peftdyno.engine.pack", {"engine"}),
        ("kernels.glu", "from peftdyno import bench", {"bench"}),
        ("kernels.glu", "from ..engine import pack", {"engine"}),
        ("kernels.__init__", "from ..engine import pack", {"engine"}),
        ("engine.adapters.lora", "from ...bench.tasks import TASKS", {"bench"}),
        ("engine.adapters.lora", "def f():\n    from peftdyno.bench import pscp", {"bench"}),
        ("engine.adapters.lora", "from ..pack import Pack", set()),
        ("engine.decoder", "from peftdyno.kernels import rms_norm", set()),
        ("bench.sweep", "import peftdyno.engine, peftdyno.kernels.glu", set()),
    ],
)
def test_arrow_reader(module: str, line: str, wrong: set[str]) -> None:
    assert wrong_arrows(line, f"peftdyno.{module}") == wrong


def test_imports_point_one_way() -> None:
    wrong = {}
    for file in package_files():
        module = "peftdyno." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if found := wrong_arrows(file.read_text(), module):
            wrong[short(file)] = found
    assert not wrong, "bench -> engine -> kernels is the only direction"


def limits(function: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """Lines of a function worth a warning, and lines that fail."""
    if any("triton" in ast.unparse(decorator) for decorator in function.decorator_list):
        return TRITON_LINES, TRITON_LINES
    if function.name == "train":
        return LOOP_LINES, LOOP_LINES
    return PROUD_LINES, MAX_LINES


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_one_idea() -> None:
    long, gross = [], []
    for file in all_files():
        for function in functions(file):
            lines = function.end_lineno - function.lineno + 1
            proud, most = limits(function)
            place = f"{short(file)}:{function.lineno} {function.name} has {lines} lines"
            (gross if lines > most else long if lines > proud else []).append(place)
    if long:
        warnings.warn("long functions:\n" + "\n".join(long), stacklevel=1)
    assert not gross


def test_files_are_short() -> None:
    lengths = {short(file): len(file.read_text().splitlines()) for file in all_files()}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}


def test_files_are_named_after_a_noun() -> None:
    assert not [short(file) for file in package_files() if {file.stem, file.parent.name} & VAGUE]


def test_readme_tree_is_current() -> None:
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tree.py")
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    mute = [short(file) for file in package_files() if not tree.phrase(file)]
    assert not mute, "each needs a docstring whose first line says what it is for"
    assert tree.written() == tree.tree(), "README.md is behind the files; run `make tree`"
