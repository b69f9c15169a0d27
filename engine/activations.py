"""What the backward pass finds of a layer's forward pass: everything, all but pointwise results, or the input alone.

What was not kept is computed again, by the same operators on the same values, so gradients are equal bit for bit
(Chen et al. 2016, arXiv:1604.06174; pointwise results alone: Korthikanti et al. 2022, arXiv:2205.05198, section 5).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peftdyno.engine.accounting.scope import Scope

Policy = Literal["keep", "cheap", "recompute"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
Block = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A layer after its first norm: (normed rows, residual stream) -> (residual stream, what is to be added to it)."""


@dataclass
class Activations:
    """Runs layers under a policy.

    `keep`: autograd keeps what it needs. `cheap`: results of matrix products and attention are kept, and the results
    named by `pointwise` are computed again where they are needed. `recompute`: a layer keeps its input and runs
    again, once, when its backward pass begins. What is computed again is charged to phase `recompute`.
    """

    policy: Policy
    scope: Scope
    _recipes: dict[int, tuple[weakref.ref[Any], _Recipe]] = field(default_factory=dict)
    _running_again: _Region | None = None

    def layer(self, i: int, block: Block, normed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Layer i after its first norm."""
        if self.policy == "keep" or not torch.is_grad_enabled():
            return block(normed, residual)
        if self.policy == "cheap":
            with saved_tensors_hooks(self._packed, _unpacked):
                return block(normed, residual)
        region = _Region(self, i, block, (self._packed(normed.detach()), residual.detach()), _needs(normed, residual))
        with saved_tensors_hooks(region.count, region.value):
            return block(normed, residual)

    def pointwise(self, result: Tensor, again: Callable[[], Tensor]) -> None:
        """`again` gives the values of `result`, in the same layout, from tensors that are kept anyway."""
        if self.policy == "keep" or not result.requires_grad:
            return
        storage = result.untyped_storage()
        key, recipes = storage._cdata, self._recipes
        recipe = _Recipe(self.scope, again)
        recipes[key] = weakref.ref(storage, lambda _: recipes.pop(key, None)), recipe

    def before_last_product(self) -> None:
        """Ends the running again of a layer from which nothing more is needed."""
        region = self._running_again
        if region is not None and len(region.values) == region.num_saved:
            raise _Complete

    def _packed(self, tensor: Tensor) -> Any:
        """What is kept in place of a tensor: the way to compute it again where there is one, else itself."""
        _, recipe = self._recipes.get(tensor.untyped_storage()._cdata, (None, None))
        return tensor if recipe is None else _Again(recipe, tensor)

    @contextmanager
    def running_again(self, region: _Region) -> Iterator[None]:
        """While a region's block runs for the second time."""
        before = self.scope.layer
        self._running_again = region
        try:
            with self.scope.within(phase="recompute", layer=region.layer), torch.enable_grad():
                yield
        finally:
            self._running_again, self.scope.layer = None, before


class _Complete(Exception):
    """All that the backward pass of a layer needs has been computed again."""


class _Recipe:
    """How to compute a tensor again; it is done once for all that ask."""

    def __init__(self, scope: Scope, again: Callable[[], Tensor]) -> None:
        self.scope, self.again = scope, again

    @cached_property
    def tensor(self) -> Tensor:
        """The values, apart from the graph."""
        with self.scope.within(phase="recompute"), torch.no_grad():
            return self.again()


class _Again:
    """A view of a tensor that is computed again when it is asked for."""

    def __init__(self, recipe: _Recipe, view: Tensor) -> None:
        self.recipe = recipe
        self.geometry = view.shape, view.stride(), view.storage_offset()

    def tensor(self) -> Tensor:
        """The view."""
        return self.recipe.tensor.as_strided(*self.geometry)


def _unpacked(kept: Any) -> Tensor:
    tensor: Tensor = kept.tensor() if isinstance(kept, _Again) else kept
    return tensor


def _needs(*inputs: Tensor) -> tuple[bool, ...]:
    return tuple(tensor.requires_grad for tensor in inputs)


class _Region:
    """A block whose saved tensors are only numbered in the forward pass; the first one that the backward pass asks
    for makes the block run again for all of them."""

    def __init__(self, owner: Activations, layer: int, block: Block, inputs: tuple[Any, Any], needs: Any) -> None:
        self.owner, self.layer, self.block = owner, layer, block
        self.inputs, self.needs = inputs, needs
        self.num_saved = 0
        self.values: dict[int, Tensor] = {}
        self._waiting: dict[int, Tensor] = {}

    def count(self, _: Tensor) -> int:
        """Stands for a tensor that the forward pass saves."""
        self.num_saved += 1
        return self.num_saved - 1

    def value(self, number: int) -> Tensor:
        """The tensor of a number, for the one operation that saved it."""
        if number not in self._waiting:
            self._run_again()
        return self._waiting.pop(number)

    def _run_again(self) -> None:
        normed, residual = (
            _unpacked(kept).detach().requires_grad_(n) for kept, n in zip(self.inputs, self.needs, strict=True)
        )
        # Ended here and not in the generator, whose frame would keep the layer's tensors until garbage is collected.
        try:
            with self.owner.running_again(self), saved_tensors_hooks(self._collect, _never):
                self.block(normed, residual)
        except _Complete:
            pass
        assert len(self.values) == self.num_saved, (len(self.values), self.num_saved)
        self._waiting, self.values = self.values, {}

    def _collect(self, tensor: Tensor) -> None:
        self.values[len(self.values)] = tensor


def _never(_: Any) -> Tensor:
    raise AssertionError("the second run of a layer has no backward pass")
