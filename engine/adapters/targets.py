"""Which modules of a decoder a method acts on: a kind in every layer, or one by one; and the same in PEFT's words.

A target is a kind (`q_proj`, `input_norm`) or one module (`layers.3.q_proj`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftdyno.engine.adapters.method import MODULES
from peftdyno.engine.config import DecoderConfig
from peftdyno.engine.errors import UserError, unknown
from peftdyno.engine.families.family import Family
from peftdyno.engine.weights import PARTS, has_field

if TYPE_CHECKING:
    from peftdyno.engine.adapters.peft_reader import AdapterFields

Place = tuple[int, str]
"""(layer, kind) of one module; the layer is -1 for what stands outside the layers."""

NORMS = tuple(name for name in PARTS if name.endswith("norm"))
"""Every norm a layer may have."""


def linear_places(config: DecoderConfig) -> tuple[Place, ...]:
    """Every projection, layer by layer."""
    return tuple((layer, module) for layer in range(config.num_hidden_layers) for module in MODULES)


def norm_places(config: DecoderConfig) -> tuple[Place, ...]:
    """Every norm that the config has, layer by layer, and the final one."""
    kinds = [name for name in NORMS if has_field(config, name)]
    inner = [(layer, name) for layer in range(config.num_hidden_layers) for name in kinds]
    return (*inner, (-1, "final_norm"))


def place_name(place: Place) -> str:
    """`layers.3.q_proj`, or the kind alone outside the layers; parameters begin with it."""
    layer, kind = place
    return kind if layer < 0 else f"layers.{layer}.{kind}"


def check_targets(field: str, targets: Iterable[str], kinds: Sequence[str]) -> None:
    """UserError for a target whose kind is unknown."""
    for target in targets:
        kind = re.sub(r"^layers\.\d+\.", "", target)
        if kind not in kinds:
            raise unknown(f"{field} entry", target, kinds)


def chosen_places(
    places: Sequence[Place], targets: Sequence[str], layers: Sequence[int] | None = None
) -> tuple[Place, ...]:
    """The places that the targets name, within `layers` where given. UserError for a target that names none."""
    for target in targets:
        if not any(target in (place[1], place_name(place)) for place in places):
            raise UserError(f"target '{target}' names no module of this model")
    last = max(layer for layer, _ in places)
    if layers is not None and (missing := [layer for layer in layers if not 0 <= layer <= last]):
        raise UserError(f"layers_to_transform has {missing[0]}; the model's layers are 0 to {last}")
    found = tuple(
        place
        for place in places
        if (place[1] in targets or place_name(place) in targets) and (layers is None or place[0] in layers)
    )
    if not found:
        raise UserError(f"targets {', '.join(targets) or '(none)'} name no module of this model")
    return found


def check_pattern(field: str, pattern: Mapping[str, Any], places: Sequence[Place]) -> None:
    """UserError for an entry that would act on none of the places."""
    names = {name for place in places for name in (place[1], place_name(place))}
    for name in pattern:
        if name not in names:
            raise UserError(
                f"{field} entry '{name}' is none of the adapted modules; add it to the targets or remove it"
            )


def pattern_value(pattern: Mapping[str, Any], place: Place, default: Any) -> Any:
    """The value of a place: its own entry, else its kind's, else the default."""
    return pattern.get(place_name(place), pattern.get(place[1], default))


def grouped(
    places: Sequence[Place], values: Mapping[Place, Any], default: Any, name: Callable[[Place], str]
) -> dict[str, Any]:
    """The shortest pattern that gives each place its value: a kind where all of its places agree, else `name`."""
    single: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(kind for _, kind in places):
        members = [place for place in places if place[1] == kind]
        found = {values.get(place, default) for place in members}
        if len(found) > 1:
            single.update({name(place): values[place] for place in members if values.get(place, default) != default})
        elif found != {default}:
            kinds[kind] = found.pop()
    return {**single, **kinds}


def targets_of(places: Sequence[Place], chosen: Iterable[Place]) -> tuple[str, ...]:
    """The targets that name exactly the chosen places."""
    return tuple(grouped(places, dict.fromkeys(chosen, True), False, place_name))


def module_path(family: Family, place: Place) -> str:
    """Path of a module in the checkpoint."""
    return family.module_name(place[1], max(place[0], 0))


def peft_name(family: Family, place: Place, suffix: str) -> str:
    """Name of a module's tensor in an adapter's file."""
    return f"base_model.model.{module_path(family, place)}.{suffix}"


def peft_pattern(family: Family, places: Sequence[Place], values: Mapping[Place, Any], default: Any) -> dict[str, Any]:
    """A pattern over PEFT's module names, of which a module matches at most one."""
    found = grouped(places, values, default, lambda place: module_path(family, place))
    return {_peft_kind(family, key): value for key, value in found.items()}


def peft_targets(family: Family, places: Sequence[Place], chosen: Iterable[Place]) -> list[str]:
    """PEFT's `target_modules`."""
    return list(peft_pattern(family, places, dict.fromkeys(chosen, True), False))


def _peft_kind(family: Family, key: str) -> str:
    return family.names[key].rsplit(".", 1)[-1] if key in family.names else key


def read_targets(
    fields: AdapterFields, places: Sequence[Place], family: Family
) -> tuple[tuple[str, ...], tuple[int, ...] | None]:
    """Our targets and layers out of PEFT's `target_modules`, `exclude_modules`, `layers_to_transform`.

    UserError where PEFT's rules choose a module that is not among `places`, or none.
    """
    wanted, excluded = fields.take("target_modules"), fields.take("exclude_modules")
    layers = _read_layers(fields)
    fields.neutral("layers_pattern", None, [], "", "layers", ["layers"])
    if wanted is None:
        raise fields.error("target_modules", wanted, "a list of modules or a regular expression")
    chosen = [
        place
        for place in _all_places(places, family)
        if _is_target(fields, module_path(family, place), wanted, place[0], layers)
        and not (excluded and _names(fields, "exclude_modules", module_path(family, place), excluded))
    ]
    for place in chosen:
        if place not in places:
            raise fields.error("target_modules", wanted, f"modules other than {module_path(family, place)}")
    if not chosen:
        raise fields.error("target_modules", wanted, f"at least one module of a {family.name} model")
    if layers is not None and all(layer in layers for layer, _ in chosen):
        return targets_of([place for place in places if place[0] in layers], chosen), layers
    return targets_of(places, chosen), None


def _all_places(places: Sequence[Place], family: Family) -> list[Place]:
    """The places, and every other module of the family that PEFT could adapt."""
    others: list[Place] = [(-1, name) for name in ("embed", "head", "final_norm")]
    for layer in sorted({layer for layer, _ in places if layer >= 0}):
        others += [(layer, name) for name in family.names if "{layer}" in family.names[name]]
    return [*places, *(place for place in others if place not in places)]


def _read_layers(fields: AdapterFields) -> tuple[int, ...] | None:
    value = fields.take("layers_to_transform")
    layers = [value] if isinstance(value, int) else value
    if layers is None or layers == []:
        return None
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise fields.error("layers_to_transform", value, "layer numbers")
    return tuple(layers)


def _is_target(fields: AdapterFields, path: str, wanted: Any, layer: int, layers: tuple[int, ...] | None) -> bool:
    """PEFT's rule: a full path is taken as it is, all else only within the chosen layers."""
    if isinstance(wanted, list) and path in wanted:
        return True
    if wanted == "all-linear":
        return path.rsplit(".", 1)[-1] in MODULES
    return _names(fields, "target_modules", path, wanted) and (layers is None or layer in layers)


def _names(fields: AdapterFields, name: str, path: str, wanted: Any) -> bool:
    """Whether a list names the path's end, or a regular expression the whole of it."""
    if isinstance(wanted, list) and all(isinstance(entry, str) for entry in wanted):
        return any(path == entry or path.endswith(f".{entry}") for entry in wanted)
    if not isinstance(wanted, str):
        raise fields.error(name, wanted, "a list of modules or a regular expression")
    try:
        return re.fullmatch(wanted, path) is not None
    except re.error as error:
        raise fields.error(name, wanted, f"a regular expression ({error})") from error
