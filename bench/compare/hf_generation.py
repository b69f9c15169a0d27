"""The reference: transformers' generate, greedy, with a KV cache, prompts padded on the left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from peftdyno.bench.compare.handover import with_adapter
from peftdyno.bench.compare.plain_loop import causal_model
from peftdyno.bench.compare.turns import timed


@dataclass
class Generation:
    """Answers prompts with a trained adapter, `batch` at a time; without `eos_ids` every answer has its full length."""

    model: str
    adapter: str
    prompts: list[list[int]]
    batch: int
    max_new_tokens: int
    eos_ids: list[int]
    unit: Literal["examples", "tokens"]
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        model = causal_model(self.model, self.dtype)
        model.config.use_cache = True
        self.wrapped: Any = with_adapter(model, self.adapter, trainable=False).eval()
        settings = self.wrapped.generation_config
        settings.do_sample, settings.use_cache = False, True
        settings.temperature = settings.top_p = settings.top_k = None
        settings.eos_token_id, settings.pad_token_id = self.eos_ids or None, 0

    def measure(self) -> dict[str, float]:
        """Seconds for all prompts."""
        return timed(lambda: self._count(self.tokens(self.max_new_tokens)))

    @torch.no_grad()
    def tokens(self, max_new_tokens: int) -> list[list[int]]:
        """New tokens of every prompt, the end token left out."""
        found = []
        for start in range(0, len(self.prompts), self.batch):
            some = self.prompts[start : start + self.batch]
            width = max(map(len, some))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in some])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
            made = self.wrapped.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)
            found += [self._answer(row) for row in made[:, width:].tolist()]
        return found

    def _answer(self, tokens: list[int]) -> list[int]:
        """Tokens up to the first end token; what follows is padding."""
        ends = [i for i, token in enumerate(tokens) if token in self.eos_ids]
        return tokens[: ends[0]] if ends else tokens

    def _count(self, tokens: list[list[int]]) -> int:
        return len(tokens) if self.unit == "examples" else sum(map(len, tokens))
