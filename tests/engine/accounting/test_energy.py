"""Energy from a made-up folder of counters and a made-up card library: never estimated, absent where unreadable."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peftdyno.engine.accounting import energy
from peftdyno.engine.accounting.energy import EnergyMeter, Nvml, Rapl, energy_metered
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.scope import Scope


def zone(folder: Path, place: str, name: str, microjoules: int, most: int = 1_000_000) -> Path:
    path = folder / place
    path.mkdir()
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{most}\n")
    return path / "energy_uj"


def test_packages_and_memory_are_added_and_parts_are_not(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = zone(tmp_path, "intel-rapl:1", "psys", 0)
    counter = Rapl.find(tmp_path)
    assert counter.joules() == 0.0
    package.write_text("950000")
    memory.write_text("25010")
    core.write_text("999999")
    platform.write_text("999999")
    assert counter.joules() == pytest.approx(0.075)
    package.write_text("50000")  # went round: 50000 up to the range of 1000000, then 50000 more
    assert counter.joules() == pytest.approx(0.175)


def test_absent_where_nothing_can_be_read(tmp_path: Path) -> None:
    assert Rapl.find(tmp_path) is None and Rapl.find(tmp_path / "none") is None
    path = zone(tmp_path, "intel-rapl:0", "package-0", 5)
    path.unlink()
    path.mkdir()  # a folder cannot be read as a file, whoever asks
    assert Rapl.find(tmp_path) is None


def test_phases_of_a_ledger(tmp_path: Path) -> None:
    path = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    ledger = Ledger(Scope())
    ledger.energy = EnergyMeter(Rapl.find(tmp_path))
    for phase, after in (("forward", 100_000), ("backward", 400_000), ("forward", 500_000)):
        with ledger.phase(phase):
            path.write_text(str(after))
    assert ledger.energy.joules == pytest.approx({"forward": 0.2, "backward": 0.3})
    path.unlink()
    with ledger.phase("forward"):
        pass
    assert ledger.energy.lost


def test_a_counter_is_read_while_nobody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes round twice between two questions, which only readings in between can tell."""
    path = zone(tmp_path, "intel-rapl:0", "package-0", 0, most=100)
    monkeypatch.setattr(energy, "READ_EVERY", 0.01)
    counter = Rapl.find(tmp_path)
    with energy_metered(counter) as meter:
        for value in (90, 40, 90, 10):
            whole = tmp_path / "next"
            whole.write_text(str(value))
            whole.replace(path)
            seen = time.monotonic() + 5
            while counter._last[path.parent] != value and time.monotonic() < seen:
                time.sleep(0.005)
    assert meter.total() == pytest.approx(210e-6)


def test_a_card_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([5_000, 7_500])
    library = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(values),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda device: 0)
    counter = Nvml.find(torch.device("cuda", 0))
    meter = EnergyMeter(counter)
    meter.start()
    meter.stop("forward")
    assert meter.joules == {}, "a card works behind the program: its phases cannot be told apart"
    assert meter.total() == 2.5
