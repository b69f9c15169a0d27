"""What must never enter the package: code run from data, remote code, a shell, or traces of a workplace."""

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_NAMES = {
    "eval", "exec", "compile", "__import__",
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader",
    "pandas.read_pickle", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
FORBIDDEN_KEYWORDS = {"shell", "allow_pickle"}
REMOTE = "trust_remote_code"
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".cpp", ".h", ".cu", ".cuh", ".html", ".j2"}
WORKPLACE = re.compile(r"(?<![\w.~])/(?:work|root|opt/wheels|tmp/spec|tmp/bash_jobs)\b")


def code() -> list[Path]:
    folders = ("engine", "kernels", "bench", "docs")
    return [*sorted(file for name in folders for file in (ROOT / name).rglob("*.py")), ROOT / "setup.py"]


def texts() -> list[Path]:
    """Every text file a reader of the repository meets, the hidden folders of tools left out."""
    top = [file for file in ROOT.glob("*") if file.is_file()]
    folders = ("engine", "kernels", "bench", "csrc", "tests", "docs", ".ci")
    below = [file for name in folders for file in (ROOT / name).rglob("*") if file.is_file()]
    named = {"Makefile", "LICENSE", "run"}
    return [file for file in top + below if file.suffix in TEXT or file.name in named]


def aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> full name, for every import of a file."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """`t.load` -> `torch.load`; empty for anything but a chain of attributes from a name."""
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []


def findings(source: str) -> Iterator[str]:
    """Line and name of each forbidden thing in a Python source."""
    tree = ast.parse(source)
    names = aliases(tree)
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for module in imports(node):
            if module.split(".")[0] in FORBIDDEN_MODULES:
                yield f"{line} imports {module}"
        if full_name(node, names) in FORBIDDEN_NAMES:
            yield f"{line} uses {full_name(node, names)}"
        if isinstance(node, ast.keyword):
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            if node.arg == REMOTE or (node.arg in FORBIDDEN_KEYWORDS and not off):
                yield f"{node.value.lineno} passes {node.arg}"
        if isinstance(node, ast.Constant) and node.value == REMOTE:
            yield f"{line} names {REMOTE}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "read = eval",
        "exec(source)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import numpy\nnumpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "import subprocess as s\ns.run(line, shell=True)",
        "import os\nos.system(line)",
    ],
)
def test_lint_sees(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "from safetensors.torch import load_file\nload_file(path)",
        "import json\njson.load(file)",
        "import re\nre.compile(pattern)",
        "import numpy\nnumpy.load(path, allow_pickle=False)",
        "import subprocess\nsubprocess.run(words, shell=False)",
    ],
)
def test_lint_allows(source: str) -> None:
    assert not list(findings(source))


def test_no_code_from_data() -> None:
    files = code()
    assert len(files) > 10
    found = [f"{file.relative_to(ROOT)}:{what}" for file in files for what in findings(file.read_text())]
    assert not found


def test_no_workplace_paths() -> None:
    assert WORKPLACE.search("see /" + "work/shared") and not WORKPLACE.search("frame/work, ~/work, ./work")
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in texts()
        for match in WORKPLACE.finditer(file.read_text())
    ]
    assert not found


ATTEMPTS = {
    "connect": "import socket; socket.socket().connect(('192.0.2.1', 80))",
    "lookup": "import urllib.request; urllib.request.urlopen('http://example.invalid')",
    "datagram": "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
}


def test_network_is_refused_here(network_log: Path) -> None:
    with pytest.raises(BaseException, match="reached for the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    assert "192.0.2.1" in network_log.read_text()
    network_log.write_text("")


@pytest.mark.parametrize("attempt", ATTEMPTS.values(), ids=ATTEMPTS)
def test_network_is_refused_in_children(attempt: str, network_log: Path) -> None:
    child = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True, timeout=60)
    assert child.returncode != 0 and "NetworkBlocked" in child.stderr
    assert "test_network_is_refused_in_children" in network_log.read_text()
    network_log.write_text("")
