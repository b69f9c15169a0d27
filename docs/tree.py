"""Writes the file tree of README.md from the first docstring line of every module (`make tree`)."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- tree: written by `make tree` -->\n```text\n", "```\n<!-- end of tree -->"
PACKAGES = ("engine", "kernels", "bench")
COLUMN = 26
REST = {
    "csrc/": "C++ behind the CPU kernels, one file an operation",
    "tests/": "the same folders as the code, and the style, security and import checks",
    "docs/": "guides, decisions and measured results",
}


def phrase(file: Path) -> str:
    """First line of a module's docstring, without its full stop and without a clause that runs on; empty where there is
    none."""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    first, _, rest = docstring.partition("\n")
    if not first.endswith(".") and rest.strip() and rest[0] != "\n":
        first = first[: max(first.rfind(mark) for mark in (", ", ": ", "; ", ". "))]
    return first.rstrip(".")


def row(depth: int, name: str, text: str) -> str:
    """One line of the tree, the phrases aligned."""
    return f"{'  ' * depth + name:<{COLUMN}} {text}".rstrip()


def folder(path: Path, depth: int = 0) -> list[str]:
    """Rows of a package: itself, its modules, then its sub-packages one level down."""
    modules = sorted(file for file in path.glob("*.py") if file.name != "__init__.py")
    rows = [row(depth, path.name + "/", phrase(path / "__init__.py"))]
    rows += [row(depth + 1, file.name, phrase(file)) for file in modules]
    if depth == 0:
        for init in sorted(path.glob("*/__init__.py")):
            rows += folder(init.parent, depth + 1)
    return rows


def tree() -> str:
    """The tree as it stands on the disk."""
    rows = [line for name in PACKAGES for line in [*folder(ROOT / name), ""]]
    rows += [row(0, name, text) for name, text in REST.items()]
    return "\n".join(rows) + "\n"


def written() -> str:
    """The tree as README.md has it."""
    return README.read_text().partition(BEGIN)[2].partition(END)[0]


def main() -> int:
    """Replace the tree between the two markers of README.md."""
    text = README.read_text()
    if BEGIN not in text or END not in text:
        print(f"{README} has lost the markers of its tree", file=sys.stderr)
        return 1
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    README.write_text(before + BEGIN + tree() + END + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
