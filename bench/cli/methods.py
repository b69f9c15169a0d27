"""`peftdyno methods`: what can be trained, and each method's settings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftdyno.bench.cli import options as o

PANEL = "Look"
EXAMPLES = ("peftdyno methods", "peftdyno methods lora", "peftdyno methods --json")


def command(
    name: Annotated[str | None, typer.Argument(help="One method, with all its settings.", metavar="METHOD")] = None,
    json_output: o.Json = False,
) -> None:
    """List the methods, or the settings of one that `--set METHOD.NAME=VALUE` takes."""
    from peftdyno.bench.cli.console import print_json, print_table
    from peftdyno.engine.adapters import METHODS, method_class

    chosen = METHODS if name is None else {name: method_class(name)}
    if json_output:
        print_json({key: _describe(cls) for key, cls in chosen.items()})
    elif name is None:
        rows = [
            (key, _phrase(cls), f"{cls.learning_rate:g}", cls.peft_type or "own format") for key, cls in METHODS.items()
        ]
        print_table(("method", "what it does", "learning rate", "PEFT type"), rows)
    else:
        print_table(
            ("setting", "default"), list(_describe(chosen[name])["settings"].items()), title=_phrase(chosen[name])
        )


def _phrase(cls: Any) -> str:
    """What a method's file says it is, in one line."""
    import inspect

    module = inspect.getmodule(cls)
    documented = (module.__doc__ if module is not None else None) or cls.__doc__ or ""
    return " ".join(documented.split("\n\n")[0].split())


def _describe(cls: Any) -> dict[str, Any]:
    import dataclasses

    values = cls()
    settings = {item.name: str(getattr(values, item.name)) for item in dataclasses.fields(cls)}
    return {
        "about": _phrase(cls),
        "learning_rate": cls.learning_rate,
        "weight_decay": cls.weight_decay,
        "peft_type": cls.peft_type,
        "settings": settings,
    }
