"""Which matrix products each method adds and what it trains, from its settings alone: the methods' side of
`closed_form`. A method that is not here has no closed form; its costs are predicted by running its hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import unknown

SITE_OF = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o",
    "gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down",
}  # fmt: skip
NORM_PLACES = {
    "q_norm": "head_norm",
    "k_norm": "head_norm",
    "attention_post_norm": "attention",
    "mlp_post_norm": "mlp",
}
"""Norm -> the place of the walk at which it acts, where the names differ."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """Products that a method adds at a site, in multiply-adds a token; `entering` are those of the backward pass that
    happen only where the gradient of the site's input is needed."""

    forward: int
    backward: int
    entering: int


@dataclass(kw_only=True)
class Products:
    """All products of a bank's method, by (layer, site); `trained` are the places that hold something trained,
    `keeping` those whose backward pass needs more than the gradient that arrives, which is all that a shift needs."""

    by_place: dict[tuple[int, str], list[Product]] = field(default_factory=dict)
    trained: set[tuple[int, str]] = field(default_factory=set)
    keeping: set[tuple[int, str]] = field(default_factory=set)
    replaces_base: bool = False
    """Every weight is the adapter's own."""
    per_step: int = 0
    per_step_backward: int = 0
    """FLOPs once a step, whatever the packs."""

    def at(self, layer: int, site: str) -> list[Product]:
        """Products added at a site."""
        return self.by_place.get((layer, site), [])

    def trains(self, layer: int, place: str) -> bool:
        """Whether something is trained there."""
        return (layer, place) in self.trained

    def keeps(self, layer: int, place: str) -> bool:
        """Whether the backward pass of what is trained there needs something kept."""
        return (layer, place) in self.keeping

    def put(self, layer: int, site: str, product: Product | None = None, *, shift: bool = False) -> None:
        """Something is trained at a site; `product` is what it adds, if it is more than a `shift`."""
        self.trained.add((layer, site))
        if not shift:
            self.keeping.add((layer, site))
        if product is not None:
            self.by_place.setdefault((layer, site), []).append(product)


def products_of(config: DecoderConfig, methods: Sequence[Method]) -> Products:
    """Of a bank of runs; factors are as wide as those of the run with the largest rank."""
    name = methods[0].name
    if name not in _METHODS:
        raise unknown("closed form of method", name, _METHODS)
    products = Products()
    _METHODS[name](products, config, methods)
    return products


def _lora(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    """W x + s B A x; with the PiSSA start the frozen factors stand beside the trained ones."""
    ranks: dict[bool, dict[tuple[int, str], int]] = {False: {}, True: {}}
    for method in methods:
        for place in method.places(config):
            for frozen in (False, True)[: 1 + (method.init == "pissa")]:
                ranks[frozen][place] = max(ranks[frozen].get(place, 0), method.rank_of(place))
    for (layer, module), trained in ranks[False].items():
        rank = trained + ranks[True].get((layer, module), 0)
        out, width = config.linear_shape(module)
        # du and dB take r * out each, dA r * in, and dx r * in more.
        product = Product(forward=rank * (width + out), backward=rank * (2 * out + width), entering=rank * width)
        products.put(layer, SITE_OF[module], product)
        if methods[0].dora:  # norms of the rows of W + s B A: W A^T, A A^T and B (A A^T)
            products.per_step += 2 * len(methods) * rank * (out * width + rank * width + out * rank)
    for layer, module in methods[0].biased(config):
        products.put(layer, SITE_OF[module], shift=True)


def _ia3(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    for layer, module in methods[0].places(config):
        products.put(layer, "glu" if methods[0].scales_input((layer, module)) else SITE_OF[module])


def _bitfit(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    for layer, module in methods[0].places(config):
        products.put(layer, SITE_OF[module], shift=True)


def _ln_tuning(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    for layer, norm in methods[0].places(config):
        products.put(layer, NORM_PLACES.get(norm, norm))


def _prompt_tuning(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    products.put(-1, "embed")


def _p_tuning(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    """The encoder, whose input is trained too: backward is twice the forward."""
    method, products_a_token = methods[0], 0
    width, h = config.hidden_size, method.hidden_size
    if method.encoder == "lstm":
        for layer in range(method.num_layers):
            products_a_token += 2 * 4 * h * ((2 * h if layer else width) + h)
        products_a_token += 2 * h * 2 * h + 2 * h * width
    elif method.encoder == "mlp":
        products_a_token += width * h + h * h + h * width
    products.put(-1, "embed")
    products.per_step = 2 * len(methods) * method.num_virtual_tokens * products_a_token
    products.per_step_backward = 2 * products.per_step


def _prefix_tuning(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    method = methods[0]
    for layer in range(config.num_hidden_layers):
        products.put(layer, "keys")
    if method.projection:
        width = config.key_size + 2 * config.num_hidden_layers * config.key_size
        products.per_step = 2 * len(methods) * method.num_virtual_tokens * method.hidden_size * width
        products.per_step_backward = 2 * products.per_step


def _adapter(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    """down and up, [m, D] and [D, m]: their own gradients and that between them."""
    method, width = methods[0], config.hidden_size
    size = max(width // method.reduction, 1) * width
    for layer in range(config.num_hidden_layers):
        for place in method.places:
            products.put(layer, place, Product(forward=2 * size, backward=3 * size, entering=size))


def _svft(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    """U diag(m) V^T x with fixed bases of min(out, in) vectors."""
    for layer in range(config.num_hidden_layers):
        for module in methods[0].target_modules:
            out, width = config.linear_shape(module)
            inner = min(out, width)
            product = Product(forward=inner * (out + width), backward=inner * out, entering=inner * width)
            products.put(layer, SITE_OF[module], product)


def _full(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    products.replaces_base = True
    products.put(-1, "embed")


def _base(products: Products, config: DecoderConfig, methods: Sequence[Any]) -> None:
    pass


_METHODS: dict[str, Callable[[Products, DecoderConfig, Sequence[Any]], None]] = {
    "base": _base,
    "lora": _lora,
    "ia3": _ia3,
    "bitfit": _bitfit,
    "ln-tuning": _ln_tuning,
    "prompt-tuning": _prompt_tuning,
    "p-tuning": _p_tuning,
    "prefix-tuning": _prefix_tuning,
    "adapter": _adapter,
    "svft": _svft,
    "full": _full,
}
