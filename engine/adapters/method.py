"""Method: what one parameter-efficient method trains, where it acts, and how it is stored and merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.pack import Root
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.adapted_linear import LinearEdits, TokenRuns
from peftdyno.kernels.nf4 import Weight

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors
    from peftdyno.engine.families.family import Family

SITES: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Fused product of the decoder -> the projections whose rows it holds, in order."""

MODULES = tuple(module for modules in SITES.values() for module in modules)
"""Every projection a method may name as a target."""


def module_rows(config: DecoderConfig, site: str) -> dict[str, tuple[int, int]]:
    """Projection -> (first row, last row + 1) within the fused weight of its site."""
    rows, start = {}, 0
    for module in SITES[site]:
        stop = start + config.linear_shape(module)[0]
        rows[module] = (start, stop)
        start = stop
    return rows


SITE_OF = {module: site for site, modules in SITES.items() for module in modules}
"""Projection -> the fused product that holds its rows."""


def module_weight(weights: DecoderWeights, config: DecoderConfig, layer: int, module: str) -> Tensor:
    """One projection's rows [out, in]: a view, or where the base is in 4 bits a dequantised copy."""
    fused: Weight = getattr(weights.layers[layer], SITE_OF[module])
    rows = module_rows(config, SITE_OF[module])[module]
    return fused[slice(*rows)] if isinstance(fused, Tensor) else fused.rows(*rows)


def module_bias(weights: DecoderWeights, config: DecoderConfig, layer: int, module: str) -> Tensor | None:
    """View [out] of one projection's bias, None where the model has none."""
    site = SITE_OF[module]
    fused: Tensor | None = getattr(weights.layers[layer], f"{site}_bias", None)
    return None if fused is None else fused[slice(*module_rows(config, site)[module])]


@dataclass(frozen=True, kw_only=True)
class Method:
    """Hyperparameters of a method, and its hooks; a hook not overridden leaves the base model as it is.

    Parameters are named; the bank stacks those of its R runs as fp32 [R, ...], and the hooks read them there.
    """

    name: ClassVar[str]
    learning_rate: ClassVar[float] = 5e-5
    """PEFT-Bench's rate for the method."""
    weight_decay: ClassVar[float] = 1e-5
    per_run: ClassVar[tuple[str, ...]] = ()
    """Fields that may differ between the runs of a bank; the others are the same for all."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Fields that a trained adapter does not depend on."""
    peft_type: ClassVar[str | None] = None
    """PEFT's word for the method in an adapter's config; None for a method that is stored in our own form."""
    unmergeable: ClassVar[str] = "it defines no form folded into the base weights"
    """Why a method that does not override `merge` cannot be folded."""

    def varying(self) -> tuple[str, ...]:
        """The fields that may differ between the runs of a bank, with the values that the others have."""
        return self.per_run

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every trained tensor of one run."""
        raise UserError(f"method '{self.name}' trains nothing")

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        """Start of one tensor of one run; `random` is that tensor's own stream."""
        return np.zeros(shape, dtype=np.float32)

    def derive(self, bank: AdapterBank, weights: DecoderWeights) -> None:
        """Compute what depends on the base weights alone into `bank.buffers`, once, before any start."""

    def start(self, bank: AdapterBank, run: int) -> None:
        """Set the starts of a run that follow from what was derived or drawn; after `initial`."""

    def stored_count(self, config: DecoderConfig) -> int:
        """Values in the adapter file of one run; a method whose encoder is not stored says so here."""
        return self.trainable_count(config)

    def inference_count(self, config: DecoderConfig) -> int:
        """Values that inference with one unmerged adapter reads beside the base model's or instead of them."""
        return self.stored_count(config)

    def trainable_count(self, config: DecoderConfig) -> int:
        """Trained values of one run."""
        return sum(int(np.prod(shape)) for shape in self.parameters(config).values())

    def rate_factor(self, name: str) -> float:
        """What the learning rate is multiplied by for the named tensor."""
        return 1.0

    def root(self) -> Root | None:
        """Learned positions that every sequence starts with."""
        return None

    def uses_dropout(self) -> bool:
        """Whether training draws random masks, so that a shared prefix is another sample of the same expectation."""
        return False

    def unrecordable(self) -> str:
        """Why a training step of the method cannot be recorded and replayed, or nothing: a recording repeats what ran
        on the device, not what Python computes from the step or copies there."""
        return ""

    def prepare(self, bank: AdapterBank) -> None:
        """Compute what the step's hooks need, once a step, into `bank.state`."""

    def finish(self, bank: AdapterBank) -> None:
        """Carry the gradients that reached `bank.state` on to the parameters, once a step."""

    def linear(self, bank: AdapterBank, layer: int, site: str) -> LinearEdits | None:
        """Edits of a fused product."""
        return None

    def product(
        self,
        bank: AdapterBank,
        layer: int,
        site: str,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None,
        runs: TokenRuns,
    ) -> Tensor | None:
        """The method's own fused product [N, out] of x with the base's weight and bias, in place of the edited one."""
        return None

    def embed(self, bank: AdapterBank, tokens: Tensor, runs: TokenRuns) -> Tensor | None:
        """Rows [N, D] of the runs' own embeddings, in place of the base's."""
        return None

    def head(self, bank: AdapterBank, hidden: Tensor, runs: TokenRuns) -> Tensor | None:
        """Logits [N, V] by the runs' own heads, before any soft-cap, in place of the base's."""
        return None

    def spare(self, bank: AdapterBank, layer: int, site: str) -> int:
        """Spare columns and rows a bordered product needs at a site."""
        return 0

    def norm(self, bank: AdapterBank, layer: int, name: str) -> Tensor | None:
        """Weights [R, D] in place of a norm's; `layer` is -1 for the final norm; `q_norm`, `k_norm` are [R, d]."""
        return None

    def glu_scale(self, bank: AdapterBank, layer: int) -> Tensor | None:
        """Scale [R, F] of the MLP's inner activation, the input of down_proj."""
        return None

    def branch(self, bank: AdapterBank, layer: int, place: str, entered: Tensor, x: Tensor, runs: TokenRuns) -> Tensor:
        """The output x of the attention or the MLP (`place`), before it joins the residual stream; `entered` [N, D]
        are the normed rows that went in."""
        return x

    def prefix(self, bank: AdapterBank, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values [R * n, K, d] that stand before every sequence in a layer."""
        return None

    def virtual_embeddings(self, bank: AdapterBank) -> Tensor:
        """Embeddings [R * n, D] of the virtual tokens."""
        raise UserError(f"method '{self.name}' has no virtual tokens")

    def merge(self, bank: AdapterBank, run: int, weights: DecoderWeights) -> DecoderConfig:
        """Fold a run into the base weights, in place; the config of the model they then are.

        UserError where the method can't be folded.
        """
        raise UserError(f"method '{self.name}' cannot be merged: {self.unmergeable}")

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Config fields (`peft_type` among them) and tensors of one run under the names of the adapter's file."""
        raise UserError(f"method '{self.name}' has no PEFT form")

    @classmethod
    def recognises(cls, fields: AdapterFields, tensors: AdapterTensors) -> bool:
        """Whether an adapter's files hold this method."""
        return cls.peft_type is not None and fields.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        """The method and its tensors by our names; takes all it knows out of `fields` and `tensors`, and what it
        leaves there is an error."""
        raise UserError(f"method '{cls.name}' has no PEFT form")
