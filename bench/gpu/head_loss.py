"""LM head and cross-entropy as a step calls them: rows with a label are gathered, and their gradient goes back to all
rows. Time and extra memory, with every token labelled and with one in eight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from peftdyno.bench.gpu.peak import extra_bytes
from peftdyno.bench.gpu.results import Section
from peftdyno.bench.gpu.sizes import Sizes
from peftdyno.bench.gpu.timing import median_ms
from peftdyno.kernels.label_loss import label_loss

SPARSE = 8
"""One token in so many carries a label in the second row."""
COPIES = 2
"""Sets of hidden states that take turns."""


def row_name(share: int) -> str:
    """The row where one token in `share` is labelled."""
    return (
        f"head and cross-entropy, 1 token in {share} labelled" if share > 1 else "head and cross-entropy, all labelled"
    )


def run(section: Section, sizes: Sizes, device: torch.device, *, tiny: bool) -> None:
    """A row a share of labels."""
    for share in (1, SPARSE):
        name = row_name(share)
        if section.wants(name):
            with section.attempt(name):
                torch.manual_seed(0)
                section.add(name, **_row(sizes, share, device, torch.float16 if tiny else torch.bfloat16))


def _row(sizes: Sizes, share: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    config = sizes.config()
    head = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
    head.normal_(0.0, config.hidden_size**-0.5)
    index = torch.arange(0, sizes.tokens, share, device=device)
    targets = torch.randint(config.vocab_size, index.shape, device=device)
    states = [torch.randn(sizes.tokens, config.hidden_size, device=device).to(dtype) for _ in range(COPIES)]
    calls = [_forward_backward(hidden.requires_grad_(), head, index, targets) for hidden in states]
    ms = median_ms(calls, device)
    extra = extra_bytes(calls[0], [*states, head, index, targets], device)
    return {"ms": ms, "labels": index.numel(), "extra_bytes": extra}


def _forward_backward(hidden: Tensor, head: Tensor, index: Tensor, targets: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Losses [L] and the gradient of the hidden states [N, D]."""

    def call() -> tuple[Tensor, ...]:
        losses = label_loss(hidden.index_select(0, index), head, targets)
        return losses.detach(), *torch.autograd.grad(losses.sum(), hidden)

    return call
