"""Compiles the device once a version of PyTorch and of its source."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("device.cpp")
LIBRARIES = ("c10", "torch_cpu", "torch")


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "c++"))


def built(folder: Path) -> Path:
    """The shared library in a folder, compiled where it is not there yet."""
    told = f"{torch.__version__} {sys.version} {SOURCE.read_text()}"
    library = folder / f"device-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = library.with_suffix(f".{os.getpid()}")
        subprocess.run([*_command(), "-o", str(own)], check=True)
        own.replace(library)  # at once, for another process may be waiting for it
    return library


def _command() -> list[str]:
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    links = [f"-l{name}" for name in LIBRARIES]
    return [str(compiler()), "-O1", "-std=c++20", "-shared", "-fPIC", abi, *includes, str(SOURCE), *paths, *links]
