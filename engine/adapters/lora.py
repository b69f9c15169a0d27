"""LoRA: W x + s B A drop(x) on chosen projections (Hu et al. 2021); s = alpha / r, or alpha / sqrt(r) (rsLoRA,
Kalajdzievski 2023) (arXiv:2106.09685, arXiv:2312.03732).

Options: DoRA (Liu et al. 2024, eq. 5), LoRA+ (Hayou et al. 2024), the PiSSA start (Meng et al. 2024).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from peftdyno.engine.adapters.derived import Derived
from peftdyno.engine.adapters.lora_peft import STARTS, check_bias, is_bitfit, neutral_fields, read_settings
from peftdyno.engine.adapters.low_rank import principal_factors, row_norms
from peftdyno.engine.adapters.method import (
    MODULES,
    SITE_OF,
    SITES,
    Method,
    module_bias,
    module_rows,
    module_weight,
)
from peftdyno.engine.adapters.targets import (
    Place,
    check_pattern,
    check_targets,
    chosen_places,
    linear_places,
    pattern_value,
    peft_name,
    peft_pattern,
    peft_targets,
    place_name,
)
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.families.family import Family
from peftdyno.engine.merge import add_biases
from peftdyno.engine.weights import DecoderWeights
from peftdyno.kernels.adapted_linear import Columns, LinearEdits, LowRank

if TYPE_CHECKING:
    from peftdyno.engine.adapters.bank import AdapterBank
    from peftdyno.engine.adapters.peft_reader import AdapterFields, AdapterTensors


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Rank-r update of each target projection.

    Dropout acts on the input of the low-rank term only. With DoRA each row of W + s B A is scaled to a trained
    magnitude, its own norm being a constant for the gradient; the base's bias is not scaled. With the PiSSA start
    A0 and B0 are the base's leading singular triples and B A - B0 A0 is what acts, so that the base stays as it is.
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    per_run: ClassVar[tuple[str, ...]] = ("rank", "alpha", "rank_stabilised", "rank_pattern", "alpha_pattern", "init")
    training_only: ClassVar[tuple[str, ...]] = ("dropout", "b_rate_factor")

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Kind or single module (`layers.3.q_proj`) -> its rank, where it is another than `rank`."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    rank_stabilised: bool = False
    init: str = "kaiming"
    """kaiming: A uniform in +-1/sqrt(in), B = 0; gaussian: A of standard deviation 1/r, B = 0; random: both uniform;
    pissa."""
    bias: str = "none"
    """Which of the base's biases are trained: none, all, or lora_only (those of the targets)."""
    lora_bias: bool = False
    """Whether s times a trained bias is added to each target's output."""
    dora: bool = False
    b_rate_factor: float = 1.0
    """LoRA+: the learning rate of B over that of A."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "rank_pattern", "alpha_pattern"):
            check_targets(f"lora.{name}", getattr(self, name), MODULES)
        if min(self.rank, *self.rank_pattern.values(), math.inf) < 1:
            raise UserError(f"lora.rank {self.rank}, rank_pattern {dict(self.rank_pattern)}: must be at least 1")
        if not all(0 < alpha < math.inf for alpha in (self.alpha, *self.alpha_pattern.values())):
            raise UserError(f"lora.alpha {self.alpha}, alpha_pattern {dict(self.alpha_pattern)}: must be positive")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout {self.dropout} must be in [0, 1)")
        if self.init not in STARTS:
            raise unknown("lora.init", self.init, STARTS)
        if not self.b_rate_factor > 0:
            raise UserError(f"lora.b_rate_factor {self.b_rate_factor} must be positive")
        if self.dora and self.lora_bias:
            raise UserError("lora.lora_bias cannot be combined with lora.dora; choose one")
        check_bias(self.bias)

    def varying(self) -> tuple[str, ...]:
        """A run without a target that others have is padded with zeros there, which magnitudes and biases can't be."""
        padded = not (self.dora or self.lora_bias or self.bias != "none")
        return (*self.per_run, "target_modules", "layers_to_transform") if padded else self.per_run

    def places(self, config: DecoderConfig) -> tuple[Place, ...]:
        """The adapted projections."""
        places = chosen_places(linear_places(config), self.target_modules, self.layers_to_transform)
        check_pattern("lora.rank_pattern", self.rank_pattern, places)
        check_pattern("lora.alpha_pattern", self.alpha_pattern, places)
        return places

    def biased(self, config: DecoderConfig) -> tuple[Place, ...]:
        """The projections whose base bias is trained."""
        if self.bias == "none":
            return ()
        sites = {"qkv": config.attention_bias, "o": config.attention_output_bias}
        places = linear_places(config) if self.bias == "all" else self.places(config)
        return tuple(place for place in places if sites.get(SITE_OF[place[1]], False))

    def rank_of(self, place: Place) -> int:
        """r of a projection."""
        return int(pattern_value(self.rank_pattern, place, self.rank))

    def scaling_of(self, place: Place) -> float:
        """The factor s on B A of a projection."""
        alpha: float = pattern_value(self.alpha_pattern, place, self.alpha)
        rank = self.rank_of(place)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def parameters(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for place in self.places(config):
            out, columns = config.linear_shape(place[1])
            name, rank = place_name(place), self.rank_of(place)
            shapes[f"{name}.A"], shapes[f"{name}.B"] = (rank, columns), (out, rank)
            if self.dora:
                shapes[f"{name}.magnitude"] = (out,)
            if self.lora_bias:
                shapes[f"{name}.B_bias"] = (out,)
        for place in self.biased(config):
            shapes[f"{place_name(place)}.bias"] = config.linear_shape(place[1])[:1]
        return shapes

    def stored_count(self, config: DecoderConfig) -> int:
        return (_doubled(self) if self.init == "pissa" else self).trainable_count(config)

    def rate_factor(self, name: str) -> float:
        return self.b_rate_factor if name.endswith(".B") else 1.0

    def uses_dropout(self) -> bool:
        return self.dropout > 0

    def initial(
        self, name: str, shape: tuple[int, ...], random: np.random.Generator, weights: DecoderWeights
    ) -> np.ndarray[Any, Any] | Tensor:
        if name.endswith(".A") and self.init == "gaussian":
            return random.normal(0.0, 1 / shape[0], shape)
        if name.endswith(".A") or (name.endswith(".B") and self.init == "random"):
            bound = 1 / math.sqrt(shape[1])
            return random.uniform(-bound, bound, shape).astype(np.float32)
        return np.zeros(shape, dtype=np.float32)

    def derive(self, bank: AdapterBank, weights: DecoderWeights) -> None:
        config, buffers = bank.config, bank.buffers
        places = [place for place in linear_places(config) if f"{place_name(place)}.A" in bank.parameters]
        buffers["places"] = places
        for place in places:
            name, weight = place_name(place), module_weight(weights, config, *place)
            if self.dora:
                buffers[f"{name}.weight"] = partial(module_weight, weights, config, *place)
                buffers[f"{name}.square"] = weight.to(bank.flat.dtype).square().sum(1)
            ranks = _principal_ranks(bank, place)
            if max(ranks) > min(weight.shape):
                raise UserError(
                    f"lora.rank {max(ranks)} is more than {name} {list(weight.shape)} can start from (pissa)"
                )
            if any(ranks):
                runs = list(zip(ranks, _scaling(bank, place), strict=True))
                buffers[f"{name}.start"] = principal_factors(weight.to(bank.flat.dtype), runs)
        for place in {*places, *self.biased(config)}:
            bias = module_bias(weights, config, *place)
            if bias is not None:
                buffers[f"{place_name(place)}.bias"] = bias.to(bank.flat.dtype)

    def start(self, bank: AdapterBank, run: int) -> None:
        for place in self.places(bank.config):
            name = place_name(place)
            if self.init == "pissa":
                for parameter, start in zip("AB", bank.buffers[f"{name}.start"], strict=True):
                    own = bank.parameters[f"{name}.{parameter}"][run]
                    own[: start.shape[1], : start.shape[2]].copy_(start[run])
            if self.dora:
                bank.parameters[f"{name}.magnitude"][run].copy_(_row_norms(bank, place)[run])
        for place in self.biased(bank.config):
            bank.parameters[f"{place_name(place)}.bias"][run].copy_(bank.buffers[f"{place_name(place)}.bias"])

    def unrecordable(self) -> str:
        copied = "DoRA" if self.dora else "lora_bias" if self.lora_bias else ""
        return f"LoRA with {copied} copies its scalings to the device at every step" if copied else ""

    def prepare(self, bank: AdapterBank) -> None:
        bank.state["derived"] = derived = Derived()
        scales: dict[Place, Tensor] = {}
        for place in bank.buffers["places"]:
            name = place_name(place)
            if f"{name}.start" in bank.buffers:
                bank.state[f"{name}.factors"] = tuple(derived.leaf(x) for x in _factors(bank, place))
            if self.dora:
                scales[place] = bank.parameters[f"{name}.magnitude"] / _row_norms(bank, place)
                bank.state[f"{name}.scale"] = derived.leaf(scales[place])
        for place in dict.fromkeys((*bank.buffers["places"], *self.biased(bank.config))):
            shift = _shift(bank, place, scales.get(place))
            if shift is not None:
                bank.state[f"{place_name(place)}.shift"] = derived.leaf(shift)

    def finish(self, bank: AdapterBank) -> None:
        bank.state["derived"].carry()

    def at(self, bank: AdapterBank, layer: int, site: str) -> list[Place]:
        """The projections of one fused product that a run adapts."""
        places = [(layer, module) for module in SITES[site]]
        return [place for place in places if f"{place_name(place)}.A" in bank.parameters]

    def linear(self, bank: AdapterBank, layer: int, site: str) -> LinearEdits | None:
        edits, places = self._edits(bank, layer, site)
        if edits is None or not (self.dropout and bank.training and places):
            return edits
        if "keys" not in bank.state:
            bank.state["keys"] = self._keys(bank)
        return edits.dropped(self.dropout, bank.state["keys"][layer, site])

    def _keys(self, bank: AdapterBank) -> dict[tuple[int, str], Tensor]:
        """Keys [M, R] of the dropout of each (layer, site), made in one piece for a step."""
        places = bank.buffers["places"]
        sizes = Counter((layer, SITE_OF[module]) for layer, module in places)
        table = bank.key_table([(f"dropout.{module}", layer) for layer, module in places])
        return dict(zip(sizes, table.split(list(sizes.values())), strict=True))

    def _edits(self, bank: AdapterBank, layer: int, site: str) -> tuple[LinearEdits | None, list[Place]]:
        """Edits without dropout, and the places of their low-rank terms; the same at every step where `prepare`
        computes nothing."""
        known, steady = f"edits.{layer}.{site}", bank.state.keys() - {"keys"} == {"derived"}
        if steady and known in bank.fixed:
            found: tuple[LinearEdits | None, list[Place]] = bank.fixed[known]
            return found
        places, rows = self.at(bank, layer, site), module_rows(bank.config, site)
        scales, shifts = (
            tuple(
                Columns(start=rows[module][0], values=bank.state[name])
                for module in SITES[site]
                if (name := f"layers.{layer}.{module}.{kind}") in bank.state
            )
            for kind in ("scale", "shift")
        )
        low_rank = tuple(_term(bank, place, rows[place[1]]) for place in places)
        edits = LinearEdits(low_rank=low_rank, scales=scales, shifts=shifts) if places or shifts else None
        if steady:
            bank.fixed[known] = edits, places
        return edits, places

    def spare(self, bank: AdapterBank, layer: int, site: str) -> int:
        ranks = 0
        for name in map(place_name, self.at(bank, layer, site)):
            ranks += bank.parameters[f"{name}.A"].shape[1]
            if f"{name}.start" in bank.buffers:
                ranks += bank.buffers[f"{name}.start"][0].shape[1]
        return ranks * bank.num_runs

    def merge(self, bank: AdapterBank, run: int, weights: DecoderWeights) -> DecoderConfig:
        config, values = bank.config, bank.run_tensors(run)
        places = self.places(config)
        added = {p: self.scaling_of(p) * values[f"{place_name(p)}.B_bias"] for p in places if self.lora_bias}
        merged = add_biases(config, weights, added)
        for place in places:
            a, b = (x[run] for x in _factors(bank, place))
            weight = module_weight(weights, config, *place)
            total = weight.to(b.dtype) + self.scaling_of(place) * (b @ a)
            if self.dora:
                total *= (values[f"{place_name(place)}.magnitude"] / _row_norms(bank, place)[run])[:, None]
            weight.copy_(total)
        for place in self.biased(config):
            bias = module_bias(weights, config, *place)
            assert bias is not None, place
            bias.copy_(bias + values[f"{place_name(place)}.bias"] - bank.buffers[f"{place_name(place)}.bias"])
        return merged

    def to_peft(self, bank: AdapterBank, run: int, family: Family) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, values = bank.config, bank.run_tensors(run)
        tensors = {}
        for place in self.places(config):
            name = place_name(place)
            a, b = values[f"{name}.A"], values[f"{name}.B"]
            if self.init == "pissa":
                a0, b0 = (x[run] for x in bank.buffers[f"{name}.start"])
                a, b = torch.cat([a, a0[: a.shape[0]]]), torch.cat([b, -b0[:, : b.shape[1]]], 1)
            tensors[f"{name}.A"], tensors[f"{name}.B"] = a, b
        form = _doubled(self) if self.init == "pissa" else self
        named = form.peft_names(config, family).items()
        return form.peft_fields(config, family), {theirs: {**values, **tensors}[ours] for ours, theirs in named}

    def peft_names(self, config: DecoderConfig, family: Family) -> dict[str, str]:
        """Our names -> those of an adapter's file."""
        suffixes = {
            "A": "lora_A.weight",
            "B": "lora_B.weight",
            "magnitude": "lora_magnitude_vector",
            "B_bias": "lora_B.bias",
        }
        names, places = {}, self.places(config)
        for place in dict.fromkeys((*places, *self.biased(config))):
            wrapped = {**suffixes, "bias": "base_layer.bias" if place in places else "bias"}
            ours = {f"{place_name(place)}.{name}": theirs for name, theirs in wrapped.items()}
            names.update({name: peft_name(family, place, theirs) for name, theirs in ours.items()})
        return {name: names[name] for name in self.parameters(config)}

    def peft_fields(self, config: DecoderConfig, family: Family) -> dict[str, Any]:
        """PEFT's config."""
        places, every = self.places(config), linear_places(config)
        layers = self.layers_to_transform
        within = every if layers is None else tuple(place for place in every if place[0] in layers)
        ranks = {place: self.rank_of(place) for place in places}
        alphas = {place: pattern_value(self.alpha_pattern, place, self.alpha) for place in places}
        return {
            **neutral_fields(),
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": peft_targets(family, within, places),
            "layers_to_transform": None if layers is None else list(layers),
            "layers_pattern": None,
            "exclude_modules": None,
            "rank_pattern": peft_pattern(family, places, ranks, self.rank),
            "alpha_pattern": peft_pattern(family, places, alphas, self.alpha),
            "use_rslora": self.rank_stabilised,
            "use_dora": self.dora,
            "init_lora_weights": STARTS[self.init],
            "bias": self.bias,
            "lora_bias": self.lora_bias,
        }

    @classmethod
    def recognises(cls, fields: AdapterFields, tensors: AdapterTensors) -> bool:
        return fields.get("peft_type") == cls.peft_type and not is_bitfit(fields, tensors)

    @classmethod
    def from_peft(
        cls, fields: AdapterFields, tensors: AdapterTensors, config: DecoderConfig, family: Family
    ) -> tuple[Method, dict[str, Tensor]]:
        method = cls(**read_settings(fields, config, family))
        names = method.peft_names(config, family)
        stored = dict(tensors.items())
        if method.bias == "lora_only" and not any(names[n] in stored for n in names if n.endswith(".bias")):
            method = replace(method, bias="none")  # PEFT leaves out the biases of wrapped layers
        shapes = method.parameters(config)
        return method, {name: tensors.take(names[name], *shape) for name, shape in shapes.items()}


def _doubled(method: LoRA) -> LoRA:
    """The settings of the factors [A; A0] and [B, -B0]: twice the rank, the same scaling."""
    factor = math.sqrt(2) if method.rank_stabilised else 2.0
    return replace(
        method,
        rank=2 * method.rank,
        alpha=factor * method.alpha,
        rank_pattern={name: 2 * rank for name, rank in method.rank_pattern.items()},
        alpha_pattern=_doubled_alphas(method, factor),
        init="kaiming",
    )


def _doubled_alphas(method: LoRA, factor: float) -> dict[str, float]:
    return {name: factor * alpha for name, alpha in method.alpha_pattern.items()}


def _scaling(bank: AdapterBank, place: Place) -> tuple[float, ...]:
    """Each run's factor on B A."""
    return tuple(method.scaling_of(place) for method in bank.methods if isinstance(method, LoRA))


def _principal_ranks(bank: AdapterBank, place: Place) -> list[int]:
    """Rank of each run's PiSSA start at a projection, 0 where it has none."""
    return [
        m.rank_of(place) if m.init == "pissa" and place in m.places(bank.config) else 0
        for m in bank.methods
        if isinstance(m, LoRA)
    ]


def _factors(bank: AdapterBank, place: Place) -> tuple[Tensor, Tensor]:
    """A and B of all runs, and with the PiSSA start beside them A0 and -B0."""
    name = place_name(place)
    a, b = bank.parameters[f"{name}.A"], bank.parameters[f"{name}.B"]
    if f"{name}.start" not in bank.buffers:
        return a, b
    a0, b0 = bank.buffers[f"{name}.start"]
    return torch.cat([a, a0], dim=1), torch.cat([b, -b0], dim=2)


def _row_norms(bank: AdapterBank, place: Place) -> Tensor:
    """Norms [R, out] of the rows of W + s B A, constants for the gradient."""
    name = place_name(place)
    weight, squares = bank.buffers[f"{name}.weight"](), bank.buffers[f"{name}.square"]
    with torch.no_grad():
        a, b = _factors(bank, place)
        return row_norms(weight, squares, a, b, torch.tensor(_scaling(bank, place), dtype=b.dtype, device=b.device))


def _shift(bank: AdapterBank, place: Place, scale: Tensor | None) -> Tensor | None:
    """What is added to the scaled output [R, out]: the trained base bias in place of the frozen one, which DoRA
    does not scale, and the bias of B."""
    name = place_name(place)
    frozen, trained = bank.buffers.get(f"{name}.bias"), bank.parameters.get(f"{name}.bias")
    shift = None
    if frozen is not None and (trained is not None or scale is not None):
        shift = (frozen if trained is None else trained) - (frozen if scale is None else scale * frozen)
    own = bank.parameters.get(f"{name}.B_bias")
    if own is None:
        return shift
    scaled = own * torch.tensor(_scaling(bank, place), dtype=own.dtype, device=own.device)[:, None]
    return scaled if shift is None else shift + scaled


def _term(bank: AdapterBank, place: Place, rows: tuple[int, int]) -> LowRank:
    name = place_name(place)
    a, b = bank.state.get(f"{name}.factors") or (bank.parameters[f"{name}.A"], bank.parameters[f"{name}.B"])
    return LowRank(start=rows[0], stop=rows[1], a=a, b=b, scaling=_scaling(bank, place))
