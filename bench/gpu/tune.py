"""Section `tune`: what `peftdyno tune` measures, a kernel at a time, kept beside the results for other sections."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.tuning import tune_sizes
from peftdyno.kernels import tuning
from peftdyno.kernels.triton.tune import Timer, fastest_form, fastest_tile, milliseconds
from peftdyno.kernels.triton.tune_subjects import form_subjects, subjects

TAKES = 100.0
"""Seconds left at which a kernel is still begun: every tile that is tried has to be compiled."""


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a kernel's tile and a row an operator's form, at the shapes of the model; nothing without a GPU."""
    if device.type == "cuda":
        tune(section, sizes, device, lambda call: milliseconds([call], device))


def tune(section: Section, sizes: Sizes, device: torch.device, clock: Timer) -> None:
    """Tiles first, for each form is then timed with those found. A shape class that comes again has its row already."""
    shapes = tune_sizes(sizes.config(), tokens=sizes.tokens, rank=sizes.rank, runs=1)
    for subject in subjects(shapes, device):
        if section.wants(subject.name, takes=TAKES):
            with section.attempt(subject.name):
                _keep(section, subject.name, fastest_tile(subject, device, clock), device)
    for choice in form_subjects(shapes, device):
        if section.wants(choice.name, takes=TAKES):
            with section.attempt(choice.name):
                _keep(section, choice.name, fastest_form(choice, clock), device)


def _keep(section: Section, name: str, entry: dict[str, Any], device: torch.device) -> None:
    tuning.save(device, {name: entry})
    section.add(name, **entry | ({"tile": asdict(entry["tile"])} if "tile" in entry else {}))
