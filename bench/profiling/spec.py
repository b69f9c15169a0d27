"""What is profiled, as the command line says it, and as a job."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftdyno.bench.settings import gather, make_settings
from peftdyno.engine.accounting.predict import Job
from peftdyno.engine.sources import resolve_config


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A step of a method on a model's shape: `batch` sequences of `length` tokens; `sets` are of --set, `card` is which
    of several CUDA devices."""

    model: str
    method: str
    sets: tuple[str, ...]
    dtype: str
    device: str
    batch: int
    length: int
    card: int = 0

    def job(self) -> Job:
        """The job; UserError where model, method or a setting is unknown."""
        values = gather({"model": self.model, "method": self.method, "task": "profile"}, None, list(self.sets))
        method = make_settings(values).build_method()
        width = {"bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]
        return Job(config=resolve_config(self.model), methods=(method,), dtype=width, device=self.device)
