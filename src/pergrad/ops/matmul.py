"""Matrix products: one rule for mm, addmm, bmm, baddbmm, mv, addmv.

Owns: lowering a product to `Outer`, whichever operand is the weight.
Does not know: modules. `nn.Linear`, `F.linear`, `x @ W` and einsum all arrive here.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from pergrad.factors import Both, Dense, Factor, Outer, Summed
from pergrad.factors.numeric import last_squares
from pergrad.graph.layout import Layout, reduce_to, reshape, smear
from pergrad.graph.ops import (
    Op,
    Reads,
    Result,
    Shape,
    Why,
    attribute,
    declare,
    or_why,
    owners,
    resized,
    saved,
)
from pergrad.ops import sparse
from pergrad.ops.registry import AtOnce, Operand, Served, Situation, at_once, by_row, rule
from pergrad.ops.rows import outer, over_rows, partition, reduced, rows_by_id
from pergrad.ops.strewn import StrewnOuter, StrewnSum

declare("mm", needs=["self", "mat2"], reads=Reads.MISSING, weights=True)
declare("addmm", needs=["mat1", "mat2", "alpha", "beta"], reads=Reads.MISSING, weights=True)
declare("sparse_addmm", needs=["mat1", "mat2", "alpha", "beta"], reads=Reads.MISSING, weights=True)
declare("bmm", needs=["self", "mat2"], reads=Reads.MISSING, weights=True, batched=True)
declare(
    "baddbmm",
    needs=["batch1", "batch2", "alpha", "beta"],
    reads=Reads.MISSING,
    weights=True,
    batched=True,
)
declare("mv", needs=["self"], reads=Reads.MISSING, weights=True)
declare("addmv", needs=["mat", "alpha", "beta"], reads=Reads.MISSING, weights=True)
declare("linear", reads=Reads.MISSING, weights=True)


def _matrix_product(out: Layout, one: Shape | None, two: Shape | None) -> list[Result]:
    """(..., n, k) @ (..., k, m), batch dimensions equal."""
    rank = len(out.shape)
    left = None if one is None else resized(smear(out, [rank - 1]), one, Why.CONTRACTED)
    right = None if two is None else resized(smear(out, [rank - 2]), two, Why.CONTRACTED)
    return [left, right]


@owners("mm", "bmm")
def _mm(op: Op, out: Layout) -> list[Result]:
    return _matrix_product(out, op.in_shapes[0], op.in_shapes[1])


@owners("addmm", "baddbmm", "sparse_addmm")
def _addmm(op: Op, out: Layout) -> list[Result]:
    bias = op.in_shapes[0]
    first = None if bias is None else or_why(reduce_to(out, bias), Why.SHARED)
    return [first, *_matrix_product(out, op.in_shapes[1], op.in_shapes[2])]


_LEFT = {
    "mm": 0,
    "addmm": 1,
    "sparse_addmm": 1,
}  # the left matrix; the right one follows


@rule("mm", "addmm", "sparse_addmm")
def matrix(use: Situation) -> Served:
    """out = beta * bias + alpha * left @ right, two matrices."""
    names = ("self", "mat2") if use.name == "mm" else ("mat1", "mat2")
    first = _LEFT[use.name]
    served: Served = {}
    g, layout, scale = use.g, use.layout, _alpha(use)
    scaled = scale * g if scale != 1 else g
    if first + 1 in use.operands:  # (n, k) data, (k, m) weight: positions are rows
        rows = partition(layout, (0,), use.batch)
        if rows is not None:
            a, shape = use.saved(names[0], dense=False), use.operands[first + 1].shape
            if a.layout is not torch.strided:
                served[first + 1] = sparse.of_right_operand(a, scaled, layout, use.batch, shape)
            elif not rows.foldable:
                served[first + 1] = StrewnOuter((a, scaled), rows, shape)
                bias = _plain_bias(use)
                if bias is not None:
                    served[0] = StrewnSum((g,), rows, bias.shape)
            else:
                left, right = rows.fold(a, 1), rows.fold(scaled, 1)
                bias = _plain_bias(use) if scale == 1 else None
                both = None if bias is None else Both(left, right, 1)
                served[first + 1] = Outer(left, right, shape, both)
                if bias is not None:
                    served[0] = Summed(right, bias.shape, both)
    if first in use.operands:  # (n, k) weight, (k, m) data: positions are columns
        columns = partition(layout, (1,), use.batch)
        if columns is not None:
            a, shape = use.saved(names[1], dense=False), use.operands[first].shape
            if a.layout is not torch.strided:
                served[first] = sparse.of_left_operand(a, scaled, layout, use.batch, shape)
            else:
                served[first] = outer(scaled.mT[:, None], a.mT[:, None], columns, shape)
    return {**_bias(use), **served} if first and 0 not in served else served


@by_row("mm", "addmm")
def _data_on_the_left(use: Situation) -> tuple[str, ...] | None:
    first = _LEFT[use.name]
    bias = use.operands.get(0) if first else None
    if first in use.operands or (bias is not None and not over_rows(bias.shape, 2)):
        return None
    return (("self", "mat1")[first],) if first + 1 in use.operands else ()


@at_once("mm", "addmm")
def _row_by_row(
    name: str, node: Any, layout: Layout, operands: Mapping[int, Operand], batch: int
) -> AtOnce | None:
    """Row b is example b: its gradients are g ⊗ a, and g of the bias."""
    first = _LEFT[name]
    weight, wide = first + 1, layout.shape[1]
    numbers = ("alpha", "beta") if first else ()
    plain = all(attribute(name, node, number) == 1 for number in numbers)
    shapes = {weight, 0} if first else {weight}
    if not plain or weight not in operands or not operands.keys() <= shapes:
        return None
    rows, deep = partition(layout, (0,), batch), operands[weight].shape[0]
    bias = bool(first) and 0 in operands
    if bias and not _one_each_column(operands[0], wide):
        return None
    if rows is None or not rows.one_each or 0 in (wide, deep):
        return None
    data = "mat1" if first else "self"

    def norms(node: Any, g: Tensor) -> dict[int, Tensor] | None:
        a = saved(name, node, data, dense=False)
        strided = a.layout is g.layout is torch.strided
        if not strided or a.dtype != g.dtype or g.dtype not in _WIDE:
            return None
        squares = last_squares(g, g.dtype)
        of_weight = squares * last_squares(a, g.dtype)
        return {0: squares, weight: of_weight} if bias else {weight: of_weight}

    return norms


_WIDE = (torch.float32, torch.float64)


def _plain_bias(use: Situation) -> Operand | None:
    """addmm's summand, if it is one number for each column, as it is."""
    bias = use.operands.get(0) if use.name == "addmm" else None
    if bias is None or use.tracing() or use.attr("beta") != 1:
        return None
    return bias if _one_each_column(bias, use.layout.shape[1]) else None


def _one_each_column(bias: Operand, wide: int) -> bool:
    """Whether a summand has a number for each column, and no more."""
    return bias.shape[-1:] == (wide,) == (prod(bias.shape),)


@rule("bmm", "baddbmm")
def batched(use: Situation) -> Served:
    """out[i] = left[i] @ right[i] over a batch of matrices, the weight expanded or its own."""
    names = ("self", "mat2") if use.name == "bmm" else ("batch1", "batch2")
    first = 0 if use.name == "bmm" else 1
    served = _bias(use) if first else {}
    scale = _alpha(use)
    g = use.g if scale == 1 else scale * use.g
    for slot, other in ((first, names[1]), (first + 1, names[0])):
        if slot in use.operands:
            data = use.saved(other)
            weight_on_left = slot == first
            if weight_on_left:  # positions are the columns of the output
                factor = _batched(use, slot, g.mT, data.mT, swap=False, columns=True)
            else:
                factor = _batched(use, slot, g, data, swap=True, columns=False)
            if factor is not False:
                served[slot] = factor  # type: ignore[assignment]
    return served


def _batched(
    use: Situation, slot: int, g: Tensor, a: Tensor, *, swap: bool, columns: bool
) -> Factor | bool | None:
    """Factor of an operand (…, k, m) from (b, n, ·) rows; False if the layout does not fit."""
    operand: Operand = use.operands[slot]
    lead = operand.lead or (g.shape[0],)
    shared = operand.shared or (False,)
    layout = use.layout
    dims = list(range(len(lead)))
    own = [d for d in dims if not shared[d]]
    both = [d for d in dims if shared[d]]
    spread = reshape(layout, (*lead, *layout.shape[1:]))
    position = len(lead) + (1 if columns else 0)
    rows = partition(spread, (*both, position), use.batch)
    if rows is None:
        return False if both else _matrix_by_matrix(use, slot, g, a, swap=swap)
    order = [*both, len(lead), *own, len(lead) + 1]

    def lay(x: Tensor) -> Tensor:
        shaped = x.reshape(*lead, *x.shape[1:]).permute(order)
        count = 1
        for d in both:
            count *= lead[d]
        return shaped.reshape(count * x.shape[1], -1, x.shape[2])

    left, right = lay(g), lay(a)
    return outer(right, left, rows, operand.shape) if swap else outer(left, right, rows,
                                                                       operand.shape)  # fmt: skip


def _matrix_by_matrix(
    use: Situation, slot: int, g: Tensor, a: Tensor, *, swap: bool
) -> Factor | bool | None:
    """Each matrix of the operand meets one example: it was tiled to the size of the batch."""
    rows = partition(use.layout, (0,), use.batch)
    if rows is None:
        return False
    products = a.mT @ g if swap else g.mT @ a
    ids = torch.arange(len(products), device=g.device)
    return rows_by_id(ids, products, rows, use.operands[slot].shape)


@owners("mv")
def _mv(op: Op, out: Layout) -> list[Result]:
    wide = Layout((*out.shape, 1), out.owner.unsqueeze(1))
    matrix, vector = op.in_shapes
    left = None if matrix is None else resized(wide, matrix)
    return [left, None if vector is None else Why.CONTRACTED]


@owners("addmv")
def _addmv(op: Op, out: Layout) -> list[Result]:
    bias = op.in_shapes[0]
    first = None if bias is None else or_why(reduce_to(out, bias), Why.SHARED)
    rest = Op(op.node, "mv", op.out_shapes, op.in_shapes[1:], op.parameter[1:])
    return [first, *_mv(rest, out)]


@rule("mv", "addmv")
def vector(use: Situation) -> Served:
    """out = matrix @ vector."""
    first = 0 if use.name == "mv" else 1
    served = _bias(use) if first else {}
    g, scale = use.g, _alpha(use)
    g = g if scale == 1 else scale * g
    rows = partition(use.layout, (0,), use.batch)
    if first + 1 in use.operands and rows is not None:
        data = use.saved("self" if first == 0 else "mat", dense=False)
        shape = use.operands[first + 1].shape
        if data.layout is not torch.strided:
            served[first + 1] = sparse.of_right_operand(data, g, use.layout, use.batch, shape)
        else:
            served[first + 1] = outer(g[:, None, None], data[:, None], rows, shape)
    return served


def _alpha(use: Situation) -> float:
    return 1 if use.name in ("mm", "bmm", "mv") else use.attr("alpha")


def _bias(use: Situation) -> Served:
    """The summand of addmm and its kin: beta times the cotangent, summed where it broadcasts."""
    if 0 not in use.operands:
        return {}
    beta = use.attr("beta")
    factor = reduced(use.g, use.layout, use.operands[0].shape, use.batch)
    return {0: factor if beta == 1 else Dense(factor.values * beta)}


@owners("linear")
def _linear(op: Op, out: Layout) -> list[Result]:
    data, weight, *bias = op.in_shapes
    first = (
        None if data is None else resized(smear(out, [len(out.shape) - 1]), data, Why.CONTRACTED)
    )
    rest: list[Result] = [None if weight is None else Why.CONTRACTED]
    return [first, *rest, *(None if s is None else Why.SHARED for s in bias)]


declare("cdist", "euclidean_dist", reads=Reads.MISSING)


@owners("cdist", "euclidean_dist")
def _cdist(op: Op, out: Layout) -> list[Result]:
    one, two = op.in_shapes
    rank = len(out.shape)
    left = smear(out, [rank - 1])
    right = smear(out, [rank - 2])
    turned = None if right is None else Layout(right.shape, right.owner.transpose(-1, -2))
    return [
        None if one is None else resized(left, one, Why.CONTRACTED),
        None if two is None else resized(turned, two, Why.CONTRACTED),
    ]
