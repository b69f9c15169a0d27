"""Closed-form FLOPs and parameters of the benchmark's methods on Llama-3-8B, from the model's sizes.

Nothing here uses the engine's accounting, so the two can be held against each other. A multiply-add counts 2.
Matrix products and attention are exact; of the pointwise work only what the adapter itself adds to the model
is counted (one operation for each value that it scales or adds to), because the base model's own is the same
with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftdyno.engine.errors import UserError, unknown

from .source import Shape, published

Convention = Literal["full", "causal"]
Phase = Literal["forward", "prefill", "decode"]
Encoder = Literal["LSTM", "MLP"]
CONVENTIONS: tuple[Convention, ...] = ("full", "causal")
PHASES: tuple[Phase, ...] = ("forward", "prefill", "decode")
TARGETS = ("k", "v", "down")
SOFT_PROMPTS = ("prompt-tuning", "p-tuning")


def _kv_width(shape: Shape) -> int:
    return shape.kv_heads * shape.head_dim


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every linear of one layer."""
    query, kv, hidden, mlp = shape.heads * shape.head_dim, _kv_width(shape), shape.hidden, shape.intermediate
    attention = {"q": (hidden, query), "k": (hidden, kv), "v": (hidden, kv), "o": (query, hidden)}
    return attention | {"gate": (hidden, mlp), "up": (hidden, mlp), "down": (mlp, hidden)}


def _encoder_matrices(encoder: Encoder) -> tuple[list[tuple[int, int]], int]:
    """(rows, columns) of the P-tuning encoder's matrices, and its number of bias values.

    LSTM: two bidirectional layers (four gates a direction, two bias vectors a gate), then two linears. MLP:
    three.
    """
    width, hidden = published().settings.p_tuning_hidden, published().shape.hidden
    if encoder == "MLP":
        return [(hidden, width), (width, width), (width, hidden)], 2 * width + hidden
    directions, gates = 2, 4
    layers = [(hidden, gates * width), (2 * width, gates * width)]
    recurrent = [(width, gates * width)] * 2
    head = [(2 * width, 2 * width), (2 * width, hidden)]
    return (layers + recurrent) * directions + head, 2 * directions * 2 * gates * width + 2 * width + hidden


def _prefix_matrices() -> list[tuple[int, int]]:
    """(rows, columns) of the two linears that make the prefix's keys and values of all layers."""
    shape, width = published().shape, published().settings.prefix_hidden
    return [(_kv_width(shape), width), (width, shape.layers * 2 * _kv_width(shape))]


def _weights(matrices: list[tuple[int, int]]) -> int:
    return sum(rows * columns for rows, columns in matrices)


def trainable_parameters(
    method: str, *, encoder: Encoder = "LSTM", down_scaled_at: Literal["input", "output"] = "output"
) -> int:
    """Trainable parameters of a method at the benchmark's settings.

    `encoder` matters to p-tuning, `down_scaled_at` (the end of down_proj that IA3 scales) to ia3; the
    defaults are what the printed counts belong to.
    """
    shape, settings, linear = published().shape, published().settings, linears(published().shape)
    if method == "base":
        return 0
    if method == "lora":
        return shape.layers * settings.lora_rank * sum(sum(linear[name]) for name in TARGETS)
    if method == "ia3":
        down = linear["down"][0 if down_scaled_at == "input" else 1]
        return shape.layers * (linear["k"][1] + linear["v"][1] + down)
    if method == "ln-tuning":
        return num_norms(shape) * shape.hidden
    if method == "bitfit":
        return shape.layers * (linear["q"][1] + linear["v"][1])
    if method == "prompt-tuning":
        return settings.prompt_tokens * shape.hidden
    if method == "p-tuning":
        matrices, biases = _encoder_matrices(encoder)
        return settings.prompt_tokens * shape.hidden + _weights(matrices) + biases
    if method == "prefix-tuning":
        matrices = _prefix_matrices()
        embedding = settings.prefix_tokens * _kv_width(shape)
        return embedding + _weights(matrices) + sum(columns for _, columns in matrices)
    raise unknown("method", method, ("base", *published().methods))


def num_norms(shape: Shape) -> int:
    """Two norms a layer and the last one."""
    return 2 * shape.layers + 1


@dataclass(frozen=True)
class Work:
    """What one pass touches: tokens computed, (query, key) pairs a head, positions with logits."""

    tokens: int
    pairs: int
    logits: int


def work(method: str, convention: Convention, phase: Phase) -> Work:
    """The work of a pass over the published number of tokens, or of one token generated after them."""
    if convention not in CONVENTIONS:
        raise UserError(f"convention is '{convention}'; it must be 'full' or 'causal'")
    if phase not in PHASES:
        raise UserError(f"phase is '{phase}'; it must be 'forward', 'prefill' or 'decode'")
    settings = published().settings
    virtual = settings.prompt_tokens if method in SOFT_PROMPTS else 0
    rows = settings.prefix_tokens if method == "prefix-tuning" else 0
    tokens = published().tokens + virtual
    if phase == "decode":
        return Work(tokens=1, pairs=tokens + 1 + rows, logits=1)
    own = tokens * tokens if convention == "full" else tokens * (tokens + 1) // 2
    return Work(tokens=tokens, pairs=own + tokens * rows, logits=tokens if phase == "forward" else 1)


def _base_flop(done: Work) -> int:
    """Linears, attention scores and mixing, and the head."""
    shape = published().shape
    linear = 2 * done.tokens * shape.layers * _weights(list(linears(shape).values()))
    attention = 2 * 2 * done.pairs * shape.heads * shape.head_dim * shape.layers
    return linear + attention + 2 * done.logits * shape.hidden * shape.vocabulary


def _unmerged_matrix_flop(method: str, tokens: int, phase: Phase, encoder: Encoder) -> int:
    """Matrix products of the adapter itself; encoders of virtual tokens run once, before the first token."""
    settings = published().settings
    if method == "lora":
        return 2 * tokens * trainable_parameters("lora")
    if phase == "decode":
        return 0
    if method == "p-tuning":
        return 2 * settings.prompt_tokens * _weights(_encoder_matrices(encoder)[0])
    if method == "prefix-tuning":
        return 2 * settings.prefix_tokens * _weights(_prefix_matrices())
    return 0


def pointwise_flop(
    method: str,
    *,
    merged: bool = False,
    phase: Phase = "forward",
    down_scaled_at: Literal["input", "output"] = "output",
) -> int:
    """Values that the adapter scales (ia3) or adds to (lora, bitfit) in one pass.

    Biases are not in the base model, so merging bitfit saves nothing; ln-tuning only replaces weights.
    """
    tokens, shape = work(method, "full", phase).tokens, published().shape
    if method == "bitfit" or (method == "ia3" and not merged):
        return tokens * trainable_parameters(method, down_scaled_at=down_scaled_at)
    if method == "lora" and not merged:
        return tokens * shape.layers * sum(linears(shape)[name][1] for name in TARGETS)
    return 0


def exact_flop(
    method: str,
    convention: Convention,
    *,
    merged: bool = False,
    phase: Phase = "forward",
    encoder: Encoder = "LSTM",
) -> int:
    """Matrix FLOPs of one sequence of the published length on Llama-3-8B, head included.

    `convention`: attention as the full square, or only over the pairs that causal attention has. `merged`:
    lora and ia3 folded into the weights, the virtual tokens' encoders run beforehand. `phase`: `forward` has
    logits at every position, as the benchmark counts; `prefill` at the last; `decode` is one token generated
    after the sequence with a KV cache. `base` is the model alone. Raises UserError for an unknown name.
    """
    if method != "base" and method not in published().methods:
        raise unknown("method", method, ("base", *published().methods))
    done = work(method, convention, phase)
    adapter = 0 if merged else _unmerged_matrix_flop(method, done.tokens, phase, encoder)
    return _base_flop(done) + adapter


def exact_tflop(method: str, convention: Convention, *, merged: bool = False, phase: Phase = "forward") -> float:
    """`exact_flop` in units of 1e12."""
    return exact_flop(method, convention, merged=merged, phase=phase) / 1e12


def extra_tflop(
    method: str,
    convention: Convention,
    *,
    merged: bool = False,
    phase: Phase = "forward",
    encoder: Encoder = "LSTM",
) -> float:
    """TFLOP above the base model, matrix and the adapter's pointwise work: PSCP's cost of inference."""
    matrix = exact_flop(method, convention, merged=merged, phase=phase, encoder=encoder)
    matrix -= exact_flop("base", convention, phase=phase)
    return (matrix + pointwise_flop(method, merged=merged, phase=phase)) / 1e12


@dataclass(frozen=True)
class ProfilerCount:
    """How the printed TFLOP of a method comes about: all in TFLOP."""

    exact: float
    norms: float
    scales: float

    @property
    def total(self) -> float:
        """The count the profiler reports."""
        return self.exact + self.norms + self.scales


def profiler_count(method: str) -> ProfilerCount:
    """The count of a profiler that lines up broadcast shapes from the left.

    A vector of n values times an activation 1 x T x n then counts n*T*n products, not T*n. That touches the
    norms of every method and the scales of ia3. The profiled LoRA model had no adapter attached.
    """
    shape, tokens = published().shape, work(method, "full", "forward").tokens
    norms = num_norms(shape) * tokens * shape.hidden**2
    widths = [linears(shape)[name][1] for name in TARGETS] if method == "ia3" else []
    scales = shape.layers * tokens * sum(width**2 for width in widths)
    exact = exact_tflop("base" if method == "lora" else method, "full")
    return ProfilerCount(exact, norms / 1e12, scales / 1e12)
