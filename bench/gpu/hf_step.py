"""The same LoRA step by transformers and PEFT: SDPA attention, AdamW, random weights of the same shape."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.engine.adapters.method import MODULES

Times = Callable[[Callable[[], Any], torch.device, int], float]
"""Median seconds of so many calls."""
CALLS = 6


def measure(sizes: Sizes, device: torch.device, times: Times, *, liger: bool, tiny: bool) -> dict[str, Any]:
    """Seconds of a step; where the whole batch does not fit, one sequence at a time, and `at_once` says so."""
    try:
        return _row(sizes, device, times, sizes.sequences, liger=liger, tiny=tiny)
    except torch.OutOfMemoryError:
        pass
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return _row(sizes, device, times, 1, liger=liger, tiny=tiny)


def base_model(sizes: Sizes, device: torch.device) -> Any:
    """transformers' model with random weights: bf16, fp32 where there is no GPU."""
    import transformers

    config = transformers.LlamaConfig(**(dict(sizes.fields) | {"num_hidden_layers": sizes.layers_of_hf}))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    return model


def _row(sizes: Sizes, device: torch.device, times: Times, at_once: int, *, liger: bool, tiny: bool) -> dict[str, Any]:
    import peft

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    base = base_model(sizes, device)
    lora = peft.LoraConfig(r=sizes.rank, lora_alpha=16, lora_dropout=0.05, target_modules=list(MODULES))
    tuned = peft.get_peft_model(base, lora)
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
