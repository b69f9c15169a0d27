"""PEFT's learned positions beside ours: the same parameters in its modules, its logits, losses and gradients."""

from __future__ import annotations

import copy
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.peft_format import bank_from_adapters, save_adapter
from peftdyno.engine.generate import generate
from peftdyno.engine.pack import Sequence

from .banks import TinyModel, backward, own_rows, pack_of, random_sequences, relative

TOLERANCE = 1e-5
SEQUENCES = random_sequences([13, 6, 9], seed=4)


def with_parameters(model: TinyModel, config: peft.PeftConfig, bank: AdapterBank) -> Any:
    """PEFT's model whose encoder has the bank's parameters of run 0."""
    wrapped = peft.get_peft_model(copy.deepcopy(model.hf), config).eval()
    encoder = wrapped.prompt_encoder["default"]
    ours = bank.run_tensors(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.copy_(ours["prompt_embeddings" if len(ours) == 1 and name not in ours else name])
    assert len(list(encoder.parameters())) == len(ours)
    return wrapped


def padded_logits(wrapped: Any, sequences: SequenceOf[Sequence]) -> list[Tensor]:
    """Each sequence's logits out of one padded batch, virtual positions left out."""
    longest = max(len(s.tokens) for s in sequences)
    tokens = torch.tensor([[*s.tokens, *[0] * (longest - len(s.tokens))] for s in sequences])
    mask = torch.tensor([[1] * len(s.tokens) + [0] * (longest - len(s.tokens)) for s in sequences])
    logits = wrapped(input_ids=tokens, attention_mask=mask).logits[:, -longest:]
    return [logits[i, : len(s.tokens)] for i, s in enumerate(sequences)]


def peft_loss(wrapped: Any, sequences: SequenceOf[Sequence]) -> Tensor:
    """Sum over the label tokens of all sequences."""
    loss = torch.zeros(())
    for sequence, logits in zip(sequences, padded_logits(wrapped, sequences), strict=True):
        targets = torch.tensor(sequence.tokens)[sequence.num_prompt :]
        predicted = logits[sequence.num_prompt - 1 : -1]
        loss = loss + torch.nn.functional.cross_entropy(predicted, targets, reduction="sum")
    return loss


def check_parity(model: TinyModel, config: peft.PeftConfig, bank: AdapterBank) -> None:
    """Our logits and gradients, positions computed once, equal PEFT's on a padded batch that repeats them."""
    wrapped = with_parameters(model, config, bank)
    check_logits(model, wrapped, bank)
    peft_loss(wrapped, SEQUENCES).backward()
    backward(model.decoder, bank, [pack_of(bank, SEQUENCES)])
    theirs = dict(wrapped.prompt_encoder["default"].named_parameters())
    for name, parameter in bank.parameters.items():
        expected = theirs.get(name, theirs["embedding.weight"]).grad
        assert relative(parameter.grad[0], expected) <= TOLERANCE, name


def check_logits(model: TinyModel, wrapped: Any, bank: AdapterBank) -> None:
    bank.begin(0, training=False)
    pack = pack_of(bank, SEQUENCES, share_prefix=True)
    length = bank.root.length if bank.root.kind == "tokens" else 0
    assert pack.num_tokens == length + sum(len(s.tokens) for s in SEQUENCES) - 2 * 3
    with torch.no_grad():
        found = model.decoder.logits(pack, bank)
        for i, expected in enumerate(padded_logits(wrapped, SEQUENCES)):
            assert relative(found[own_rows(pack, i)], expected) <= TOLERANCE


def check_generation(model: TinyModel, wrapped: Any, bank: AdapterBank) -> None:
    for sequence in SEQUENCES:
        (found,) = generate(model.decoder, bank, [sequence], max_new_tokens=6, eos_ids=())
        tokens = torch.tensor([sequence.tokens])
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        expected = wrapped.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        assert found == expected[0, len(sequence.tokens) :].tolist()


def check_exchange(model: TinyModel, config: peft.PeftConfig, bank: AdapterBank, folder: Path) -> AdapterBank:
    """An adapter written here works in PEFT and one written by PEFT works here; gives the latter."""
    save_adapter(bank, 0, folder / "ours", str(model.folder), model.family)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model.hf), folder / "ours").eval()
    check_logits(model, loaded, bank)
    check_generation(model, loaded, bank)
    theirs = with_parameters(model, config, bank)
    theirs.save_pretrained(folder / "theirs")
    read = bank_from_adapters([folder / "theirs"], model.config, model.decoder.weights, model.family)
    check_logits(model, theirs, read)
    save_adapter(read, 0, folder / "again", str(model.folder), model.family)
    again = bank_from_adapters([folder / "again"], model.config, model.decoder.weights, model.family)
    assert torch.equal(again.flat, read.flat)
    return read
