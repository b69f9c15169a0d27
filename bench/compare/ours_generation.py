"""Our side of greedy generation: batches whose shared beginning is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftdyno.bench.compare.ours_steps import base
from peftdyno.bench.compare.turns import timed
from peftdyno.engine.adapters.peft_format import bank_from_adapters
from peftdyno.engine.generate import generate
from peftdyno.engine.pack import Sequence
from peftdyno.engine.panels import PackWeights, packed_weights


@dataclass
class OurGeneration:
    """Answers prompts with a trained adapter, `batch` at a time; without `eos_ids` every answer has its full length.
    `pack_weights` as in scoring a job (off) or in generating text (auto)."""

    model: str
    adapter: str
    prompts: list[list[int]]
    batch: int
    max_new_tokens: int
    eos_ids: list[int]
    unit: Literal["examples", "tokens"]
    pack_weights: PackWeights = "auto"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        self.decoder, family = base(self.model, self.dtype)
        self.bank = bank_from_adapters([Path(self.adapter)], self.decoder.config, self.decoder.weights, family)

    def measure(self) -> dict[str, float]:
        """Seconds for all prompts, packing the weights included."""
        return timed(lambda: self._count(self.tokens(self.max_new_tokens)))

    def tokens(self, max_new_tokens: int) -> list[list[int]]:
        """New tokens of every prompt, the end token left out."""
        found = []
        with packed_weights(self.decoder, self.pack_weights):
            for start in range(0, len(self.prompts), self.batch):
                some = [Sequence(tokens=tuple(p), num_prompt=len(p)) for p in self.prompts[start : start + self.batch]]
                found += generate(self.decoder, self.bank, some, max_new_tokens=max_new_tokens, eos_ids=self.eos_ids)
        return found

    def _count(self, tokens: list[list[int]]) -> int:
        return len(tokens) if self.unit == "examples" else sum(map(len, tokens))
