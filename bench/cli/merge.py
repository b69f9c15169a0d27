"""`peftdyno merge`: fold an adapter into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftdyno.bench.cli import options as o

PANEL = "Train and score"
NEEDS_ARGUMENTS = True
EXAMPLES = (
    "peftdyno merge --adapter RUN/adapter --out MODEL",
    "peftdyno merge --model smollm2-135m --adapter RUN/adapter --out MODEL --dtype bf16",
)


def command(
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="Adapter folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder for the merged model.")],
    model: o.Model = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the written weights; added up in fp32.")] = "fp32",
    json_output: o.Json = False,
) -> None:
    """Write a plain safetensors model that gives the same logits as the base model with the adapter.

    Methods that cannot be folded into the weights say why.
    """
    from peftdyno.bench.base_model import load_base
    from peftdyno.bench.cli.console import print_json
    from peftdyno.bench.scoring import base_name, load_bank
    from peftdyno.engine.merge import merge_adapter
    from peftdyno.engine.sources import DTYPES
    from peftdyno.engine.weight_files import save_model
    from peftdyno.engine.weights import empty_weights

    chosen = DTYPES[o.dtype(dtype)]
    base = load_base(model or base_name(adapter), "fp32", "cpu")
    decoder = base.decoder
    bank = load_bank(base, (adapter,))
    config = merge_adapter(decoder.config, decoder.weights, base.files.family, bank, 0)
    merged = empty_weights(config, chosen, "cpu")
    for target, weight in zip(merged.tensors(), decoder.weights.tensors(), strict=True):
        target.copy_(weight)
    save_model(out, merged, config, base.files.tokenizer_files())
    if json_output:
        print_json({"out": str(out), "model": base.files.name, "adapter": str(adapter), "dtype": o.dtype(dtype)})
    else:
        print(f"wrote {out}")
