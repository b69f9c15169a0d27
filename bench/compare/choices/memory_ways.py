"""Ways to make a step smaller: what each costs in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peftdyno.bench.compare.choices.lines import Line, milliseconds
from peftdyno.bench.compare.choices.setting import Setting
from peftdyno.bench.compare.ours_steps import base, new_bank
from peftdyno.bench.compare.rows import text_batch
from peftdyno.bench.compare.step_sections import DROPOUT, LORA
from peftdyno.bench.compare.turns import Measure, in_turns, timed
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import run_step
from peftdyno.engine.activations import POLICIES, Policy
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Pack, build_pack
from peftdyno.engine.pack import Sequence as PackSequence


@dataclass(frozen=True)
class Way:
    """What is kept of a step's forward pass, and how many sequences are computed at a time."""

    activations: Policy
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.activations} {self.micro_batch}"


def memory_ways(setting: Setting) -> list[Line]:
    """LoRA's step of a few layers over long and over short sequences, all labelled, each way over keeping all."""
    sizes = setting.sizes
    first, *others = ways(sizes.way_batch)
    decoder = _few_layers(setting)
    lines = []
    for length in sizes.way_lengths:
        batch = text_batch(sizes.way_batch, length, setting.texts)
        sequences = [PackSequence(tokens=tuple(row["tokens"]), num_prompt=1, ordinal=i) for i, row in enumerate(batch)]
        measures = {str(way): _measure(decoder, way, sequences) for way in (first, *others)}
        cells = {name: milliseconds(found) for name, found in in_turns(measures, setting.repeats).items()}
        what = f"{sizes.way_batch} x {length} tokens, {decoder.config.num_hidden_layers} layers"
        over = tuple((str(way), str(first)) for way in others)
        lines.append(Line(name=f"length_{length}", what=what, unit="ms", cells=cells, over=over))
    return lines


def ways(batch: int) -> list[Way]:
    """The whole batch under every policy, then smaller and smaller micro-batches that keep all."""
    found = [Way(policy, batch) for policy in POLICIES]
    while batch > 1:
        batch = (batch + 1) // 2
        found.append(Way("keep", batch))
    return found


def _few_layers(setting: Setting) -> Decoder:
    """The model's first layers."""
    decoder, _ = base(setting.model)
    layers = decoder.weights.layers[: setting.sizes.layers]
    config = replace(
        decoder.config, num_hidden_layers=len(layers), window_layers=decoder.config.window_layers[: len(layers)]
    )
    return Decoder(config, replace(decoder.weights, layers=layers))


def _measure(decoder: Decoder, way: Way, sequences: Sequence[PackSequence]) -> Measure:
    """A turn: one step at rate 0."""
    mine = Decoder(decoder.config, decoder.weights, activations=way.activations)
    bank = new_bank(mine, "lora", {**LORA, "dropout": DROPOUT}, [0])
    optimizer, ledger = AdamW.create(bank), Ledger(mine.scope, on=False)
    packs: list[Pack] = [
        build_pack(sequences[i : i + way.micro_batch]) for i in range(0, len(sequences), way.micro_batch)
    ]

    def work() -> float:
        run_step(mine, bank, optimizer, packs, ledger)
        return 1.0

    return lambda _: timed(work)
