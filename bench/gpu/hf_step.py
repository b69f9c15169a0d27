"""The same LoRA step by transformers and PEFT: SDPA attention, AdamW, random weights of the same shape."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.engine.adapters.method import MODULES

BF16 = "bf16 adapters"
Times = Callable[[Callable[[], Any], torch.device, int], float]
"""Median seconds of so many calls."""
CALLS = 6


def rows(name: str) -> tuple[str, str]:
    """Names of both rows of a side: with adapters in fp32, PEFT's default, whose products are then of fp32; and with
    adapters in the dtype of the base, as a user who wants speed asks for."""
    return name, f"{name}, {BF16}"


def measure(sizes: Sizes, device: torch.device, times: Times, *, liger: bool, bf16: bool, tiny: bool) -> dict[str, Any]:
    """Seconds of a step; where the whole batch does not fit, one sequence at a time, and `at_once` says so."""
    options = {"liger": liger, "bf16": bf16, "tiny": tiny}
    try:
        return _row(sizes, device, times, sizes.sequences, **options)
    except torch.OutOfMemoryError:
        pass
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return _row(sizes, device, times, 1, **options)


def base_model(sizes: Sizes, device: torch.device) -> Any:
    """transformers' model with random weights: bf16, fp32 where there is no GPU."""
    import transformers

    config = transformers.LlamaConfig(**(dict(sizes.fields) | {"num_hidden_layers": sizes.layers_of_hf}))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def with_lora(base: Any, sizes: Sizes, *, bf16: bool) -> Any:
    """PEFT's LoRA on every module; PEFT keeps adapters of a 16-bit base in fp32 unless told otherwise."""
    import peft

    lora = peft.LoraConfig(r=sizes.rank, lora_alpha=16, lora_dropout=0.05, target_modules=list(MODULES))
    return peft.get_peft_model(base, lora, autocast_adapter_dtype=not bf16)


def _row(
    sizes: Sizes, device: torch.device, times: Times, at_once: int, *, liger: bool, bf16: bool, tiny: bool
) -> dict[str, Any]:
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    base = base_model(sizes, device)
    tuned = with_lora(base, sizes, bf16=bf16)
    tuned.train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=device.type == "cuda")
    tokens = torch.randint(3, base.config.vocab_size, (sizes.sequences, sizes.length), device=device)
    parts = tokens.split(at_once)

    def call() -> None:
        for part in parts:
            (tuned(input_ids=part, labels=part).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = times(call, device, 2 if tiny else CALLS)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    row = {"seconds": seconds, "tokens_per_second": sizes.tokens / seconds, "peak_bytes": peak}
    return row | {"at_once": at_once}
