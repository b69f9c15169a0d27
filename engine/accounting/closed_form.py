"""Matrix FLOPs of a step, a forward pass or a generation summed over layers and products, from sizes alone.

A second way to the same integers as `predict`, which shares no code with the decoder, the kernels or the methods'
hooks: it knows only the config, the methods' settings and the segments of the packs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from peftdyno.engine.accounting.method_products import Products, products_of
from peftdyno.engine.accounting.pack_shape import PackShape
from peftdyno.engine.accounting.scope import Owner, Phase
from peftdyno.engine.accounting.work import NO_WINDOW, Work, total_work
from peftdyno.engine.activations import Policy
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.pack import Segment

Sums = dict[tuple[Phase, Owner, int], tuple[int, int]]
"""(phase, owner, layer) -> matrix FLOPs with causal attention, and with full-square attention."""


@dataclass
class _Walk:
    """A walk over the layers that adds up products; `train` adds those of the backward pass."""

    config: DecoderConfig
    products: Products
    phase: Phase
    train: bool
    sums: defaultdict[tuple[Phase, Owner, int], tuple[int, int]] = field(
        default_factory=lambda: defaultdict(lambda: (0, 0))
    )
    live: bool = False
    """Whether what flows here depends on something trained, so that its gradient is needed."""
    inside: bool = False
    """The same before the last product of the block walked last."""

    def add(self, owner: Owner, layer: int, forward: int, backward: int, square: tuple[int, int] | None = None) -> None:
        """FLOPs of one operation; `square` are those of the full-square convention where they differ."""
        full = square or (forward, backward)
        self._put(self.phase, owner, layer, forward, full[0])
        if self.train:
            self._put("backward", owner, layer, backward, full[1])

    def _put(self, phase: Phase, owner: Owner, layer: int, causal: int, full: int) -> None:
        before = self.sums[phase, owner, layer]
        self.sums[phase, owner, layer] = before[0] + causal, before[1] + full

    def linear(self, site: str, layer: int, rows: int) -> None:
        """A fused product of the base with what the method adds to it."""
        base = sum(2 * rows * out * width for out, width in map(self.config.linear_shape, SITES[site]))
        if self.products.replaces_base:
            self.add("adapter", layer, base, base * (1 + self.live))
        else:
            self.add("base", layer, base, base * self.live)
        self.added(site, layer, rows)

    def added(self, site: str, layer: int, rows: int) -> None:
        """What the method computes at a site, which is trained from there on."""
        for product in self.products.at(layer, site):
            backward = product.backward + product.entering * self.live
            self.add("adapter", layer, 2 * rows * product.forward, 2 * rows * backward)
        self.live |= self.products.trains(layer, site)

    def attention(self, layer: int, work: Work) -> None:
        """Scores and mixing: two products forward, five backward."""
        width = 2 * self.config.query_size
        pairs = work.pairs.get(self.config.window(layer) or NO_WINDOW, 0), work.square
        self.live |= self.products.trains(layer, "keys")
        causal, full = ((2 * width * p, 5 * width * p * self.live) for p in pairs)
        self.add("base", layer, *causal, square=full)

    def layer(self, layer: int, work: Work, last_rows: int) -> None:
        """One block; `last_rows` leave its attention."""
        self.live |= self.products.trains(layer, "input_norm")
        self.block(layer, work, last_rows, down=True)

    def again(self, layer: int, work: Work, last_rows: int) -> None:
        """A block that runs again for its backward pass, if anything of it is kept: not its last product where nothing
        from there on is."""
        kept = any(self.products.keeps(layer, place) for place in ("down", "mlp"))
        down = kept or self.products.replaces_base or self.config.post_norms
        if self.inside or (down and self.live):
            replace(self, phase="recompute", train=False).block(layer, work, last_rows, down=down)

    def block(self, layer: int, work: Work, last_rows: int, *, down: bool) -> None:
        """A block after its first norm."""
        rows = work.tokens
        self.linear("qkv", layer, rows)
        self.live |= self.products.trains(layer, "head_norm")
        self.attention(layer, work)
        self.linear("o", layer, last_rows)
        self.added("attention", layer, last_rows)
        self.live |= self.products.trains(layer, "mlp_norm")
        self.linear("gate_up", layer, last_rows)
        self.live |= self.products.trains(layer, "glu")
        self.inside = self.live
        if down:
            self.linear("down", layer, last_rows)
            self.added("mlp", layer, last_rows)

    def head(self, rows: int, loss: bool) -> None:
        """Logits; the loss's operator forms the gradient of a frozen head while the logits are there."""
        layer = self.config.num_hidden_layers
        once = 2 * rows * self.config.vocab_size * self.config.hidden_size
        if self.products.replaces_base:
            self.add("adapter", layer, once, 2 * once)
        else:
            self.live |= self.products.trains(-1, "final_norm")
            self.add("base", layer, once * (1 + (loss and self.live)), 0)


SITES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def training_step(
    config: DecoderConfig, methods: Sequence[Method], packs: Sequence[PackShape], activations: Policy = "keep"
) -> Sums:
    """One step over the packs."""
    return training(config, methods, total_work([Work.of(config, pack) for pack in packs]), 1, activations)


def training(
    config: DecoderConfig, methods: Sequence[Method], work: Work, num_steps: int, activations: Policy = "keep"
) -> Sums:
    """All steps of a training, from the sum of their packs' work. Matrix products are computed again under policy
    `recompute` only."""
    products = products_of(config, methods)
    walk = _Walk(config, products, "forward", train=True)
    walk.add("adapter", -1, num_steps * products.per_step, num_steps * products.per_step_backward)
    walk.live = products.trains(-1, "embed")
    for layer in range(config.num_hidden_layers):
        last = layer == config.num_hidden_layers - 1
        last_rows = work.label_rows if last else work.tokens
        walk.layer(layer, work, last_rows)
        if activations == "recompute":
            walk.again(layer, work, last_rows)
    walk.head(work.labels, loss=True)
    return _kept(walk)


def forward_pass(config: DecoderConfig, methods: Sequence[Method], pack: PackShape) -> Sums:
    """Logits of every token, without a cache."""
    products = products_of(config, methods)
    walk = _Walk(config, products, "forward", train=False)
    walk.add("adapter", -1, products.per_step, 0)
    _inference(walk, Work.of(config, pack), pack.num_tokens)
    return _kept(walk)


def generation(
    config: DecoderConfig, methods: Sequence[Method], prompts: PackShape, lengths: Sequence[int], num_tokens: int
) -> Sums:
    """`num_tokens` for each prompt of a pack; `lengths` are those of the prompts, learned positions included."""
    products = products_of(config, methods)
    walk = _Walk(config, products, "prefill", train=False)
    walk.add("adapter", -1, products.per_step, 0)
    _inference(walk, Work.of(config, prompts), len(lengths))
    walk.phase = "decode"
    for made in range(num_tokens - 1):
        tokens = [Segment(start=0, length=1, parent=-1, run=0, position=n + made) for n in lengths]
        _inference(walk, Work.over(config, tokens, len(tokens)), len(tokens))
    return _kept(walk)


def _inference(walk: _Walk, work: Work, head_rows: int) -> None:
    for layer in range(walk.config.num_hidden_layers):
        walk.layer(layer, work, work.tokens)
    walk.head(head_rows, loss=False)


def _kept(walk: _Walk) -> Sums:
    return dict(_nonzero(walk.sums))


def _nonzero(sums: Sums) -> Iterator[tuple[tuple[Phase, Owner, int], tuple[int, int]]]:
    for place, flops in sums.items():
        if flops != (0, 0):
            yield place, flops
