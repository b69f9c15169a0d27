"""`peftdyno models`: the names of models that are built in."""

from __future__ import annotations

from peftdyno.bench.cli import options as o

PANEL = "Look"
EXAMPLES = ("peftdyno models", "peftdyno models --json")


def command(json_output: o.Json = False) -> None:
    """List the models known by name; a folder, a .gguf file or another hub id serves as well."""
    from peftdyno.bench.cli.console import print_json, print_table
    from peftdyno.engine.builtin_configs import BUILTIN_CONFIGS
    from peftdyno.engine.families import config_from_hf
    from peftdyno.engine.weights import parameter_count

    rows = []
    for entry in BUILTIN_CONFIGS:
        count = parameter_count(config_from_hf(entry.fields))
        rows.append((entry.short_names[0], entry.fields["model_type"], f"{count:,}", entry.hub_ids[0]))
    if json_output:
        names = ("name", "family", "parameters", "hub_id")
        plain = [dict(zip(names, row, strict=True)) for row in rows]
        print_json([{**row, "parameters": int(row["parameters"].replace(",", ""))} for row in plain])
    else:
        print_table(("model", "family", "parameters", "weights from"), rows)
