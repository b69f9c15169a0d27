"""Triton kernels, a file an operator; imported at the first call of one, so that `peftdyno.kernels` needs no Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from peftdyno.kernels import dispatch

OPERATORS = {
    "adamw_": "adamw.update",
    "attention": "attention.forward",
    "attention_backward": "attention_backward.backward",
    "bank_column_sums": "bank_affine.column_sums",
    "bank_scale_": "bank_affine.scale",
    "bank_shift_": "bank_affine.shift",
    "glu": "glu.forward",
    "glu_backward": "glu.backward",
    "glu_down": "low_rank_input.glu",
    "glu_lora_backward": "glu_lora.backward",
    "label_loss": "label_loss.forward",
    "linear": "linear.forward",
    "linear_backward": "linear.backward",
    "lora_linear": "lora_linear.forward",
    "lora_linear_backward": "lora_linear.backward",
    "lora_linear_up": "lora_linear.up",
    "lora_terms_": "lora_linear.add",
    "lora_terms_backward_": "lora_linear.add_backward",
    "nf4_absmax": "nf4.absmax",
    "nf4_dequantise": "nf4.dequantise",
    "nf4_linear": "nf4_gemm.forward",
    "nf4_linear_backward": "nf4_gemm.backward",
    "picked_rows_backward": "picked_rows.backward",
    "rms_norm": "rms_norm.forward",
    "rms_norm_backward": "rms_norm.backward",
    "rms_norm_down": "low_rank_input.norm",
    "rotary_": "rotary.turn",
    "scale_rows": "label_loss.scale_rows",
}
"""Operator -> the module of this folder and its function."""


def serves(name: str, device: torch.device) -> bool:
    """Whether the operator's Triton kernels run on a device; on a GPU that is not at hand, whether they would."""
    if device.type != "cuda" or name not in OPERATORS or dispatch.current() not in ("auto", "triton"):
        return False
    return not torch.cuda.is_available() or available()


def interpreted() -> bool:
    """Whether Triton was told to run kernels on the CPU, for tests (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def available() -> bool:
    """Whether Triton is installed and has something to run on."""
    if not installed():
        return False
    return interpreted() or torch.cuda.is_available()


@functools.cache
def load(name: str) -> Callable[..., Any]:
    """The implementation of an operator."""
    module, function = OPERATORS[name].split(".")
    implementation: Callable[..., Any] = getattr(importlib.import_module(f"peftdyno.kernels.triton.{module}"), function)
    return implementation


def implementations(name: str) -> dict[str, Callable[..., Any]]:
    """`{"triton": operator}` where Triton can run here, else nothing."""
    if name not in OPERATORS or not available():
        return {}

    def call(*args: Any) -> Any:
        return load(name)(*args)

    return {"triton": call}
