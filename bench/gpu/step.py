"""Sections `step` and `memory`: whole training steps with random weights, on the clock and in memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftdyno.bench.gpu import hf_step, liger, losses, same_bits
from peftdyno.bench.gpu.micro import measured_ceilings
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.engine.accounting.ledger import Ledger
from peftdyno.engine.accounting.predict import Job, Untuned, run_step, training_step
from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.activations import Policy
from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import MODULES, Method
from peftdyno.engine.border import lay_borders
from peftdyno.engine.decoder import Decoder
from peftdyno.engine.graphs import CudaRecorder, EagerRecorder
from peftdyno.engine.optim import AdamW
from peftdyno.engine.pack import Pack, build_pack
from peftdyno.engine.pack import Sequence as PackSequence
from peftdyno.engine.step_graphs import StepGraphs
from peftdyno.engine.weights import random_weights
from peftdyno.kernels import tuning

STEPS, WARM_UP = 6, 2
SHORT = "4 short rows"
FROZEN, HF, HF_LIGER = "frozen forward, backward to layer 0's qkv", "HF + PEFT", "HF + PEFT + Liger"


@dataclass(frozen=True)
class Setting:
    """A row: the method of each run, whether products are bordered, whether the step is recorded and replayed, and what
    layers keep for the backward pass."""

    name: str
    methods: tuple[Method, ...]
    bordered: bool = False
    graphs: bool = False
    activations: Policy = "keep"


def settings(sizes: Sizes) -> list[Setting]:
    """LoRA in both forms and together with others, and the methods that should cost next to nothing."""
    lora = METHODS["lora"](rank=sizes.rank, target_modules=tuple(MODULES), dropout=0.05)  # type: ignore[call-arg]
    plain = METHODS["lora"](rank=sizes.rank, target_modules=tuple(MODULES), dropout=0.0)  # type: ignore[call-arg]
    return [
        Setting("lora r16, dropout, bordered", (lora,), True),
        Setting("lora r16, dropout, plain", (lora,)),
        Setting("lora r16, no dropout, bordered", (plain,), True),
        Setting(f"lora r16, dropout, {sizes.runs} runs", (lora,) * sizes.runs, True),
        *(Setting(name, (METHODS[name](),)) for name in ("ia3", "ln-tuning", "bitfit")),
    ]


def lean(sizes: Sizes) -> Setting:
    """The first setting, with pointwise results computed again instead of kept."""
    lora = settings(sizes)[0]
    return replace(lora, name=f"{lora.name}, --activations cheap", activations="cheap")


def short_settings(sizes: Sizes) -> list[Setting]:
    """The first setting on a few short rows, where launching takes longer than computing: launched, and replayed."""
    lora = settings(sizes)[0]
    return [
        replace(lora, name=f"{lora.name}, {SHORT}"),
        replace(lora, name=f"{lora.name}, {SHORT}, graph", graphs=True),
    ]


def short(sizes: Sizes) -> Sizes:
    """The rows of `short_settings`."""
    return replace(sizes, sequences=4, length=min(128, sizes.length))


def pack_of(sizes: Sizes, runs: int, vocabulary: int) -> Pack:
    """Random tokens, all but the first labels, divided between the runs; every run has at least one sequence."""
    generator = torch.Generator().manual_seed(0)
    count = max(sizes.sequences, runs)
    length = sizes.tokens // count
    tokens = torch.randint(3, vocabulary, (count, length), generator=generator).tolist()
    sequences = [
        PackSequence(tokens=tuple(row), num_prompt=1, run=i % runs, ordinal=i, weight=1.0 / length)
        for i, row in enumerate(tokens)
    ]
    return build_pack(sequences, num_runs=runs)


def model(
    sizes: Sizes, methods: Sequence[Method], device: torch.device, *, bordered: bool, activations: Policy = "keep"
) -> tuple[Decoder, AdapterBank]:
    """Random bf16 weights (fp32 where there is no GPU) and a bank."""
    config = sizes.config()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = random_weights(config, dtype, device=device)
    bank = AdapterBank.create(config, list(methods), list(range(len(methods))), weights)
    if bordered:
        lay_borders(weights, bank)
    return Decoder(config, weights, activations=activations), bank


def times(call: Callable[[], Any], device: torch.device, count: int = STEPS) -> float:
    """Median seconds of a call that ends with the device idle."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return sorted(seconds[WARM_UP:] if count > WARM_UP else seconds)[(count - min(WARM_UP, count - 1)) // 2]


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """Tokens a second, share of the matmul ceiling by counted FLOPs, and peak memory, a row a setting."""
    top = measured_ceilings(section, device, tiny=tiny)
    release(device)
    rows = [(s, sizes) for s in settings(sizes)] + [(s, short(sizes)) for s in short_settings(sizes)]
    rows.insert(1, (lean(sizes), sizes))
    for setting, computed in rows:
        if section.wants(setting.name):
            with section.attempt(setting.name):
                row = _step(setting, computed, device, tiny=tiny)
                row["of_matmul_ceiling"] = row["flops"] / row["seconds"] / top.flops_per_second
                section.add(setting.name, **row)
            release(device)
    if section.wants(FROZEN):
        with section.attempt(FROZEN):
            section.add(FROZEN, seconds=frozen_step(sizes, device, tiny=tiny))
        release(device)
    losses.run(section, sizes, device)
    release(device)
    same_bits.run(section, sizes, device)
    release(device)
    for side, patched in ((HF, False), (HF_LIGER, True)):
        for name in hf_step.rows(side) if liger.installed() or not patched else ():
            if section.wants(name, takes=60.0):
                options = {"liger": patched, "bf16": name.endswith(hf_step.BF16), "tiny": tiny}
                with section.attempt(name):
                    section.add(name, **hf_step.measure(sizes, device, times, **options))
                release(device)


def release(device: torch.device) -> None:
    """Give memory back before the next model."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _step(setting: Setting, sizes: Sizes, device: torch.device, *, tiny: bool) -> dict[str, Any]:
    decoder, bank = model(sizes, setting.methods, device, bordered=setting.bordered, activations=setting.activations)
    pack = pack_of(sizes, len(setting.methods), decoder.config.vocab_size)
    optimizer, ledger = AdamW.create(bank), Ledger(Scope())
    recorder = CudaRecorder() if device.type == "cuda" else EagerRecorder()
    graphs = StepGraphs(decoder, bank, recorder=recorder) if setting.graphs else None

    def seconds() -> float:
        step = lambda: run_step(decoder, bank, optimizer, [pack], ledger, 1, graphs)  # noqa: E731
        return times(step, device, 2 if tiny else STEPS)

    taken = seconds()
    job = Job(
        config=decoder.config, methods=setting.methods, dtype=decoder.dtype, device=device.type,
        activations=setting.activations,
    )  # fmt: skip
    flops = training_step(job, [pack]).total().flops
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    row = {"seconds": taken, "tokens_per_second": pack.num_tokens / taken, "flops": flops, "peak_bytes": peak}
    if graphs is None and tuning.measured(device) != tuning.Measured():
        with tuning.untuned():
            row["untuned_seconds"] = seconds()
    return row


@dataclass
class Frozen(Decoder):
    """A decoder whose gradients end at the output of layer 0's first product, as those of a bias or a scale on it do:
    no gradient of its input, nor of the embedding."""

    first: Tensor | None = None

    def linear(self, site: str, i: int, *arguments: Any) -> Tensor:
        """The product of a site; the first one of all begins the graph."""
        y = super().linear(site, i, *arguments)
        if (site, i) != ("qkv", 0):
            return y
        self.first = y.requires_grad_()
        return self.first


def frozen_step(sizes: Sizes, device: torch.device, *, tiny: bool) -> float:
    """Seconds of the frozen model's forward and backward: what a method's step is compared with."""
    return times(frozen_call(sizes, device), device, 2 if tiny else STEPS)


def frozen_call(sizes: Sizes, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward; gives the gradient of layer 0's queries, keys and values [N, (H + 2K) d]."""
    plain, bank = model(sizes, [Untuned()], device, bordered=False)
    decoder = Frozen(plain.config, plain.weights)
    pack = pack_of(sizes, 1, decoder.config.vocab_size).to(device)

    def call() -> Tensor:
        bank.begin(1, training=True)
        losses = decoder.losses(pack, bank)
        assert decoder.first is not None
        (gradient,) = torch.autograd.grad(losses.sum(), decoder.first)
        decoder.first = None
        return gradient

    return call
