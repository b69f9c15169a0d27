"""Results of the commonest operators on the meta device, where PyTorch's own shape functions are slow.

PyTorch works these out in Python, and imports a computer algebra system or its compiler to do so, which takes seconds.
Here are the plain cases: broadcast sizes, promoted type, rows one after another. All else is left to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

Options = Mapping[str, Any]
Shape = Callable[[Sequence[Any], Options], Tensor | tuple[Tensor, ...] | None]
"""(arguments, options) of a call -> its result without values, or None where PyTorch is to say."""

UNARY = "cos exp reciprocal rsqrt sigmoid silu sin sqrt square tanh"
BINARY = "pow sigmoid_backward tanh_backward threshold_backward"
ARITHMETIC = "add mul rsub sub __and__ __lshift__ __or__ __rshift__ __xor__ bitwise_and bitwise_or bitwise_xor"
COMPARISONS = "eq ge gt le lt ne"
IN_PLACE = "add_ copy_ div_ fill_ index_add_ index_copy_ mul_ sub_ zero_"
LIKE = "empty_like ones_like zeros_like"
COPIES = "_log_softmax _log_softmax_backward_data _to_copy clamp_min clone index_add index_copy neg relu"


def quick_shape(func: Any, args: Sequence[Any], options: Options) -> Tensor | tuple[Tensor, ...] | None:
    """The result of a call without its values, or None where PyTorch is to say."""
    shape = SHAPES.get(func._opname) if func.namespace == "aten" else None
    return None if shape is None else shape(args, options)


def _ordered(tensor: Tensor) -> bool:
    """Whether rows lie one after another, with gaps, repeated or without: a result of the same sizes then has none."""
    if tensor.is_contiguous() or tensor.dim() == 1:
        return True
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1 and stride]
    return strides == sorted(strides, reverse=True)


def _empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _copy(args: Sequence[Any], options: Options) -> Tensor | None:
    """As large as the first argument."""
    source = args[0]
    plain = _ordered(source) or options.get("memory_format") is torch.contiguous_format
    if not source.is_meta or not plain or options.get("device") not in (None, source.device):
        return None
    return _empty(source.shape, options.get("dtype") or source.dtype)


def _like(args: Sequence[Any], options: Options) -> Tensor | None:
    return None if options.get("device") is not None else _copy(args, options)


def _unary(args: Sequence[Any], options: Options) -> Tensor | None:
    return _copy(args, {}) if args[0].is_floating_point() else None


def _binary(args: Sequence[Any], options: Options) -> Tensor | None:
    """Of floating tensors, which it leaves floating."""
    floating = all(t.is_floating_point() for t in args[:2] if isinstance(t, Tensor))
    return _arithmetic(args, options) if floating else None


def _arithmetic(args: Sequence[Any], options: Options) -> Tensor | None:
    """Of any tensors and numbers, to the type that they are promoted to."""
    return _pointwise([value for value in args[:2] if isinstance(value, Tensor)], torch.result_type(*args[:2]))


def _quotient(args: Sequence[Any], options: Options) -> Tensor | None:
    dtype = torch.result_type(*args[:2])
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    return None if options else _pointwise([value for value in args[:2] if isinstance(value, Tensor)], dtype)


def _comparison(args: Sequence[Any], options: Options) -> Tensor | None:
    return _pointwise([value for value in args[:2] if isinstance(value, Tensor)], torch.bool)


def _pointwise(sources: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    if not any(t.is_meta for t in sources) or not all(_ordered(t) for t in sources):
        return None
    shape = [max(sizes) if 0 not in sizes else 0 for sizes in _columns([t.shape for t in sources])]
    return _empty(shape, dtype)


def _columns(shapes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Sizes of several shapes that meet in a dimension, aligned at the last one."""
    longest = max(map(len, shapes))
    padded = [(1,) * (longest - len(shape)) + tuple(shape) for shape in shapes]
    return list(zip(*padded, strict=True))


def _in_place(args: Sequence[Any], options: Options) -> Tensor | None:
    target: Tensor = args[0]
    return target if target.is_meta else None


def _product(first: int) -> Shape:
    """Of arguments `first` and the next, [..., n, k] x [..., k, m]."""

    def shape(args: Sequence[Any], options: Options) -> Tensor | None:
        a, b = args[first], args[first + 1]
        return _empty((*a.shape[:-1], b.shape[-1]), a.dtype) if a.is_meta else None

    return shape


def _norm(args: Sequence[Any], options: Options) -> Tensor | None:
    return _reduced(args[0], args[2]) if len(args) == 3 and args[0].is_floating_point() else None


def _sum(args: Sequence[Any], options: Options) -> Tensor | None:
    source = args[0]
    dims = args[1] if len(args) > 1 and args[1] else range(source.dim())
    plain = source.is_floating_point() and not options
    return _reduced(source, dims, keep=len(args) > 2 and args[2]) if plain else None


def _reduced(source: Tensor, dims: Sequence[int], *, keep: bool = False) -> Tensor | None:
    if not source.is_meta or not _ordered(source):
        return None
    gone = {dim % source.dim() for dim in dims}
    sizes = [1 if i in gone else n for i, n in enumerate(source.shape) if keep or i not in gone]
    return _empty(sizes, source.dtype)


def _cat(args: Sequence[Any], options: Options) -> Tensor | None:
    sources = list(args[0])
    if not _alike(sources) or not sources[0].dim():
        return None
    shape, dim = list(sources[0].shape), (args[1] if len(args) > 1 else 0) % sources[0].dim()
    shape[dim] = reduce(lambda total, t: total + t.shape[dim], sources, 0)
    return _empty(shape, sources[0].dtype)


def _stack(args: Sequence[Any], options: Options) -> Tensor | None:
    sources = list(args[0])
    if not _alike(sources):
        return None
    shape = list(sources[0].shape)
    shape.insert((args[1] if len(args) > 1 else 0) % (len(shape) + 1), len(sources))
    return _empty(shape, sources[0].dtype)


def _alike(sources: Sequence[Tensor]) -> bool:
    first = sources[0]
    same = all(t.dtype == first.dtype and t.dim() == first.dim() and _ordered(t) for t in sources)
    return same and first.is_meta


def _picked(args: Sequence[Any], options: Options) -> Tensor | None:
    """index_select: rows along a dimension."""
    source, dim, index = args[:3]
    if not source.is_meta or not _ordered(source):
        return None
    shape = list(source.shape)
    shape[dim] = index.numel()
    return _empty(shape, source.dtype)


def _sliced(args: Sequence[Any], options: Options) -> Tensor | None:
    """slice_backward: as large as what was sliced."""
    return _empty(args[1], args[0].dtype) if args[0].is_meta else None


def _label_losses(args: Sequence[Any], options: Options) -> tuple[Tensor, Tensor] | None:
    """nll_loss_forward: a loss a row, or their sum or mean, and the sum of weights."""
    scores, reduction = args[0], args[3]
    if not scores.is_meta or scores.dim() != 2:
        return None
    return _empty(scores.shape[:1] if reduction == 0 else (), scores.dtype), _empty((), scores.dtype)


def _label_gradients(args: Sequence[Any], options: Options) -> Tensor | None:
    return _copy(args[1:], {})


def _new(args: Sequence[Any], options: Options) -> Tensor | None:
    plain = args[0].is_meta and options.get("device") in (None, args[0].device)
    return _empty(args[1], options.get("dtype") or args[0].dtype) if plain else None


def _arange(args: Sequence[Any], options: Options) -> Tensor | None:
    """start, end and step as far as they are given."""
    numbers = [value for value in args if isinstance(value, int)]
    if torch.device(options.get("device") or "cpu").type != "meta" or len(numbers) != len(args):
        return None
    first, last, step = (0, *numbers, 1) if len(numbers) == 1 else (*numbers, 1)[:3]
    return _empty((math.ceil((last - first) / step),), options.get("dtype") or torch.int64)


def _table() -> dict[str, Shape]:
    groups: list[tuple[str, Shape]] = [
        (UNARY, _unary),
        (BINARY, _binary),
        (ARITHMETIC, _arithmetic),
        (COMPARISONS, _comparison),
        (IN_PLACE, _in_place),
        (LIKE, _like),
        (COPIES, _copy),
        ("div", _quotient),
        ("mm bmm", _product(0)),
        ("addmm baddbmm", _product(1)),
        ("sum", _sum),
        ("linalg_vector_norm", _norm),
        ("cat", _cat),
        ("stack", _stack),
        ("index_select", _picked),
        ("slice_backward", _sliced),
        ("nll_loss_forward", _label_losses),
        ("nll_loss_backward", _label_gradients),
        ("new_empty new_zeros", _new),
        ("arange", _arange),
    ]
    return {name: shape for names, shape in groups for name in names.split()}


SHAPES = _table()
"""Name of an aten operator without its overload -> its rule."""
