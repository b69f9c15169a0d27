"""Results of the commonest operators on the meta device, where PyTorch's own shape functions are slow.

PyTorch works these out in Python and imports its compiler to do so, which takes seconds. Only dense floating tensors
are handled here, whose rule is plain: broadcast sizes, promoted type, rows one after another. All else is left to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_SAME_TYPE = frozenset(("clamp_min", "neg", "relu"))
_UNARY = frozenset(("cos", "sin", "tanh", "sigmoid", "exp", "sqrt", "rsqrt", "reciprocal", "square", "silu"))
_BINARY = frozenset(("add", "sub", "mul", "div", "rsub", "pow"))


def quick_shape(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> Tensor | None:
    """The result of a call without its values, or None where PyTorch is to say."""
    if func.namespace != "aten" or not args:
        return None
    name = func._opname
    if name in ("empty_like", "ones_like", "zeros_like"):
        return _like(args[0], options)
    if name in _SAME_TYPE:
        return _like(args[0], {})
    if name in _BINARY or name in _UNARY:
        return _pointwise([value for value in args[:2] if isinstance(value, Tensor)])
    if name == "linalg_vector_norm" and len(args) == 3 and args[0].is_meta and _plain(args[0]):
        return torch.empty(
            [n for i, n in enumerate(args[0].shape) if i not in args[2]], dtype=args[0].dtype, device="meta"
        )
    if name in ("cat", "stack") and isinstance(args[0], (list, tuple)):
        return _joined(list(args[0]), args[1] if len(args) > 1 else 0, new_dimension=name == "stack")
    return None


def _plain(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and (tensor.is_contiguous() or tensor.dim() == 1)


def _like(source: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    dense = source.is_contiguous() or options.get("memory_format") is torch.contiguous_format
    if not source.is_meta or not dense or options.get("device") is not None:
        return None
    return torch.empty(source.shape, dtype=options.get("dtype") or source.dtype, device="meta")


def _pointwise(sources: list[Tensor]) -> Tensor | None:
    if not any(t.is_meta for t in sources) or not all(_plain(t) for t in sources):
        return None
    shape = [max(sizes) if 0 not in sizes else 0 for sizes in _columns([t.shape for t in sources])]
    dtype = sources[0].dtype if len(sources) == 1 else torch.result_type(*sources)
    return torch.empty(shape, dtype=dtype, device="meta")


def _columns(shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Sizes of several shapes that meet in a dimension, aligned at the last one."""
    longest = max(map(len, shapes))
    padded = [(1,) * (longest - len(shape)) + tuple(shape) for shape in shapes]
    return list(zip(*padded, strict=True))


def _joined(sources: list[Tensor], dim: int, *, new_dimension: bool) -> Tensor | None:
    first = sources[0]
    if not first.is_meta or any(t.dtype != first.dtype or t.dim() != first.dim() for t in sources):
        return None
    if not all(_plain(t) for t in sources):
        return None
    shape = list(first.shape)
    if new_dimension:
        shape.insert(dim % (first.dim() + 1), len(sources))
    else:
        dim %= first.dim()
        shape[dim] = reduce(lambda total, t: total + t.shape[dim], sources, 0)
    return torch.empty(shape, dtype=first.dtype, device="meta")
