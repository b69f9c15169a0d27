"""Cost formulas of the plain torch operators that the program uses; an operator that is not here has no cost.

Matrix products count 2 FLOPs a multiply-add; exp, log, tanh, erf, sqrt, sin and cos one each; integer and boolean
results none. Bytes are those of the tensors read and written once; a view moves none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from peftdyno.kernels.library import Cost

Formula = Callable[[Sequence[Any], Any], Cost]
"""(arguments, result) of one call -> its cost."""


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a nest of lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def moved(*values: Any) -> int:
    """Bytes of the elements of all tensors in the values."""
    return sum(t.numel() * t.element_size() for value in values for t in tensors(value))


def _free(arguments: Sequence[Any], result: Any) -> Cost:
    return Cost()


def _fill(arguments: Sequence[Any], result: Any) -> Cost:
    return Cost(bytes=moved(result))


def _copy(arguments: Sequence[Any], result: Any) -> Cost:
    return Cost(bytes=2 * moved(result))


def transferred(arguments: Sequence[Any], result: Tensor) -> bool:
    """Whether a copy came from another device: it is an input, of which the device computes nothing."""
    return any(t.device != result.device for t in tensors(list(arguments)))


def _transfer(arguments: Sequence[Any], result: Any) -> Cost:
    return Cost() if transferred(arguments, result) else _copy(arguments, result)


def _read_and_write(arguments: Sequence[Any], result: Any) -> Cost:
    return Cost(bytes=moved(list(arguments), result))


def _pointwise(flops: int) -> Formula:
    """`flops` for each element of a floating result."""

    def formula(arguments: Sequence[Any], result: Any) -> Cost:
        counted = result.numel() * flops if result.is_floating_point() else 0
        return Cost(pointwise=counted, bytes=moved(list(arguments), result))

    return formula


def _reduction(before: int = 0, *, every: bool = True) -> Formula:
    """One FLOP for each element reduced and `before` pointwise ones; `every`: of the argument, else of the result."""

    def formula(arguments: Sequence[Any], result: Any) -> Cost:
        source = arguments[0] if every else result
        n = source.numel() if source.is_floating_point() else 0
        return Cost(reduction=n, pointwise=before * n, bytes=moved(list(arguments), result))

    return formula


def _matmul(first: int, bias: bool = False) -> Formula:
    """Product of arguments `first` and the next, [..., n, k] x [..., k, m]; one addition an element with a bias."""

    def formula(arguments: Sequence[Any], result: Any) -> Cost:
        inner = arguments[first].shape[-1]
        added = result.numel() if bias else 0
        return Cost(2 * result.numel() * inner, added, 0, moved(list(arguments), result))

    return formula


def _added_rows(arguments: Sequence[Any], result: Any) -> Cost:
    """index_add: one addition for each element of the source, which is the last tensor."""
    source = tensors(list(arguments))[-1]
    return Cost(pointwise=source.numel(), bytes=moved(list(arguments)) + moved(source))


def _written_rows(arguments: Sequence[Any], result: Any) -> Cost:
    """In-place row copies: the source is read and written; the rest of the target is not touched."""
    source = tensors(list(arguments))[-1]
    return Cost(bytes=2 * moved(source) + moved(list(arguments)[2:3]))


def _picked_rows(arguments: Sequence[Any], result: Any) -> Cost:
    """What is picked is read and written, with its index."""
    return Cost(bytes=2 * moved(result) + moved(list(arguments)[1:]))


VIEWS = (
    "alias as_strided detach expand lift_fresh permute promote_types select slice split split_with_sizes squeeze t"
    " transpose unbind unsqueeze unfold view _unsafe_view _reshape_alias diagonal _local_scalar_dense is_pinned"
    " _pin_memory"
)
ALLOCATIONS = "empty empty_like empty_strided new_empty new_empty_strided"
FILLS = "arange fill_ full full_like new_full new_ones new_zeros ones ones_like scalar_tensor zero_ zeros zeros_like"
COPIES = "cat clone constant_pad_nd flip repeat repeat_interleave select_backward slice_backward stack tril triu"
POINTWISE = {
    0: "lt le gt ge eq ne logical_and logical_not logical_or bitwise_and bitwise_or bitwise_xor bitwise_not"
    " __lshift__ __rshift__ __and__ __or__ __xor__ masked_fill masked_fill_ where isfinite searchsorted",
    1: "abs add add_ ceil clamp clamp_min clamp_max cos div div_ exp exp_ floor log maximum minimum mul mul_ neg pow"
    " reciprocal relu round rsqrt rsub sign sin sqrt sqrt_ square sub sub_ tanh threshold_backward",
    2: "lerp",
    3: "addcdiv addcdiv_ addcmul addcmul_ sigmoid sigmoid_backward tanh_backward",
    4: "silu",
    5: "gelu",
    8: "silu_backward",
    12: "gelu_backward",
}


def _table() -> dict[str, Formula]:
    groups: list[tuple[str, Formula]] = [
        (VIEWS + " " + ALLOCATIONS, _free),
        (FILLS, _fill),
        (COPIES, _copy),
        ("_to_copy copy_", _transfer),
        ("index_select embedding gather index", _picked_rows),
        ("index_copy nonzero _unique2 argmax max argsort sort topk index_put scatter", _read_and_write),
        ("index_copy_ index_put_ scatter_", _written_rows),
        ("index_add index_add_ scatter_add scatter_add_", _added_rows),
        ("sum mean amax amin logsumexp any all", _reduction()),
        ("cumsum", _reduction()),
        ("linalg_vector_norm", _reduction(before=1)),
        ("_softmax", _reduction(before=3)),
        ("_log_softmax", _reduction(before=3)),
        ("_softmax_backward_data _log_softmax_backward_data", _reduction(before=3)),
        ("nll_loss_forward nll_loss_backward", _read_and_write),
        ("mm bmm", _matmul(0)),
        ("addmm baddbmm", _matmul(1, bias=True)),
    ]
    groups += [(names, _pointwise(flops)) for flops, names in POINTWISE.items()]
    return {name: formula for names, formula in groups for name in names.split()}


FORMULAS = _table()
"""Name of an aten operator without its overload -> its formula."""
