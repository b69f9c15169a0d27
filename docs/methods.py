"""Writes docs/methods.md, a table of every method, from the methods themselves: `python docs/methods.py`."""

import dataclasses
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from peftdyno.engine.adapters import METHODS
from peftdyno.engine.adapters.bank import AdapterBank
from peftdyno.engine.adapters.method import Method
from peftdyno.engine.adapters.peft_format import OWN_PREFIX
from peftdyno.engine.builtin_configs import builtin_config, find_builtin
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError
from peftdyno.engine.families import family_of
from peftdyno.engine.merge import merge_adapter
from peftdyno.engine.weights import empty_weights

PAGE = Path(__file__).with_name("methods.md")
MODELS = ("llama-3-8b", "llama-3.2-1b", "mistral-7b", "gemma-3-1b", "qwen3-1.7b")
"""The models of PEFT-Bench, by short name."""
HOOKS = {
    "linear": "outputs of projections",
    "product": "products with weights",
    "glu_scale": "inner activation of the MLP",
    "norm": "weights of norms",
    "branch": "outputs of attention and MLP",
    "embed": "embedding",
    "head": "head",
    "prefix": "keys and values before every sequence",
    "virtual_embeddings": "embeddings before every sequence",
}
"""Hook of Method -> what a method that overrides it acts on."""
FORMS: dict[str, Method] = {
    **{name: METHODS[name]() for name in sorted(METHODS)},
    "ia3 `feedforward=False`": METHODS["ia3"](feedforward=False),
}
"""Rows of the counts: every method at its defaults, and IA3 as PEFT-Bench's published runs had it."""

INTRO = """\
# Methods

Written by `python docs/methods.py` from the classes under `engine/adapters/`; run it again when one of them
changes. Every figure here is computed from the methods' parameters on the models' published shapes.
"""
NOTES = {
    "Defaults": "The settings that the counts below belong to.",
    "Trainable parameters": (
        "Of one run, at the defaults. The published counts for IA3 belong to `feedforward=False`, where down_proj "
        "is scaled at its output."
    ),
    "Values stored": "In the adapter file of one run. An encoder is not stored, only what comes out of it.",
    "Values read by inference": "Beside the base's or instead of them, by one unmerged adapter; none once merged.",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]], align: str = "---") -> str:
    """A Markdown table; all columns but the first are aligned as told."""
    head = list(head)
    lines = [head, ["---", *[align] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def summary(cls: type[Method]) -> str:
    """First paragraph of the docstring of a method's module: the equation and its source."""
    paragraph = (sys.modules[cls.__module__].__doc__ or "").partition("\n\n")[0]
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", " ".join(paragraph.split()))


def acts_on(method: Method) -> str:
    """What its hooks act on, and the modules that its parameters belong to on any of the models."""
    hooks = [text for hook, text in HOOKS.items() if getattr(type(method), hook) is not getattr(Method, hook)]
    if not hooks:
        raise ValueError(f"method '{method.name}' overrides none of {', '.join(HOOKS)}; add its hook to HOOKS")
    if method.root() is not None:
        return ", ".join(hooks)
    names = [name.split(".") for model in MODELS for name in method.parameters(config_of(model))]
    modules = dict.fromkeys(path[2] if path[0] == "layers" else path[0] for path in names)
    return f"{', '.join(hooks)}: {' '.join(f'`{module}`' for module in modules)}"


def config_of(model: str) -> DecoderConfig:
    """Shape of a model by its short name."""
    config = builtin_config(model)
    assert config is not None, model
    return config


def title(model: str) -> str:
    """Name on the hub of the model whose weights are taken."""
    entry = find_builtin(model)
    assert entry is not None, model
    return entry.hub_ids[0]


def refusal(method: Method, model: str) -> str:
    """Why a method cannot be folded into a model, tried on weights without values; empty where it can."""
    config = config_of(model)
    weights = empty_weights(config)
    bank = AdapterBank.create(config, [method], [0], weights)
    try:
        merge_adapter(config, weights, family_of(config), bank, 0)
    except UserError as error:
        return str(error)
    return ""


def mergeable(method: Method) -> str:
    """Yes, no and why, or the models that refuse and why."""
    refusals = {model: text for model in MODELS if (text := refusal(method, model))}
    if not refusals:
        return "yes"
    if type(method).merge is Method.merge:
        return f"no: {method.unmergeable}"
    return "yes, but " + "; ".join(f"{model}: {text}" for model, text in refusals.items())


def peft(cls: type[Method]) -> str:
    """PEFT's name of the method, or that of the form that PEFT cannot read."""
    return f"`{cls.peft_type}`" if cls.peft_type else f"no, own form `{OWN_PREFIX}{cls.name.upper()}`"


def overview() -> str:
    """One row a method."""
    head = ("method", "equation and source", "acts on", "learning rate", "merged into the base", "PEFT type")
    rows = (
        (name, summary(cls), acts_on(cls()), f"{cls.learning_rate:g}", mergeable(cls()), peft(cls))
        for name, cls in sorted(METHODS.items())
    )
    return table(head, rows)


def defaults() -> str:
    """Settings of every method; those that are empty or None are left out."""
    rows = []
    for name, cls in sorted(METHODS.items()):
        values = {field.name: getattr(cls(), field.name) for field in dataclasses.fields(cls)}
        shown = {key: value for key, value in values.items() if value not in (None, "", (), {})}
        rows.append((name, " ".join(f"`{key}={setting(value)}`" for key, value in shown.items()) or "none"))
    return table(("method", "settings"), rows)


def setting(value: object) -> str:
    """A value as a reader writes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def counts(count: Callable[[Method, DecoderConfig], int]) -> str:
    """One row a form, one column a model."""
    rows = ((name, *(f"{count(form, config_of(model)):,}" for model in MODELS)) for name, form in FORMS.items())
    return table(("method", *map(title, MODELS)), rows, align="---:")


def page() -> str:
    """The whole page."""
    sections = {
        "Defaults": defaults(),
        "Trainable parameters": counts(lambda method, config: method.trainable_count(config)),
        "Values stored": counts(lambda method, config: method.stored_count(config)),
        "Values read by inference": counts(lambda method, config: method.inference_count(config)),
    }
    parts = [f"## {name}\n\n{NOTES[name]}\n\n{text}\n" for name, text in sections.items()]
    return "\n".join([INTRO, overview() + "\n", *parts])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
