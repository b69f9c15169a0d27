"""Which examples a step trains on, as a pure function of (seed, step): nothing to store, nothing to replay."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from peftdyno.engine.pack import Pack, Root, Sequence, build_pack
from peftdyno.kernels.random import stream_key


@dataclass(frozen=True, kw_only=True)
class Example:
    """A tokenised example: labels are the tokens from `num_prompt` on. `cut` counts tokens left out of the prompt."""

    tokens: tuple[int, ...]
    num_prompt: int
    cut: int = 0

    @property
    def num_labels(self) -> int:
        """Tokens that carry a loss; the very first token of a sequence has no predecessor and never does."""
        return len(self.tokens) - max(self.num_prompt, 1)


def fit(prompt: SequenceOf[int], response: SequenceOf[int], max_length: int) -> Example:
    """Example of at most `max_length` tokens: what is too long is cut out of the prompt's middle, never the answer,
    so that the instruction at its start and the template's turn at its end stay.

    Raises ValueError where the answer alone does not fit.
    """
    room = max_length - len(response)
    if room < 1:
        raise ValueError(f"an answer of {len(response)} tokens leaves no room for a prompt in {max_length}")
    cut = max(len(prompt) - room, 0)
    kept = tuple(prompt)
    if cut:
        head = (room + 1) // 2
        kept = kept[:head] + kept[len(kept) - (room - head) :]
    return Example(tokens=kept + tuple(response), num_prompt=len(kept), cut=cut)


def steps_per_epoch(num_examples: int, batch: int) -> int:
    """Steps of one pass; the last batch may be smaller."""
    return -(-num_examples // batch)


def batch_indices(num_examples: int, batch: int, seed: int, step: int) -> list[int]:
    """Examples of a step: each epoch is a permutation drawn from (seed, epoch), cut into batches."""
    epoch, place = divmod(step, steps_per_epoch(num_examples, batch))
    random = np.random.Generator(np.random.Philox(key=stream_key(seed, "order", epoch) % 2**64))
    order = random.permutation(num_examples)
    return [int(i) for i in order[place * batch : (place + 1) * batch]]


def training_sequences(
    examples: SequenceOf[Example], batch: int, seed: int, step: int, run: int
) -> tuple[Sequence, ...]:
    """A run's sequences of a step; every label weighs one over the number of labels in the run's whole batch."""
    chosen = [examples[i] for i in batch_indices(len(examples), batch, seed, step)]
    total = sum(example.num_labels for example in chosen)
    return tuple(
        Sequence(tokens=e.tokens, num_prompt=e.num_prompt, run=run, ordinal=i, weight=1 / max(total, 1))
        for i, e in enumerate(chosen)
    )


def packs_of(
    sequences: SequenceOf[SequenceOf[Sequence]], micro_batch: int, share_prefix: bool, root: Root | None
) -> list[Pack]:
    """Packs of at most `micro_batch` sequences of each run; `sequences` has an entry for each run."""
    longest = max((len(s) for s in sequences), default=0)
    return [
        build_pack(
            [s for run in sequences for s in run[start : start + micro_batch]],
            num_runs=len(sequences),
            share_prefix=share_prefix,
            root=root,
            losses_only=True,
        )
        for start in range(0, longest, micro_batch)
    ]
