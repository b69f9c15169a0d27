"""Launch sizes and forms of the GPU kernels: shipped for each architecture, overridden by what was measured here.

Nothing is tuned while training: a kernel takes the measured tile of its shape class where `peftdyno tune` wrote one for
this GPU and this Triton, else the shipped one. Shipped tiles are the largest tried that keep their
values in registers, but for what the limits beside a kernel allow. Where an operator can be computed in several forms,
the measured one of its shape class is taken, else the first of `FORMS`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from peftdyno.kernels import dispatch


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, warps of a program, stages of its software pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}, {self.warps} warps, {self.stages} stages"


SHIPPED: dict[str, dict[int, Tile]] = {
    "attention/64": {80: Tile(128, 64, 8, 2), 90: Tile(128, 64, 8, 3), 100: Tile(128, 64, 8, 2)},
    "attention/128": {80: Tile(128, 32, 8, 2), 90: Tile(128, 64, 8, 3), 100: Tile(128, 32, 8, 2)},
    "attention/256": {80: Tile(32, 32, 8, 2), 90: Tile(64, 32, 8, 2), 100: Tile(64, 16, 8, 2)},
    "attention/decode": {80: Tile(16, 64, 8, 2), 90: Tile(16, 64, 4, 3), 100: Tile(16, 64, 4, 3)},
    "attention/decode/256": {80: Tile(16, 32, 8, 2), 90: Tile(16, 64, 8, 2), 100: Tile(16, 64, 8, 2)},
    "attention_dq/64": {80: Tile(128, 32, 8, 2), 90: Tile(128, 64, 8, 2), 100: Tile(64, 64, 8, 2)},
    "attention_dq/128": {80: Tile(64, 64, 8, 2), 90: Tile(128, 32, 8, 3), 100: Tile(64, 32, 8, 2)},
    "attention_dq/256": {80: Tile(32, 32, 8, 1), 90: Tile(32, 32, 8, 1), 100: Tile(64, 32, 8, 1)},
    "attention_dk/64": {80: Tile(32, 64, 8, 2), 90: Tile(64, 128, 8, 2), 100: Tile(64, 64, 8, 2)},
    "attention_dk/128": {80: Tile(64, 64, 8, 2), 90: Tile(64, 64, 8, 2), 100: Tile(64, 64, 8, 2)},
    "attention_dk/256": {80: Tile(32, 32, 8, 1), 90: Tile(32, 32, 8, 1), 100: Tile(32, 32, 8, 1)},
    "lora_project": {80: Tile(32, 128, 4, 3), 90: Tile(64, 128, 8, 3), 100: Tile(64, 128, 8, 3)},
    "lora_outer": dict.fromkeys((80, 90, 100), Tile(64, 128, 4, 3)),
    "lora_add": {80: Tile(64, 128, 8, 1), 90: Tile(64, 64, 4, 1), 100: Tile(64, 64, 4, 1)},
    "lora_output_gradient": {80: Tile(64, 128, 4, 3), 90: Tile(64, 512, 8, 3), 100: Tile(64, 512, 8, 3)},
    "lora_gemm": {80: Tile(64, 128, 8, 3), 90: Tile(128, 256, 8, 3), 100: Tile(128, 256, 8, 3)},
    "lora_gemm_backward": {80: Tile(64, 128, 8, 3), 90: Tile(128, 256, 8, 3), 100: Tile(128, 256, 8, 3)},
    "glu_lora_backward": {80: Tile(32, 128, 8, 2), 90: Tile(32, 64, 4, 2), 100: Tile(16, 128, 4, 2)},
    "rms_norm_down": dict.fromkeys((80, 90, 100), Tile(16, 128, 4, 2)),
    "glu_down": {80: Tile(16, 64, 4, 2), 90: Tile(16, 128, 4, 2), 100: Tile(16, 128, 4, 2)},
    "nf4_linear": dict.fromkeys((80, 90, 100), Tile(16, 64, 4, 3)),
    "nf4_linear_backward": dict.fromkeys((80, 90, 100), Tile(32, 64, 4, 3)),
}
"""Kernel (attention's by the width of a head) -> architecture -> tile."""

SHIPPED_FP32: dict[str, Tile] = {
    "attention/64": Tile(32, 32, 8, 1),
    "attention/128": Tile(32, 16, 8, 1),
    "attention/256": Tile(32, 32, 8, 1),
    "attention/decode": Tile(16, 32, 8, 1),
    "attention/decode/256": Tile(16, 32, 8, 1),
    "attention_dq/64": Tile(32, 32, 8, 1),
    "attention_dq/128": Tile(16, 16, 8, 1),
    "attention_dq/256": Tile(16, 16, 8, 1),
    "attention_dk/64": Tile(32, 32, 8, 1),
    "attention_dk/128": Tile(32, 16, 8, 1),
    "attention_dk/256": Tile(16, 16, 8, 1),
    "lora_project": Tile(16, 64, 8, 2),
    "lora_outer": Tile(32, 64, 8, 2),
    "lora_add": Tile(32, 64, 8, 1),
    "glu_lora_backward": Tile(16, 64, 8, 1),
    "lora_gemm": Tile(32, 32, 8, 2),
    "lora_gemm_backward": Tile(32, 32, 8, 2),
    "rms_norm_down": Tile(16, 64, 4, 2),
    "glu_down": Tile(16, 64, 4, 2),
    "nf4_linear": Tile(16, 32, 4, 2),
    "nf4_linear_backward": Tile(16, 32, 4, 2),
}
"""Kernel that takes 32-bit elements -> its tile on every architecture: they are multiplied in full precision without
tensor cores, whose operands and sums all lie in registers, and fit 99 KB of shared memory."""

FORMS: dict[str, tuple[str, ...]] = {
    "lora_linear": ("bordered", "plain", "fused"),
    "lora_linear_backward": ("bordered", "plain", "fused"),
    "lora_output_gradient": ("apart", "together"),
    "glu_lora_backward": ("together", "apart"),
    "attention": ("own", "varlen", "flash-attn"),
    "attention_backward": ("own", "varlen"),
    "rms_norm_down": ("apart", "together"),
    "glu_down": ("apart", "together"),
    "nf4_linear": ("dequantise", "fused"),
    "nf4_linear_backward": ("dequantise", "fused"),
}
"""Operator -> its forms, the one taken unless measured otherwise first. A form that the operands do not allow (no
border laid, rows that no descriptor can address) gives way to the next one that they do."""

FEW = 16
FORMS_OF_FEW = {"nf4_linear": "fused"}
"""Operator -> its default on a GPU for at most FEW tokens. To dequantise first writes and reads the weight dense, 4.6
bytes an element instead of 0.6, which many tokens share and few do not."""

_trial: dict[str, Tile] = {}
_trial_form: dict[str, str] = {}
_shipped_only = False


@dataclass(frozen=True)
class Measured:
    """What a cache file holds: kernel and shape class -> tile, operator and shape class -> form."""

    tiles: dict[str, Tile] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)


_NOTHING = Measured()


@contextmanager
def trial(name: str, tile: Tile) -> Iterator[None]:
    """Within it, a kernel takes this tile for a shape class; `name` is that of `shape_class`."""
    _trial[name] = tile
    try:
        yield
    finally:
        del _trial[name]


@contextmanager
def trial_form(operator: str, form: str) -> Iterator[None]:
    """Within it, the operator takes this form for every shape."""
    assert form in FORMS[operator], (operator, form)
    _trial_form[operator] = form
    try:
        yield
    finally:
        del _trial_form[operator]


@contextmanager
def untuned() -> Iterator[None]:
    """Within it, shipped tiles and default forms hold, whatever was measured."""
    global _shipped_only
    before, _shipped_only = _shipped_only, True
    try:
        yield
    finally:
        _shipped_only = before


def architecture(device: torch.device) -> int:
    """The architecture whose shipped tiles a device takes; sm_90's in the interpreter, and of a GPU that is not at
    hand."""
    device = dispatch.meant(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return shipped_for(10 * major + minor)


def shipped_for(arch: int) -> int:
    """sm_90 and 10.x have their own tiles; all others take those of sm_80, which fit the 99 KB of shared memory that
    sm_86, sm_89 and sm_12x have and use no instruction that only a data centre's GPU has."""
    return {9: 90, 10: 100}.get(arch // 10, 80)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H200's in the interpreter, and of a GPU that is not at hand."""
    device = dispatch.meant(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tile(kernel: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tile:
    """Launch sizes of a kernel on a device for a shape and operands of a dtype; only those of 16 bits are measured."""
    if _trial and (tried := _trial.get(shape_class(kernel, shape))):
        return tried
    if dtype.itemsize > 2:
        return SHIPPED_FP32[kernel]
    tiles = measured(device).tiles
    return (tiles.get(shape_class(kernel, shape)) if tiles else None) or SHIPPED[kernel][architecture(device)]


@functools.lru_cache(4096)
def shape_class(name: str, shape: tuple[int, ...]) -> str:
    """Name of a kernel or operator with the class of a shape: its first size (tokens) rounded up to a power of two, the
    others (widths of weights, ranks, heads) as they are."""
    tokens = 1 << max(0, shape[0] - 1).bit_length()
    return f"{name}/{'x'.join(map(str, (tokens, *shape[1:])))}"


def form(operator: str, shape: tuple[int, ...], device: torch.device) -> str:
    """The form in which an operator is computed for a shape, as measured or by default."""
    if operator in _trial_form:
        return _trial_form[operator]
    forms = measured(device).forms
    if forms and (own := forms.get(shape_class(operator, shape))):
        return own
    few = dispatch.meant(device).type == "cuda" and shape[0] <= FEW
    return FORMS_OF_FEW.get(operator, FORMS[operator][0]) if few else FORMS[operator][0]


def takes(operator: str, form: str, widths: Sequence[int], device: torch.device) -> bool:
    """Whether an operator may be computed in a form at these widths: for some number of tokens it was measured so, or
    none was measured and it is the default."""
    if operator in _trial_form:
        return _trial_form[operator] == form
    tail = "x" + "x".join(map(str, widths))
    own = {f for name, f in measured(device).forms.items() if name.split("/")[0] == operator and name.endswith(tail)}
    return form in (own or FORMS[operator][:1])


def measured(device: torch.device) -> Measured:
    """What was measured on this kind of GPU; nothing in the interpreter, nor of a GPU that is not at hand."""
    device = dispatch.meant(device)
    if _shipped_only or device.type != "cuda" or not torch.cuda.is_available():
        return _NOTHING
    return _measured(_cache_file(device, os.environ.get("XDG_CACHE_HOME")))


def cache_file(device: torch.device) -> Path:
    """Where tiles and forms measured on this kind of GPU with this Triton are kept."""
    return _cache_file(device, os.environ.get("XDG_CACHE_HOME"))


@functools.cache
def _cache_file(device: torch.device, home: str | None) -> Path:
    folder = Path(home or Path.home() / ".cache") / "peftdyno" / "tiles"
    return folder / f"{_device_name(device)}-triton-{_triton_version()}.json"


@functools.cache
def _device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


@functools.cache
def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@functools.cache
def _measured(file: Path) -> Measured:
    """Contents of a cache file; raises ValueError where it cannot be read."""
    if not file.exists():
        return _NOTHING
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        kept = {k: entry for k, entry in content.items() if k.rpartition("/")[0] in SHIPPED and "tile" in entry}
        tiles = {k: Tile(**entry["tile"]) for k, entry in kept.items()}
        forms = {k: entry["form"] for k, entry in content.items() if "form" in entry}
        known = {k: f for k, f in forms.items() if f in FORMS.get(k.split("/")[0], ())}
        return Measured(tiles, known)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no tiles ({error}); delete it and run 'peftdyno tune' again") from error


def save(device: torch.device, results: dict[str, dict[str, Any]]) -> Path:
    """Add what was measured to the cache file, atomically; an entry has `tile` or `form`, and the times behind it."""
    file = cache_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    _measured(file)
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= {k: entry | ({"tile": asdict(entry["tile"])} if "tile" in entry else {}) for k, entry in results.items()}
    partial = file.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    partial.replace(file)
    _measured.cache_clear()
    return file


def picked(device: torch.device) -> dict[str, str]:
    """Every kernel's tile and every operator's form on a device, each with why: what `peftdyno env` shows."""
    found, arch = measured(device), architecture(device)
    chosen = {kernel: f"{tiles[arch]} (shipped for sm_{arch}, where not measured)" for kernel, tiles in SHIPPED.items()}
    chosen |= {name: f"{own} (measured here)" for name, own in sorted(found.tiles.items())}
    chosen |= {operator: f"{forms[0]} (default, where not measured)" for operator, forms in FORMS.items()}
    if device.type == "cuda":
        few = {f"{name}, {FEW} tokens": f"{own} (default, where not measured)" for name, own in FORMS_OF_FEW.items()}
        chosen |= few
    return chosen | {name: f"{own} (measured here)" for name, own in sorted(found.forms.items())}
