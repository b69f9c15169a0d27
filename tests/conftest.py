"""Seeds, threads, device skips, and a suite that cannot reach the network."""

import importlib.util
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).parent.parent
OFFLINE = ROOT / "tests" / "offline"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and our kernels are first imported


def pytest_addoption(parser: pytest.Parser) -> None:
    """Random inputs other than CI's: `make test ARGS='--seed 7'`."""
    parser.addoption("--seed", type=int, default=0, help="of every test's random numbers")


def pytest_configure(config: pytest.Config) -> None:
    """Block the Internet in this process and, through PYTHONPATH, in its Python children."""
    file, log = tempfile.mkstemp(prefix="peftdyno-network-")
    os.close(file)
    os.environ["PEFTDYNO_NETWORK_LOG"] = log
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
    spec = importlib.util.spec_from_file_location("offline_guard", OFFLINE / "sitecustomize.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    config.add_cleanup(lambda: Path(log).unlink(missing_ok=True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def network_log() -> Iterator[Path]:
    """The file of refused connections; a test that leaves a line in it fails, even where it hid the error."""
    log = Path(os.environ["PEFTDYNO_NETWORK_LOG"])
    log.write_text("")
    yield log
    if attempts := log.read_text():
        pytest.fail(f"the network was used:\n{attempts}")


@pytest.fixture(autouse=True)
def seeds(request: pytest.FixtureRequest) -> None:
    """Start every test from the same random state, whatever ran before it."""
    seed = request.config.getoption("--seed")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of CPU threads for one test: `threads(1)`."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def poison() -> Iterator[None]:
    """New memory is full of NaN, so that an element which nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets beside the repository; tests that use it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data beside the repository")
    return folder
