"""The same starting adapter on both sides: our run as PEFT's folder, and PEFT's model from it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.peft_format import save_adapter
from peftdyno.engine.adapters.prompt_form import EMBEDDINGS
from peftdyno.engine.families import Family

ENCODER_FILE = "encoder.safetensors"
"""Beside the adapter, for methods with learned positions: the tensors of PEFT's prompt encoder. PEFT does not go on
training such an adapter from its own file, which holds only what the encoder puts out."""


def hand_over(bank: AdapterBank, run: int, folder: Path, family: Family) -> None:
    """Write a run as PEFT's folder, with the prompt encoder's tensors where it has one."""
    save_adapter(bank, run, folder, "compared", family)
    if bank.root is not None:
        renamed = {EMBEDDINGS: "embedding.weight"}
        tensors = {renamed.get(n, n): t.contiguous() for n, t in bank.run_tensors(run).items()}
        save_file(tensors, folder / ENCODER_FILE)


def with_adapter(model: Any, folder: str, *, trainable: bool) -> Any:
    """The model wrapped by PEFT with an adapter folder; a tensor that PEFT misses or does not expect is an error."""
    from peft import PeftConfig, PeftModel, get_peft_model

    encoder = Path(folder) / ENCODER_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*([Mm]issing|[Uu]nexpected).*")
        if not (trainable and encoder.exists()):
            return PeftModel.from_pretrained(model, folder, is_trainable=trainable)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        wrapped = get_peft_model(model, config)
        wrapped.prompt_encoder["default"].load_state_dict(load_file(encoder), strict=True)
        return wrapped
