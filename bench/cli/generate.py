"""`peftdyno generate`: answer prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftdyno.bench.cli import options as o

PANEL = "Train and score"
NEEDS_ARGUMENTS = True
EXAMPLES = (
    'peftdyno generate "Name three rivers."',
    'peftdyno generate --adapter RUN/adapter --max-new-tokens 8 "Is the film good? a gorgeous film"',
)


def command(
    prompts: Annotated[list[str], typer.Argument(help="One user turn each.", metavar="PROMPT...")],
    model: o.Model = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", "-a", help="Adapter folder.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="Text of a system turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.", min=1)] = 128,
    dtype: o.Dtype = None,
    quant: o.Quant = None,
    device: o.Device = None,
    kernels: o.Kernels = None,
    pack_weights: o.PackWeights = "auto",
    threads: o.Threads = None,
    graphs: Annotated[
        str,
        typer.Option(
            "--graphs", help="Record decoding steps and replay them: auto (on a GPU), on or off.", metavar="WHEN"
        ),
    ] = "auto",
    json_output: o.Json = False,
) -> None:
    """Answer prompts greedily, with the model's chat template; several prompts share one batch."""
    from peftdyno.bench.base_model import load_base, use_hardware
    from peftdyno.bench.cli.console import print_json
    from peftdyno.bench.scoring import base_name, load_bank
    from peftdyno.engine.generate import generate
    from peftdyno.engine.pack import Sequence
    from peftdyno.engine.panels import packed_weights

    use_hardware(threads, kernels or "auto")
    name = model or (o.DEFAULT_MODEL if adapter is None else base_name(adapter))
    base = load_base(name, o.dtype(dtype), device or "auto", quant)
    bank = load_bank(base, () if adapter is None else (adapter,))
    tokenizer = base.tokenizer
    tokens = [tuple(tokenizer.prompt_ids(tokenizer.chat(prompt, system))) for prompt in prompts]
    sequences = [Sequence(tokens=ids, num_prompt=len(ids)) for ids in tokens]
    with packed_weights(base.decoder, o.pack_weights(pack_weights)):
        options = {"max_new_tokens": max_new_tokens, "eos_ids": tokenizer.eos_ids}
    made = generate(base.decoder, bank, sequences, graphs=graphs, **options)
    answers = [tokenizer.decode(ids) for ids in made]
    if json_output:
        rows = zip(prompts, answers, tokens, made, strict=True)
        print_json([{"prompt": p, "answer": a, "prompt_tokens": len(t), "new_tokens": len(n)} for p, a, t, n in rows])
    else:
        print("\n\n".join(answers))
