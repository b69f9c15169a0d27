"""Decoder: one forward pass for every family, over a Pack, calling the bank at its named sites.

Shapes: N tokens in the pack, L labels, R runs, D model width, H heads, K kv heads, d head width, F mlp width,
V vocabulary.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peftdyno.engine.accounting.scope import Scope
from peftdyno.engine.activations import Activations, Policy
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.cache import KVCache
from peftdyno.engine.config import DecoderConfig, RopeScaling
from peftdyno.engine.pack import Pack
from peftdyno.engine.weights import DecoderWeights, LayerWeights
from peftdyno.kernels.adapted_linear import TokenRuns, adapted_linear
from peftdyno.kernels.attention import AttentionShape, rotary_attention, rotated
from peftdyno.kernels.autograd import apply
from peftdyno.kernels.glu import glu
from peftdyno.kernels.glu_linear import glu_linear, joined
from peftdyno.kernels.head_norm import head_norm
from peftdyno.kernels.label_loss import label_loss
from peftdyno.kernels.library import watched
from peftdyno.kernels.linear import linear
from peftdyno.kernels.low_rank_input import Down, down_of, glu_down, rms_norm_down
from peftdyno.kernels.nf4 import Weight
from peftdyno.kernels.picked_rows import picked_rows
from peftdyno.kernels.rms_norm import rms_norm
from peftdyno.kernels.rotary import angles


@dataclass
class Rows:
    """What a layer needs to know of the rows it works on: whose they are and their rotary angles by base."""

    runs: TokenRuns
    pack: Pack
    rotary: dict[float, tuple[Tensor, Tensor]]
    cache: KVCache | None = None


@dataclass
class Decoder:
    """A frozen base model: its config, its weights, the scope its operations are charged to, and what of a training
    step's forward pass is kept for the backward pass."""

    config: DecoderConfig
    weights: DecoderWeights
    scope: Scope = field(default_factory=Scope)
    activations: Policy = "keep"

    def __post_init__(self) -> None:
        self.saved = Activations(self.activations, self.scope)
        self.shapes = [self.attention_shape(i) for i in range(self.config.num_hidden_layers)]
        bases = {self.rope_theta(i) for i in range(self.config.num_hidden_layers)}
        self.frequencies = {theta: self._frequencies(theta) for theta in bases}
        self.made: tuple[Tensor, Tensor] | None = None  # a product's input, and what its producer made of it

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights.embed.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, that of the embedding."""
        return self.weights.embed.dtype

    def losses(self, pack: Pack, bank: AdapterBank) -> Tensor:
        """Cross-entropy of each label of the pack, [L] in fp32, in the order of `pack.labels`."""
        hidden = self.hidden(pack, bank, only_labels=True)
        hidden = picked_rows(hidden, pack.labels.place)
        with self.scope.within(owner="adapter"):
            own = bank.head(hidden, TokenRuns(offsets=pack.labels.run_offsets))
            if own is not None:
                wide = self.softcap(own).to(torch.promote_types(own.dtype, torch.float32))
                return torch.nn.functional.cross_entropy(wide, pack.labels.target, reduction="none")
        return label_loss(hidden, self.weights.head, pack.labels.target, softcap=self.config.logit_softcap)

    def logits(self, pack: Pack, bank: AdapterBank, rows: Sequence[int] = (), cache: KVCache | None = None) -> Tensor:
        """Logits [N, V] of every row, or of `rows` (ascending) only, where some are named."""
        hidden, runs = self.hidden(pack, bank, cache=cache), pack.runs
        if rows:
            picked = torch.tensor(rows, device=hidden.device)
            hidden, runs = hidden.index_select(0, picked), _runs_of(rows, runs)
        with self.scope.within(owner="adapter"):
            own = bank.head(hidden, runs)
        return self.head(hidden) if own is None else self.softcap(own)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of normed hidden states by the frozen head, soft-capped where the family does."""
        return self.softcap(linear(hidden, self.weights.head))

    def softcap(self, logits: Tensor) -> Tensor:
        """c tanh(logits / c) where the family caps its logits."""
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def hidden(
        self, pack: Pack, bank: AdapterBank, *, only_labels: bool = False, cache: KVCache | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [N, D]; with `only_labels` at `pack.labels.rows` only, and then the
        last layer's output projection and MLP run for those rows alone."""
        config = self.config
        self.scope.layer = -1
        rows = Rows(pack.runs, pack, self.rotary(pack.positions), cache)
        residual, delta = self.embed(pack, bank), None
        for i, weights in enumerate(self.weights.layers):
            residual, delta = _enter_layer(self.scope, i, residual, delta)
            last = only_labels and i == config.num_hidden_layers - 1
            residual, delta = self.layer(i, weights, rows, bank, residual, delta, last)
        residual, delta = _enter_layer(self.scope, config.num_hidden_layers, residual, delta)
        runs = pack.labels.row_runs if only_labels else pack.runs
        return self.norm("final_norm", -1, self.weights.final_norm, bank, runs, residual, delta)[0]

    def embed(self, pack: Pack, bank: AdapterBank) -> Tensor:
        """Rows of the embedding, scaled where the family does, with the bank's virtual tokens in their places."""
        tokens = pack.tokens.clamp_min(0)
        with self.scope.within(owner="adapter"):
            own = bank.embed(tokens, pack.runs)
        hidden = self.weights.embed.index_select(0, tokens) if own is None else own
        if self.config.embedding_scale != 1.0:
            hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=hidden.dtype)
        if not pack.virtual_rows.numel():
            return hidden
        with self.scope.within(owner="adapter"):
            virtual = bank.virtual_embeddings().index_select(0, pack.virtual_index)
            return hidden.index_copy(0, pack.virtual_rows, virtual.to(hidden.dtype))

    def layer(
        self,
        i: int,
        weights: LayerWeights,
        rows: Rows,
        bank: AdapterBank,
        residual: Tensor,
        delta: Tensor | None,
        last: bool,
    ) -> tuple[Tensor, Tensor]:
        """One block: takes and gives (residual stream, what the block before still has to add to it)."""
        normed, residual = self.norm("input_norm", i, weights.input_norm, bank, rows.runs, residual, delta, site="qkv")

        def block(normed: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            return self.block(i, weights, rows, bank, normed, residual, last)

        return self.saved.layer(i, block, normed, residual)

    def block(
        self,
        i: int,
        weights: LayerWeights,
        rows: Rows,
        bank: AdapterBank,
        normed: Tensor,
        residual: Tensor,
        last: bool,
    ) -> tuple[Tensor, Tensor]:
        """A layer after its first norm."""
        delta = self.attention(i, weights, rows, bank, normed)
        runs = rows.runs
        if last:
            runs, picked = rows.pack.labels.row_runs, rows.pack.labels.rows
            # Distinct but for padding, whose gradients are exact zeros: their sums need no order.
            delta, residual, normed = (x.index_select(0, picked) for x in (delta, residual, normed))
        delta = self.linear("o", i, weights.o, weights.o_bias, bank, runs, delta)
        delta = self.branch("attention", i, bank, normed, delta, runs)
        if weights.attention_post_norm is not None:
            delta, _ = self.norm("attention_post_norm", i, weights.attention_post_norm, bank, runs, delta)
        normed, residual = self.norm("mlp_norm", i, weights.mlp_norm, bank, runs, residual, delta, site="gate_up")
        delta = self.mlp(i, weights, bank, runs, normed)
        delta = self.branch("mlp", i, bank, normed, delta, runs)
        if weights.mlp_post_norm is not None:
            delta, _ = self.norm("mlp_post_norm", i, weights.mlp_post_norm, bank, runs, delta)
        return residual, delta

    def branch(self, place: str, i: int, bank: AdapterBank, entered: Tensor, delta: Tensor, runs: TokenRuns) -> Tensor:
        """What the attention or the MLP adds to the residual stream, as the bank changes it."""
        if not bank.has_branches:
            return delta
        with self.scope.within(owner="adapter"):
            return bank.branch(i, place, entered, delta, runs)

    def attention(self, i: int, weights: LayerWeights, rows: Rows, bank: AdapterBank, normed: Tensor) -> Tensor:
        """Fused projections, head norms, rotary embedding and attention over the pack: [N, H d]."""
        qkv = self.linear("qkv", i, weights.qkv, weights.qkv_bias, bank, rows.runs, normed)
        shape = self.shapes[i]
        cos, sin = rows.rotary[self.rope_theta(i)]
        if weights.q_norm is not None and weights.k_norm is not None:
            norms, plain = (weights.q_norm, weights.k_norm), qkv
            qkv = self.head_norm(i, *norms, bank, rows.runs, plain)

            def turned() -> Tensor:
                return rotated(self.head_norm(i, *norms, bank, rows.runs, plain.detach()), cos, sin, shape)

            self.saved.pointwise(qkv, turned)  # once attention has turned them
        prefix = bank.prefix(i)
        if rows.cache is not None:
            return rows.cache.attend(i, qkv, cos, sin, shape, prefix)
        spare = bank.spare(i, "o")
        return rotary_attention(
            qkv,
            cos,
            sin,
            rows.pack.layout,
            shape,
            prefix=prefix,
            spare=spare,
            grad_spare=bank.spare(i, "qkv"),
        )

    def head_norm(
        self, i: int, q_weight: Tensor, k_weight: Tensor, bank: AdapterBank, runs: TokenRuns, qkv: Tensor
    ) -> Tensor:
        """Norm of each query and key head; run by run where the bank has weights of its own."""
        heads = self.config.num_attention_heads, self.config.num_key_value_heads
        options: dict[str, Any] = {
            "heads": heads,
            "eps": self.config.rms_norm_eps,
            "offset": self.config.norm_offset,
        }
        tuned_q, tuned_k = bank.norm(i, "q_norm"), bank.norm(i, "k_norm")
        if tuned_q is None and tuned_k is None:
            return head_norm(qkv, q_weight, k_weight, **options)
        q = q_weight.expand(bank.num_runs, -1) if tuned_q is None else tuned_q
        k = k_weight.expand(bank.num_runs, -1) if tuned_k is None else tuned_k
        pieces = zip(runs.split(qkv), q.unbind(0), k.unbind(0), strict=True)
        return torch.cat([head_norm(*piece, **options) for piece in pieces])

    def mlp(self, i: int, weights: LayerWeights, bank: AdapterBank, runs: TokenRuns, normed: Tensor) -> Tensor:
        """Gated MLP: [N, D]."""
        gate_up = self.linear("gate_up", i, weights.gate_up, None, bank, runs, normed)
        spare, grad_spare, scale = bank.spare(i, "down"), bank.spare(i, "gate_up"), bank.glu_scale(i)
        activation, spares = self.config.activation, {"spare": spare, "grad_spare": grad_spare}

        def gated(gate_up: Tensor) -> Tensor:
            return glu(gate_up, activation, scale=scale, run_offsets=runs.offsets, **spares)

        down = self.down("glu_down", i, "down", gate_up, bank, runs) if scale is None else None
        plain = scale is None and not bank.replaces_products
        edits = joined(gate_up, lambda: bank.linear(i, "down")) if plain else None
        if edits is not None:
            self.saved.before_last_product()
            return glu_linear(
                gate_up, activation, weights.down, edits, runs, border=spare, grad_spare=grad_spare, down=down
            )
        if down is None:
            inner = gated(gate_up)
        else:
            self.made = inner, _ = glu_down(gate_up, activation, down, **spares)
        self.saved.pointwise(inner, lambda: gated(gate_up.detach()))
        self.saved.before_last_product()
        return self.linear("down", i, weights.down, None, bank, runs, inner)

    def linear(
        self,
        site: str,
        i: int,
        weight: Weight,
        bias: Tensor | None,
        bank: AdapterBank,
        runs: TokenRuns,
        x: Tensor,
    ) -> Tensor:
        """Product with the weight of a site and the bank's edits of it, or the bank's own product."""
        if bank.replaces_products:
            with self.scope.within(owner="adapter"):
                own = bank.product(i, site, x, weight, bias, runs)
            if own is not None:
                return own
        border = bank.spare(i, site)
        room = border if x.stride(0) > x.shape[1] else 0  # rows picked for the labels come without spare columns
        u = self.made[1] if self.made is not None and self.made[0] is x else None
        self.made = None
        return adapted_linear(x, weight, bias, bank.linear(i, site), runs, x_spare=room, border=border, u=u)

    def down(self, producer: str, i: int, site: str, rows: Tensor, bank: AdapterBank, runs: TokenRuns) -> Down | None:
        """What the producer of a product's input is to make of it beside; only where all that it makes is kept, for
        its sums are not those of the plain operators to the bit."""
        columns = getattr(self.weights.layers[i], site).shape[1]
        spare = bank.spare(i, site) if self.activations == "keep" else 0
        return down_of(producer, rows, columns, spare, lambda: bank.linear(i, site), runs)

    def norm(
        self,
        name: str,
        i: int,
        weight: Tensor,
        bank: AdapterBank,
        runs: TokenRuns,
        residual: Tensor,
        delta: Tensor | None = None,
        *,
        site: str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Norm of residual + delta and that sum; `site` names the product that reads the normed rows."""
        tuned = bank.norm(i, name)

        def normed(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            return rms_norm(
                x,
                weight if tuned is None else tuned,
                eps=self.config.rms_norm_eps,
                offset=self.config.norm_offset,
                residual=residual,
                run_offsets=runs.offsets,
                spare=0 if site is None else bank.spare(i, site),
            )

        x, more = (residual, None) if delta is None else (delta, residual)
        down = None
        if site is not None and tuned is None:
            down = self.down("rms_norm_down", i, site, residual, bank, runs)
        if down is not None and site is not None:
            eps, offset = self.config.rms_norm_eps, self.config.norm_offset
            y, total, u = rms_norm_down(
                x, weight, down, eps=eps, offset=offset, residual=more, spare=bank.spare(i, site)
            )
            self.made = y, u
            return y, total
        y, total = normed(x, more)
        self.saved.pointwise(y, lambda: normed(total.detach(), None)[0])
        return y, total

    def attention_shape(self, i: int) -> AttentionShape:
        """Heads and score options of a layer."""
        config = self.config
        return AttentionShape(
            num_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=config.softmax_scale,
            window=config.window(i),
            softcap=config.attention_softcap,
        )

    def rope_theta(self, i: int) -> float:
        """Rotary base of a layer: the local one on sliding-window layers, where the family has one."""
        local = self.config.rope_local_theta
        return local if local is not None and self.config.window(i) is not None else self.config.rope_theta

    def rotary(self, positions: Tensor) -> dict[float, tuple[Tensor, Tensor]]:
        """cos and sin [N, d / 2] for each rotary base the layers use."""
        return {theta: angles(positions, frequencies) for theta, frequencies in self.frequencies.items()}

    def _frequencies(self, theta: float) -> Tensor:
        scaling = self.config.rope_scaling if theta == self.config.rope_theta else None
        return inverse_frequencies(self.config.head_dim, theta, scaling).to(self.device)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """theta ** (-2i / d) for i < d / 2, in fp32, scaled where the config says so (Llama 3.1: long waves are
    stretched by `factor`, those between the two limits by a blend)."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    waves = 2 * math.pi / frequencies
    ratio = scaling.original_max_position_embeddings / waves
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = ((ratio - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _runs_of(rows: Sequence[int], runs: TokenRuns) -> TokenRuns:
    """Whose the picked rows are; they ascend, so each run's still lie together."""
    return TokenRuns(offsets=tuple(bisect_left(rows, bound) for bound in runs.offsets))


class _EnterLayer(torch.autograd.Function):
    """Passes the stream through and tells the scope which layer runs: i going forward, i - 1 going back; where a
    dispatch mode asks."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, delta: Tensor | None, scope: Scope, i: int) -> Any:
        ctx.scope, ctx.layer = scope, i
        ctx.set_materialize_grads(False)
        return residual, delta

    @staticmethod
    def backward(ctx: Any, dresidual: Tensor | None, ddelta: Tensor | None) -> Any:
        ctx.scope.layer = ctx.layer - 1
        return dresidual, ddelta, None, None


def _enter_layer(scope: Scope, i: int, residual: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scope.layer = i
    if not watched() or not (residual.requires_grad or (delta is not None and delta.requires_grad)):
        return residual, delta
    result: tuple[Tensor, Tensor | None] = apply(_EnterLayer, residual, delta, scope, i)
    return result
