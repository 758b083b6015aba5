"""Index tensors: gather and scatter, parts of a tensor chosen by number or put in its place.

Owns: how ownership follows indices; lowering rows of a parameter that are looked up to `Rows`.
Does not know: tables of embeddings (`lookup`).
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from pergrad.graph.layout import (
    NOBODY,
    Layout,
    compressed,
    placed_along,
    reduce_to,
    reshape,
    smear,
)
from pergrad.graph.ops import (
    Op,
    Reads,
    Result,
    Shape,
    Why,
    declare,
    or_why,
    owners,
    positive,
    resized,
)
from pergrad.ops.registry import Served, Situation, rule
from pergrad.ops.rows import partition, rows_by_id

declare("gather", needs=["dim"], looks_up=True)
declare("take_along_dim", needs=["dim"])
declare("scatter", "scatter_add", "scatter_reduce", needs=["dim", "index"])


@owners("gather", "take_along_dim")
def _gather(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if not shape:
        return [Why.UNKNOWN]
    plain = smear(out, [positive(op.attr("dim"), len(shape))])
    return [Why.UNKNOWN if plain is None else _padded(plain.owner, shape)]


def _padded(owner: Tensor, shape: Sequence[int]) -> Layout:
    """Where the index is smaller than the tensor, nothing arrives at the rest."""
    for dim, size in enumerate(shape):
        if 1 < owner.shape[dim] < size:
            owner = placed_along(owner, dim, size, slice(0, owner.shape[dim]))
    return compressed(shape, owner)


@owners("scatter", "scatter_add", "scatter_reduce")
def _scatter(op: Op, out: Layout) -> list[Result]:
    """What is scattered gets the gradient of the places that it went to, one for one."""
    data, *rest = op.in_shapes
    results: list[Result] = [None if data is None else out]
    if rest:
        results.append(None if rest[0] is None else _scattered_to(op, out, rest[0]))
    return results


def _scattered_to(op: Op, out: Layout, source: Shape) -> Result:
    if not source or len(source) != len(out.shape):
        return Why.UNKNOWN
    dim, owner = positive(op.attr("dim"), len(source)), out.owner
    for d, size in enumerate(source):
        if d != dim and owner.shape[d] > 1:
            if owner.shape[d] < size:
                return Why.UNKNOWN
            owner = owner.narrow(d, 0, size)
    if owner.shape[dim] == 1:
        return resized(Layout(out.shape, owner), source)
    index = op.data("index").detach()
    if index.shape != source:
        return Why.UNKNOWN
    for d, stride in enumerate(index.stride()):
        if d != dim and owner.shape[d] == 1 and stride == 0:  # expanded, as for all features
            index = index.narrow(d, 0, 1)
    sizes = [owner.shape[d] if d == dim else size for d, size in enumerate(index.shape)]
    wide = [max(one, two) for one, two in zip(owner.shape, sizes, strict=True)]
    every = [s if d == dim else w for d, (s, w) in enumerate(zip(index.shape, wide, strict=True))]
    return compressed(source, owner.expand(wide).gather(dim, index.cpu().long().expand(every)))


declare("index_select", needs=["dim", "index"], weights=True, looks_up=True)
declare("index", needs=["indices"], weights=True, looks_up=True)
declare("unsafe_index", needs=["indices"], looks_up=True)


@owners("index_select")
def _index_select(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if op.parameter[0]:
        return [Why.CONTRACTED]
    dim = positive(op.attr("dim"), len(shape)) if shape else 0
    if not shape or out.owner.shape[dim] == 1:
        return [resized(out, shape)]
    return [_scattered(shape, out.owner, dim, op.data("index"))]


@rule("index_select")
def index_select(use: Situation) -> Served:
    """Rows of a parameter chosen along its first dimension."""
    if use.attr("dim") not in (0, -len(use.operands[0].shape)):
        return {}
    rows = partition(use.layout, (0,), use.batch)
    if rows is None:
        return {}
    return {0: rows_by_id(use.saved("index").reshape(-1).long(), use.g, rows,
                          use.operands[0].shape)}  # fmt: skip


def _scattered(shape: Shape, owner: Tensor, dim: int, index: Tensor) -> Result:
    """Owners put back where `index` took them from along `dim`."""
    target = list(owner.shape)
    target[dim] = shape[dim]
    where = [1] * owner.dim()
    where[dim] = -1
    index = index.detach().cpu().long().reshape(where).expand(owner.shape)
    return _collected(shape, target, lambda empty, how: empty.scatter_reduce(
        dim, index, owner if how == "amax" else _last(owner), how))  # fmt: skip


def _last(owner: Tensor) -> Tensor:
    """NOBODY must lose against anybody when the lowest owner is looked for."""
    return torch.where(owner == NOBODY, torch.iinfo(torch.int64).max, owner)


def _collected(
    shape: Shape, target: Sequence[int], scatter: Callable[[Tensor, str], Tensor]
) -> Result:
    highest = scatter(torch.full(list(target), NOBODY, dtype=torch.int64, device="cpu"), "amax")
    top = torch.iinfo(torch.int64).max
    lowest = scatter(torch.full(list(target), top, dtype=torch.int64, device="cpu"), "amin")
    lowest = torch.where(lowest == top, highest, lowest)
    if not torch.equal(highest, lowest):
        return Why.UNKNOWN
    return compressed(shape, highest)


@owners("index", "unsafe_index")
def _index(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if op.parameter[0]:
        return [Why.CONTRACTED]
    placed = _index_positions(op, shape)
    if placed is None:
        return [Why.UNKNOWN]
    lead, positions, start, count = placed
    # Dimensions before `start` and after the indexed block pass through untouched.
    rank_out, tail = len(out.shape), len(shape) - start - len(lead)
    block = tuple(out.owner.shape[start : start + count])
    if rank_out != start + count + tail:
        return [Why.UNKNOWN]
    if all(size == 1 for size in block):
        block = (1,) * len(lead)
        if 2 * positions.unique().numel() >= prod(lead):
            owner = out.owner.reshape(
                *out.owner.shape[:start], *block, *out.owner.shape[start + count :]
            )
            return [resized(Layout(shape, owner), shape)]
    wide = list(out.owner.shape)
    wide[start : start + count] = out.shape[start : start + count]
    owner = out.owner.expand(wide).reshape(*wide[:start], -1, *wide[start + count :])
    target = list(owner.shape)
    target[start] = prod(lead)
    where = [1] * owner.dim()
    where[start] = -1
    index = positions.reshape(where).expand(owner.shape)
    flat_shape = (*shape[:start], prod(lead), *shape[start + len(lead) :])
    found = _collected(flat_shape, target, lambda empty, how: empty.scatter_reduce(
        start, index, owner if how == "amax" else _last(owner), how))  # fmt: skip
    if isinstance(found, Layout):
        return [reshape(found, shape)]
    return [found]


@rule("index")
def index(use: Situation) -> Served:
    """table[ids] with one integer index tensor, on the first dimension."""
    indices = use.saved("indices")
    if len([i for i in indices if i is not None]) != 1 or indices[0] is None:
        return {}
    ids = indices[0]
    if ids.dtype in (torch.bool, torch.uint8):
        return {}
    rows = partition(use.layout, tuple(range(ids.dim())), use.batch)
    if rows is None:
        return {}
    shape = use.operands[0].shape
    ids = ids.to(use.g.device).reshape(-1).long()
    ids = torch.where(ids < 0, ids + shape[0], ids)
    return {0: rows_by_id(ids, use.g.reshape(ids.numel(), *shape[1:]), rows, shape)}


def _index_positions(op: Op, shape: Shape) -> tuple[Shape, Tensor, int, int] | None:
    """(indexed sizes, flat position of each result, first indexed dim, dims of the result).

    For index tensors on consecutive dimensions; None for anything else.
    """
    indices = list(op.data("indices"))
    at = [i for i, index in enumerate(indices) if index is not None]
    if not at or at != list(range(at[0], at[-1] + 1)):
        return None
    given = [indices[i].detach().cpu() for i in at]
    covered = sum(i.dim() if i.dtype in (torch.bool, torch.uint8) else 1 for i in given)
    lead = tuple(shape[at[0] : at[0] + covered])
    positions = torch.arange(prod(lead), device="cpu").reshape(lead)[tuple(given)]
    return lead, positions.reshape(-1), at[0], positions.dim()


declare("index_add", "index_copy", needs=["dim", "index"])
declare("index_fill")
declare("index_put", "index_put_impl", "unsafe_index_put", needs=["indices"])


@owners("index_add", "index_copy")
def _index_add(op: Op, out: Layout) -> list[Result]:
    data, source = op.in_shapes[0], op.in_shapes[1] if len(op.in_shapes) > 1 else None
    results: list[Result] = [None if data is None else out]
    if len(op.in_shapes) > 1:
        if source is None:
            results.append(None)
        else:
            dim = positive(op.attr("dim"), len(out.shape))
            owner = out.owner
            if owner.shape[dim] > 1:
                owner = owner.index_select(dim, op.data("index").detach().cpu().long().reshape(-1))
            results.append(compressed(source, owner) if owner.dim() == len(source) else Why.UNKNOWN)
    return results


@owners("index_fill")
def _index_fill(op: Op, out: Layout) -> list[Result]:
    results: list[Result] = [None if op.in_shapes[0] is None else out]
    return results + [None if s is None else Why.SHARED for s in op.in_shapes[1:]]


@owners("index_put", "index_put_impl", "unsafe_index_put")
def _index_put(op: Op, out: Layout) -> list[Result]:
    data, values = op.in_shapes[0], op.in_shapes[1]
    results: list[Result] = [None if data is None else out]
    if values is None:
        return [*results, None]
    placed = _index_positions(op, out.shape)
    if placed is None:
        return [*results, Why.UNKNOWN]
    lead, positions, start, _ = placed
    if start != 0:
        return [*results, Why.UNKNOWN]
    tail = out.owner.shape[len(lead) :]
    flat = out.owner.expand(*lead, *tail).reshape(-1, *tail)[positions]
    wide = Layout((positions.numel(), *out.shape[len(lead) :]), flat)
    if tuple(values) == wide.shape:
        return [*results, compressed(values, flat)]
    return [*results, Why.UNKNOWN]


declare("masked_select", needs=["mask"], reads=Reads.NOTHING)
declare("masked_scatter", needs=["mask"], reads=Reads.MISSING)


@owners("masked_select")
def _masked_select(op: Op, out: Layout) -> list[Result]:
    """A vector of those elements of the input, as wide as the mask, at which the mask is true."""
    shape = op.in_shapes[0]
    if shape is None:
        return [None]
    mask = op.data("mask").detach().cpu()
    wide = torch.broadcast_shapes(shape, mask.shape)
    owner = torch.full(wide, NOBODY, dtype=torch.int64, device="cpu")
    chosen = mask.expand(wide)
    if int(chosen.sum()) != out.shape[0]:
        return [Why.UNKNOWN]
    owner[chosen] = out.owner.expand(out.shape)
    return [or_why(reduce_to(compressed(wide, owner), shape), Why.UNKNOWN)]


@owners("masked_scatter")
def _masked_scatter(op: Op, out: Layout) -> list[Result]:
    """Elements of the second input, in order, in place of the first's where the mask is true."""
    data, source = op.in_shapes
    results: list[Result] = [None if data is None else or_why(reduce_to(out, data), Why.UNKNOWN)]
    if source is None:
        return [*results, None]
    owner = out.owner.expand(out.shape)[op.data("mask").detach().cpu().expand(out.shape)]
    count = prod(source)
    if owner.numel() > count:
        return [*results, Why.UNKNOWN]
    full = torch.full((count,), NOBODY, dtype=torch.int64, device="cpu")
    full[: owner.numel()] = owner
    return [*results, compressed(source, full.reshape(source))]
