"""Matrix products: one rule for mm, addmm, bmm, baddbmm, mv, addmv.

Owns: lowering a product to `Outer`, whichever operand is the weight.
Does not know: modules. `nn.Linear`, `F.linear`, `x @ W` and einsum all arrive here.
"""

from collections.abc import Collection
from math import prod

import torch
from torch import Tensor

from pergrad.factors import Dense, Factor, Outer, Summed
from pergrad.graph.layout import reshape
from pergrad.rules.positions import outer, partition, reduced, rows_by_id
from pergrad.rules.registry import ADDED, Operand, Served, Situation, rule

_LEFT = {"mm": 0, "addmm": 1}  # the input that is the left matrix; the right one follows


def data_input(name: str, operands: Collection[int]) -> int | None:
    """The input from which a product with a weight on the right takes its data."""
    left = _LEFT.get(name)
    return left if left is not None and left not in operands and left + 1 in operands else None


def one_for_each(columns: int, shape: tuple[int, ...]) -> bool:
    """Whether a summand of this shape is one number for each column of a product: a plain bias."""
    return shape[-1:] == (columns,) == (prod(shape),)


@rule("mm", "addmm")
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
            a, shape = use.saved(names[0]), use.operands[first + 1].shape
            if not rows.foldable:
                served[first + 1] = outer(a[:, None], scaled[:, None], rows, shape)
            else:
                left, right = rows.fold(a, 1), rows.fold(scaled, 1)
                bias = _plain_bias(use) if scale == 1 else None
                notes = use.notes(left, summed=right if bias is not None else None)
                served[first + 1] = Outer(left, right, shape, notes)
                if bias is not None:
                    served[0 if first else ADDED] = Summed(right, bias.shape, notes)
    if first in use.operands:  # (n, k) weight, (k, m) data: positions are columns
        columns = partition(layout, (1,), use.batch)
        if columns is not None:
            a, left = use.saved(names[1]).mT[:, None], scaled.mT[:, None]
            served[first] = outer(left, a, columns, use.operands[first].shape)
    return {**_bias(use), **served} if first and 0 not in served else served


def _plain_bias(use: Situation) -> Operand | None:
    """The summand, if it is one number for each column, as it is."""
    if use.name == "mm":
        return use.added
    bias = use.operands.get(0)
    if bias is None or use.tracing() or use.attr("beta") != 1:
        return None
    return bias if one_for_each(use.layout.shape[1], bias.shape) else None


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


@rule("mv", "addmv")
def vector(use: Situation) -> Served:
    """out = matrix @ vector."""
    first = 0 if use.name == "mv" else 1
    served = _bias(use) if first else {}
    g, scale = use.g, _alpha(use)
    g = g if scale == 1 else scale * g
    rows = partition(use.layout, (0,), use.batch)
    if first + 1 in use.operands and rows is not None:
        matrix_ = use.saved("self" if first == 0 else "mat")
        shape = use.operands[first + 1].shape
        served[first + 1] = outer(g[:, None, None], matrix_[:, None], rows, shape)
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
