"""AdapterBank: the trained parameters of one method, stacked over R runs that share the frozen base model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.pack import Root
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.adapted_linear import LinearEdits, TokenRuns
from peftdyno.kernels.nf4 import Weight
from peftdyno.kernels.random import stream_key
from peftdyno.kernels.transfer import sent

warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
# Gradients of a run's parameters lie in one row with those of its others, on purpose: one clip, one AdamW call.


@dataclass
class AdapterBank:
    """R runs of a method. `flat` [R, P] holds all masters in fp32 (fp64 over an fp64 base), `gradient` their gradients;
    `parameters` are views of it by name, [R, ...]. Where runs differ in rank, a smaller one is padded with zeros that
    stay zero.

    `methods` and `seeds` have an entry for each run; `step` and `training` select the dropout masks.
    """

    config: DecoderConfig
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    flat: Tensor
    gradient: Tensor
    parameters: dict[str, Tensor]
    groups: tuple[tuple[float, int, int], ...]
    """(learning rate factor, first column, last column + 1) of ranges of `flat`."""
    buffers: dict[str, Any] = field(default_factory=dict)
    """What a method derived from the base weights once."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """What is the same at every step and was found at the first."""
    state: dict[str, Any] = field(default_factory=dict)
    """What a method computed for this step."""
    step: int = 0
    training: bool = False
    bordered: frozenset[tuple[int, str]] = frozenset()
    """(layer, site) of the products whose weights have borders."""

    @classmethod
    def create(
        cls, config: DecoderConfig, methods: Sequence[Method], seeds: Sequence[int], weights: DecoderWeights
    ) -> AdapterBank:
        """A bank at its methods' starts; each tensor of each run draws from its own stream of the run's seed."""
        dtype = torch.promote_types(weights.embed.dtype, torch.float32)
        bank = cls.empty(config, methods, seeds, weights.embed.device, dtype)
        with torch.no_grad():
            bank.method.derive(bank, weights)
            if weights.embed.is_meta:
                return bank
            for run, (method, seed) in enumerate(zip(methods, seeds, strict=True)):
                for name, target in bank.run_tensors(run).items():
                    random = np.random.Generator(np.random.Philox(key=stream_key(seed, f"init.{name}") % 2**64))
                    target.copy_(torch.as_tensor(method.initial(name, tuple(target.shape), random, weights)))
                method.start(bank, run)
        return bank

    @classmethod
    def from_tensors(
        cls,
        config: DecoderConfig,
        methods: Sequence[Method],
        tensors: Sequence[Mapping[str, Tensor]],
        weights: DecoderWeights,
        seeds: Sequence[int] | None = None,
    ) -> AdapterBank:
        """A bank of trained runs, each given as its tensors by name."""
        dtype = torch.promote_types(weights.embed.dtype, torch.float32)
        bank = cls.empty(config, methods, seeds or [0] * len(methods), weights.embed.device, dtype)
        with torch.no_grad():
            bank.method.derive(bank, weights)
            for run, values in enumerate(tensors):
                for name, target in bank.run_tensors(run).items():
                    target.copy_(values[name])
        return bank

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        methods: Sequence[Method],
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> AdapterBank:
        """A bank of zeros, before `derive`; all runs are of one method.

        UserError where runs differ in a field that a bank cannot vary.
        """
        assert len({m.name for m in methods}) == 1 and len(methods) == len(seeds), (methods, seeds)
        _check_same_fields(methods)
        shapes = _stacked_shapes([m.parameters(config) for m in methods])
        order = sorted(shapes, key=lambda name: methods[0].rate_factor(name))
        size = sum(int(np.prod(shape)) for shape in shapes.values())
        flat, gradient = (torch.zeros(len(methods), size, device=device, dtype=dtype) for _ in range(2))
        parameters, groups, start = {}, [], 0
        for name in order:
            stop = start + int(np.prod(shapes[name]))
            view = flat[:, start:stop].view(len(methods), *shapes[name]).requires_grad_()
            view.grad = gradient[:, start:stop].view(len(methods), *shapes[name])
            parameters[name] = view
            groups.append((methods[0].rate_factor(name), start, stop))
            start = stop
        return cls(config, tuple(methods), tuple(seeds), flat, gradient, parameters, _joined(groups))

    @property
    def num_runs(self) -> int:
        """R."""
        return len(self.methods)

    @property
    def method(self) -> Method:
        """The method of the first run; what all runs share (its name, its places) can be read here."""
        return self.methods[0]

    @property
    def root(self) -> Root | None:
        """Learned positions that every sequence starts with."""
        return self.method.root()

    def trainable_count(self, run: int = 0) -> int:
        """Trained values of one run, padding left out."""
        return self.methods[run].trainable_count(self.config)

    def run_tensors(self, run: int) -> dict[str, Tensor]:
        """Views of one run's parameters by name, padding left out and apart from the graph."""
        shapes = self.methods[run].parameters(self.config)
        return {
            name: self.parameters[name].detach()[run][tuple(slice(n) for n in shape)] for name, shape in shapes.items()
        }

    def begin(self, step: int, *, training: bool) -> None:
        """Start a step: choose its random streams and compute what the method needs once for it."""
        self.step, self.training = step, training
        self.state.clear()
        self.method.prepare(self)

    def finish(self) -> None:
        """End a step's backward passes: carry gradients of what `prepare` computed on to the parameters."""
        self.method.finish(self)

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        self.gradient.zero_()

    def keys(self, purpose: str, layer: int) -> list[int]:
        """The 64-bit key of each run for this step's random stream of a purpose in a layer."""
        return [stream_key(seed, purpose, self.step, layer) for seed in self.seeds]

    def key_table(self, streams: Sequence[tuple[str, int]]) -> Tensor:
        """`keys` of several (purpose, layer), [M, R], on the bank's device."""
        return sent(torch.tensor([self.keys(*stream) for stream in streams]), self.flat.device)

    @cached_property
    def replaces_products(self) -> bool:
        """Whether `product` may give anything."""
        return type(self.method).product is not Method.product

    @cached_property
    def has_branches(self) -> bool:
        """Whether `branch` changes anything."""
        return type(self.method).branch is not Method.branch

    def linear(self, layer: int, site: str) -> LinearEdits | None:
        """Edits of a fused product."""
        return self.method.linear(self, layer, site)

    def product(
        self, layer: int, site: str, x: Tensor, weight: Weight, bias: Tensor | None, runs: TokenRuns
    ) -> Tensor | None:
        """The method's own fused product [N, out], or None."""
        return self.method.product(self, layer, site, x, weight, bias, runs)

    def embed(self, tokens: Tensor, runs: TokenRuns) -> Tensor | None:
        """Rows [N, D] of the runs' own embeddings, or None."""
        return self.method.embed(self, tokens, runs)

    def head(self, hidden: Tensor, runs: TokenRuns) -> Tensor | None:
        """Logits [N, V] by the runs' own heads, or None."""
        return self.method.head(self, hidden, runs)

    def spare(self, layer: int, site: str) -> int:
        """Spare columns beside the input of a bordered product, 0 where a product is not bordered; rows of 2 bytes an
        element still start at multiples of 16 bytes."""
        return -(-self.method.spare(self, layer, site) // 8) * 8 if (layer, site) in self.bordered else 0

    def norm(self, layer: int, name: str) -> Tensor | None:
        """Weights [R, D] in place of a norm's ([R, d] for `q_norm` and `k_norm`)."""
        return self.method.norm(self, layer, name)

    def glu_scale(self, layer: int) -> Tensor | None:
        """Scale [R, F] of the input of down_proj."""
        return self.method.glu_scale(self, layer)

    def branch(self, layer: int, place: str, entered: Tensor, x: Tensor, runs: TokenRuns) -> Tensor:
        """The output x of the attention or the MLP on its way to the residual stream; `entered` went in."""
        return self.method.branch(self, layer, place, entered, x, runs)

    def prefix(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [R * n, K, d] before every sequence."""
        return self.method.prefix(self, layer)

    def virtual_embeddings(self) -> Tensor:
        """Embeddings [R * n, D] of the virtual tokens."""
        return self.method.virtual_embeddings(self)


def _check_same_fields(methods: Sequence[Method]) -> None:
    """Every run has the first's value of each field that is not the run's own."""
    first = methods[0]
    for other in methods[1:]:
        for item in fields(first):
            mine, theirs = getattr(first, item.name), getattr(other, item.name)
            if item.name not in {*first.varying()} & {*other.varying()} and mine != theirs:
                raise UserError(
                    f"runs of one bank differ in {first.name}.{item.name} ({mine} and {theirs}); "
                    "give them one value or train them apart"
                )


def _stacked_shapes(shapes: Sequence[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Shapes that hold every run's tensor, the largest of each dimension."""
    names = list(dict.fromkeys(name for one in shapes for name in one))
    found = {}
    for name in names:
        sizes = [one[name] for one in shapes if name in one]
        found[name] = tuple(max(size) for size in zip(*sizes, strict=True))
    return found


def _joined(groups: Sequence[tuple[float, int, int]]) -> tuple[tuple[float, int, int], ...]:
    """Neighbouring ranges of the same factor as one."""
    joined: list[tuple[float, int, int]] = []
    for factor, start, stop in groups:
        if joined and joined[-1][0] == factor:
            joined[-1] = (factor, joined[-1][1], stop)
        else:
            joined.append((factor, start, stop))
    return tuple(joined)
