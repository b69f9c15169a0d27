"""Maps the folders at the root to import names and builds the C++ kernels where a compiler is found."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TOP = ("engine", "kernels", "bench")
SOURCES = ROOT / "csrc" / "cpu"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
PLAIN = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
SANITIZE = os.environ.get("PEFTDYNO_SANITIZE", "")
"""Sanitizers of a debugging build, as the compiler's -fsanitize takes them: address,undefined. Tiles are emulated
in it, so that sanitizers see what they load, and processors without tiles test the code for them."""
INSTRUMENT = (
    [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1", "-DPEFTDYNO_EMULATE_TILES"] if SANITIZE else []
)


def packages() -> dict[str, str]:
    """Import name -> folder, for every package below the three top folders."""
    names = {f"peftdyno.{top}": top for top in TOP}
    for top in TOP:
        for sub in find_packages(str(ROOT / top)):
            names[f"peftdyno.{top}.{sub}"] = f"{top}/{sub.replace('.', '/')}"
    return names


def extension() -> list:
    """The C++ kernels as an extension, or nothing where PyTorch cannot be imported."""
    try:
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        say("PyTorch is not importable here")
        return []
    sources = [str(p.relative_to(ROOT)) for p in sorted(SOURCES.glob("*.cpp")) if not p.name.startswith("isa_")]
    flags = ["-O2", "-std=c++20", "-g0", "-fopenmp", "-Wno-attributes", *INSTRUMENT]
    link = ["-fopenmp", *([f"-fsanitize={SANITIZE}"] if SANITIZE else [])]
    return [CppExtension("peftdyno.kernels._cpu", sources, extra_compile_args=flags, extra_link_args=link)]


def say(reason: str) -> None:
    """One line on the path that will run where the extension is missing."""
    print(f"peftdyno: C++ kernels not built ({reason}); the PyTorch reference will run", file=sys.stderr)


def compile_isa(compiler: str, folder: Path, name: str) -> str:
    """Object file of the kernels of one instruction set, compiled again only where a source is newer."""
    target = folder / f"isa_{name}.o"
    newest = max(p.stat().st_mtime for p in [*SOURCES.glob("*.h"), SOURCES / f"isa_{name}.cpp", Path(__file__)])
    if not target.exists() or target.stat().st_mtime < newest:
        flags = [*PLAIN, *ISA_FLAGS[name], *INSTRUMENT]
        subprocess.run([compiler, *flags, "-c", str(SOURCES / f"isa_{name}.cpp"), "-o", str(target)], check=True)
    return str(target)


def build_command() -> type[build_ext]:
    """PyTorch's build command, with the instruction sets' objects made first; a failure leaves the package whole."""
    try:
        from torch.utils.cpp_extension import BuildExtension, get_cxx_compiler
    except ImportError:
        return build_ext

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as failure:
                if SANITIZE or "build_ext" in sys.argv:
                    raise
                say(str(failure).strip().splitlines()[0])
                self.extensions = []

        def build_extension(self, ext) -> None:
            folder = Path(self.build_temp)
            folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda name: compile_isa(get_cxx_compiler(), folder, name), ISA_FLAGS)
                ext.extra_objects = list(objects)
            super().build_extension(ext)

    return Build


setup(
    packages=list(packages()),
    package_dir=packages(),
    ext_modules=extension(),
    cmdclass={"build_ext": build_command()},
)
