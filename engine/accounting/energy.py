"""Energy that the hardware's own counters say was used, by phase; absent where none can be read, never estimated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

RAPL = Path("/sys/class/powercap")
READ_EVERY = 20.0
"""Seconds between readings of a RAPL counter, which goes round: one of 65 kJ does so in a minute at 1 kW."""


class Counter(Protocol):
    """A counter of the hardware. `resolution` is the time in seconds after which it shows a new value; `covers` says
    whose energy it is."""

    name: str
    covers: str
    resolution: float

    def joules(self) -> float:
        """Energy since the counter was made; never falls. OSError where it can no longer be read."""


@dataclass
class Rapl:
    """Linux's counters of the processor packages and of their memory."""

    zones: tuple[Path, ...]
    name: str = "rapl"
    covers: str = "processor packages and their memory, whatever ran on them"
    resolution: float = 1e-3
    _last: dict[Path, int] = field(default_factory=dict)
    _used: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def find(cls, folder: Path = RAPL) -> Rapl | None:
        """None where there is no counter or it is not readable (most systems let only the administrator)."""
        zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _counted(zone)]
        try:
            found = cls(tuple(zones))
            found.joules()
        except (OSError, ValueError):
            return None
        return found if zones else None

    def joules(self) -> float:
        with self._lock:
            for zone in self.zones:
                now = int((zone / "energy_uj").read_text())
                before = self._last.get(zone, now)
                round_trip = 0 if now >= before else int((zone / "max_energy_range_uj").read_text())
                self._used += now - before + round_trip
                self._last[zone] = now
            return self._used / 1e6


def _counted(zone: Path) -> bool:
    """Packages and memory; cores are part of a package, and the platform's zone has all of them again."""
    try:
        name = (zone / "name").read_text().strip()
    except OSError:
        return False
    return name.startswith("package") or name == "dram"


@dataclass
class Nvml:
    """A card's own counter of all energy since the driver was loaded."""

    library: Any
    handle: Any
    start: float
    name: str = "nvml"
    covers: str = "the whole card"
    resolution: float = 0.1

    @classmethod
    def find(cls, device: torch.device) -> Nvml | None:
        """None where the library is not installed, or the card is too old to count."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda._get_nvml_device_index(device))
            return cls(pynvml, handle, float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
        except pynvml.NVMLError:
            return None

    def joules(self) -> float:
        """As above; the driver brings the counter up to date about ten times a second."""
        try:
            return (float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle)) - self.start) / 1e3
        except self.library.NVMLError as error:
            raise OSError(str(error)) from error


def energy_counter(device: torch.device) -> Counter | None:
    """The card's on CUDA, else the processor's; None where there is none to read."""
    return Nvml.find(device) if device.type == "cuda" else Rapl.find()


@dataclass
class EnergyMeter:
    """Joules by phase. Phases shorter than the counter's resolution are right on average over many steps only, and on
    a card, which works behind the program, not at all: there only `all` is kept."""

    counter: Counter
    joules: dict[str, float] = field(default_factory=dict)
    lost: bool = False
    """The counter could not be read once: nothing is known any more."""
    _began: float = 0.0

    @property
    def by_phase(self) -> bool:
        """Whether phases within a step can be told apart."""
        return self.counter.name != "nvml"

    def start(self) -> None:
        """A phase begins; phases do not nest."""
        if self.by_phase:
            self._began = self.total()

    def stop(self, phase: str) -> None:
        """The phase begun last ends."""
        if self.by_phase:
            self.joules[phase] = self.joules.get(phase, 0.0) + self.total() - self._began

    def source(self) -> dict[str, Any]:
        """Which counter it is, whose energy it counts, and how finely in time."""
        return {
            "source": self.counter.name,
            "covers": self.counter.covers,
            "resolution_seconds": self.counter.resolution,
        }

    def total(self) -> float:
        """Joules of everything since the meter was made."""
        try:
            return self.counter.joules()
        except OSError:
            self.lost = True
            return 0.0


@contextmanager
def energy_metered(counter: Counter | None) -> Iterator[EnergyMeter | None]:
    """A meter that runs meanwhile, and reads its counter often enough not to miss that it went round."""
    if counter is None:
        yield None
        return
    over = threading.Event()

    meter = EnergyMeter(counter)

    def watch() -> None:
        while not over.wait(READ_EVERY):
            meter.total()

    thread = threading.Thread(target=watch, name="energy", daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        over.set()
        thread.join()
