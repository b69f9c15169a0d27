"""PEFT's side of adapters that act inside the layers: loaded from our files, or made and saved by it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.peft_format import bank_from_adapters, save_adapter
from peftdyno.engine.pack import Sequence

from .banks import TinyModel, backward, pack_of, random_sequences, relative

PROMPTS = ((5, 17, 99, 23, 42, 8, 11, 64, 3), (5, 17, 30, 31))


def tokens_of(prompt: tuple[int, ...]) -> Tensor:
    return torch.tensor([prompt])


def in_peft(model: TinyModel, folder: Path, *, trainable: bool = False) -> Any:
    """An adapter folder on a copy of the transformers model; what PEFT misses or does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*([Mm]issing|[Uu]nexpected).*")
        return PeftModel.from_pretrained(copy.deepcopy(model.hf), folder, is_trainable=trainable)


def made_by_peft(model: TinyModel, config: Any, folder: Path, scale: float = 0.1) -> Any:
    """A PEFT model whose trainable values were moved from their start, saved to `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model.hf), config).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter += scale * torch.randn(parameter.shape, generator=generator)
        wrapped.save_pretrained(folder)
    return wrapped


def saved(model: TinyModel, bank: AdapterBank, folder: Path, run: int = 0) -> Path:
    """One run of a bank in PEFT's files."""
    save_adapter(bank, run, folder, "tiny", model.family)
    return folder


def loaded(model: TinyModel, *folders: Path) -> AdapterBank:
    """Adapter folders as the runs of a bank."""
    return bank_from_adapters(folders, model.config, model.decoder.weights, model.family)


@torch.no_grad()
def logits_of(model: TinyModel, bank: AdapterBank, prompt: tuple[int, ...] = PROMPTS[0], run: int = 0) -> Tensor:
    """Logits of a prompt's tokens by one run."""
    bank.begin(0, training=False)
    pack = pack_of(bank, [Sequence(tokens=prompt, num_prompt=1, run=run)])
    return model.decoder.logits(pack, bank)


@torch.no_grad()
def peft_logits(wrapped: Any, prompt: tuple[int, ...] = PROMPTS[0]) -> Tensor:
    """The same by a PEFT or transformers model."""
    return wrapped(tokens_of(prompt)).logits[0]


def peft_generation(wrapped: Any, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """Greedy tokens by transformers' generate."""
    wrapped.generation_config.eos_token_id = None
    tokens = tokens_of(prompt)
    mask = torch.ones_like(tokens)
    found = wrapped.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    return found[0, len(prompt) :].tolist()


def peft_gradients(model: TinyModel, folder: Path, sequences: SequenceOf[Sequence]) -> tuple[float, dict[str, Tensor]]:
    """Summed cross-entropy of the labels with an adapter folder, and its gradients by the names in the file."""
    wrapped = in_peft(model, folder, trainable=True)
    for name, parameter in wrapped.named_parameters():
        if name.endswith(".bias"):
            parameter.requires_grad_()
    total = torch.zeros(())
    for sequence in sequences:
        logits = wrapped(tokens_of(sequence.tokens)).logits[0, sequence.num_prompt - 1 : -1]
        targets = torch.tensor(sequence.tokens[sequence.num_prompt :])
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    total.backward()
    found = {n.replace(".default", ""): p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    return float(total.detach()), found


def check_gradients(model: TinyModel, bank: AdapterBank, names: Mapping[str, str], folder: Path) -> None:
    """The loss and the gradient of every trained tensor, given our names and the file's, equal PEFT's."""
    sequences = random_sequences([9, 6, 7])
    (loss,) = backward(model.decoder, bank, [pack_of(bank, sequences)])
    expected, gradients = peft_gradients(model, saved(model, bank, folder), sequences)
    assert abs(loss - expected) <= 1e-5 * abs(expected)
    assert names.keys() == bank.parameters.keys()
    for name, theirs in names.items():
        found = bank.parameters[name].grad[0]
        assert relative(found, gradients[theirs].view_as(found)) <= 1e-4, name
