"""Family: how one line of published models names its config fields and its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peftdyno.engine.config import DecoderConfig

LLAMA_NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "input_norm": "model.layers.{layer}.input_layernorm",
    "q_proj": "model.layers.{layer}.self_attn.q_proj",
    "k_proj": "model.layers.{layer}.self_attn.k_proj",
    "v_proj": "model.layers.{layer}.self_attn.v_proj",
    "o_proj": "model.layers.{layer}.self_attn.o_proj",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "gate_proj": "model.layers.{layer}.mlp.gate_proj",
    "up_proj": "model.layers.{layer}.mlp.up_proj",
    "down_proj": "model.layers.{layer}.mlp.down_proj",
}
"""Site name -> module path in a checkpoint, as most families have it."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One line of models: which configs it reads and what its tensors are called.

    ``names`` maps our site names (``q_proj``, ``input_norm``, ``embed``, ...) to module paths of the
    checkpoint, with ``{layer}`` for the layer index. ``prefixes`` are alternative beginnings that
    some checkpoints have in place of ``model.``; tensors that begin with one of ``ignored`` belong
    to parts which the text decoder does not have.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
    to_hf: Callable[[DecoderConfig], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=lambda: LLAMA_NAMES)
    prefixes: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def module_name(self, site: str, layer: int = 0) -> str:
        """Path of a site's module in the checkpoint, e.g. ``model.layers.3.self_attn.q_proj``."""
        return self.names[site].format(layer=layer)

    def tensor_name(self, part: str, layer: int = 0) -> str:
        """Name of a tensor given as ``site.weight`` or ``site.bias``."""
        site, kind = part.rsplit(".", 1)
        return f"{self.module_name(site, layer)}.{kind}"

    def canonical_name(self, tensor: str) -> str | None:
        """Name of a checkpoint's tensor with alternative prefixes resolved; None if it is to be ignored."""
        for found, meant in self.prefixes:
            if tensor.startswith(found):
                tensor = meant + tensor.removeprefix(found)
                break
        # Early Llama checkpoints store the rotary frequencies, which follow from the config.
        ignored = tensor.startswith(self.ignored) or tensor.endswith(".rotary_emb.inv_freq")
        return None if ignored else tensor
