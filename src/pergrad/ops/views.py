"""Views, and copies of an operand along some dimensions.

Owns: ops that only rearrange their input: how ownership moves through them, the steps by which a
gradient goes back, and the factor of a parameter that is expanded or tiled over examples.
Does not know: how a gradient takes the steps (`factors`).
"""

from math import prod

import torch

from pergrad.factors import Dense
from pergrad.graph.layout import (
    NOBODY,
    Layout,
    compressed,
    permute,
    reduce_to,
    reshape,
    smear,
)
from pergrad.graph.ops import (
    Op,
    Result,
    Shape,
    Step,
    Why,
    cut_out,
    cuts,
    declare,
    or_why,
    owners,
    positive,
    steps,
)
from pergrad.ops.registry import Served, Situation, rule
from pergrad.ops.rows import reduced

_VIEWS = ("view", "unsafe_view", "reshape_alias", "reshape_copy", "squeeze", "unsqueeze")
declare(*_VIEWS, "flatten", "mkldnn_reshape")


@owners(*_VIEWS, "flatten", "mkldnn_reshape")
def _view(op: Op, out: Layout) -> list[Result]:
    return [None if s is None else reshape(out, s) for s in op.in_shapes]


@steps(*_VIEWS, keeps_order=True)
def _unview(op: Op, _: int) -> tuple[Step, ...]:
    return (("view", op.in_shapes[0]),)


declare("permute", needs=["dims"])
declare("transpose", needs=["dim0", "dim1"])
declare("t")


@owners("permute")
def _permute(op: Op, out: Layout) -> list[Result]:
    dims = [positive(d, len(out.shape)) for d in op.attr("dims")]
    inverse = [dims.index(d) for d in range(len(dims))]
    return [permute(out, inverse)]


@steps("permute")
def _unpermute(op: Op, _: int) -> tuple[Step, ...]:
    rank = len(op.out_shapes[0])
    dims = [d % rank for d in op.attr("dims")]
    return (("permute", tuple(dims.index(d) for d in range(rank))),)


@owners("transpose", "t")
def _transpose(op: Op, out: Layout) -> list[Result]:
    rank = len(out.shape)
    if rank < 2:
        return [out]
    return [permute(out, _swapped(op, rank))]


def _swapped(op: Op, rank: int) -> tuple[int, ...]:
    """All dimensions in order, but for the two that change places."""
    a, b = (0, 1) if op.name == "t" else (op.attr("dim0"), op.attr("dim1"))
    a, b = positive(a, rank), positive(b, rank)
    dims = list(range(rank))
    dims[a], dims[b] = b, a
    return tuple(dims)


@steps("transpose", "t")
def _untranspose(op: Op, _: int) -> tuple[Step, ...]:
    rank = len(op.out_shapes[0])
    return (("permute", _swapped(op, rank)),) if rank > 1 else ()


declare("expand", "repeat")


@owners("expand")
def _expand(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    return [or_why(reduce_to(out, shape), Why.SHARED)]


@steps("expand", expands=True)
def _unexpand(op: Op, _: int) -> tuple[Step, ...] | None:
    shape = op.in_shapes[0]
    assert shape is not None
    return (("view", shape),) if prod(shape) == prod(op.out_shapes[0]) else None


@rule("expand")
def expand(use: Situation) -> Served:
    """A parameter copied to every example, such as a class token."""
    return {0: reduced(use.g, use.layout, use.operands[0].shape, use.batch)}


@owners("repeat")
def _repeat(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    folded, kept = _tiles(out.shape, shape)
    layout = reduce_to(reshape(out, folded), kept)
    return [Why.SHARED if layout is None else reshape(layout, shape)]


def _tiles(out: Shape, shape: Shape) -> tuple[list[int], list[int]]:
    """The output with the number of tiles a dimension of its own; and the same, of one tile."""
    lead = len(out) - len(shape)
    folded, kept = list(out[:lead]), [1] * lead
    for size, total in zip(shape, out[lead:], strict=True):
        folded += [total // size if size else 1, size]
        kept += [1, size]
    return folded, kept


@rule("repeat")
def repeat(use: Situation) -> Served:
    """A parameter tiled, such as a normalisation's scale once for every example."""
    shape = use.operands[0].shape
    folded, kept = _tiles(use.layout.shape, shape)
    factor = reduced(use.g.reshape(folded), reshape(use.layout, folded), kept, use.batch)
    return {0: Dense(factor.values.reshape(use.batch, *shape))}


declare("select", needs=["dim", "index"])
declare("slice", needs=["dim", "start", "end", "step"])
declare("narrow_copy", needs=["dim", "start", "length"])


@cuts("select")
def _one(op: Op) -> tuple[int, slice]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = positive(op.attr("dim"), len(shape))
    index = positive(op.attr("index"), shape[dim])
    return dim, slice(index, index + 1)


@cuts("slice", "narrow_copy")
def _several(op: Op) -> tuple[int, slice]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = positive(op.attr("dim"), len(shape))
    start = op.attr("start") or 0
    if op.name == "slice":
        end, step = op.attr("end"), op.attr("step")
    else:
        end, step = start + op.attr("length"), 1
    return dim, slice(*slice(start, end, step).indices(shape[dim]))


@owners("select", "slice", "narrow_copy")
def _cut(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = positive(op.attr("dim"), len(shape))
    if op.name != "select" and out.owner.shape[dim] == 1 and 2 * out.shape[dim] >= shape[dim]:
        # Claiming the few rows that get no gradient keeps the layout regular, hence fast.
        return [Layout(shape, out.owner)]
    return [cut_out(op, out)]


@steps("select")
def _unselect(op: Op, _: int) -> tuple[Step, ...]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = positive(op.attr("dim"), len(shape))
    return (("embed", shape, dim, positive(op.attr("index"), shape[dim])),)


@steps("slice")
def _unslice(op: Op, _: int) -> tuple[Step, ...] | None:
    shape = op.in_shapes[0]
    assert shape is not None
    if op.attr("step") != 1:
        return None
    dim = positive(op.attr("dim"), len(shape))
    begin, _end, _step = slice(op.attr("start") or 0, op.attr("end"), 1).indices(shape[dim])
    return (("embed", shape, dim, begin),)


declare("flip", needs=["dims"])
declare("roll", needs=["dims", "shifts"])
declare("diagonal", needs=["dim1", "dim2", "offset"])
declare("unfold", needs=["dimension"])
declare("constant_pad_nd", needs=["pad"])
declare("view_as_real", "view_as_complex")


@owners("flip")
def _flip(op: Op, out: Layout) -> list[Result]:
    dims = [positive(d, len(out.shape)) for d in op.attr("dims")]
    return [Layout(out.shape, out.owner.flip([d for d in dims if out.owner.shape[d] > 1]))]


@owners("roll")
def _roll(op: Op, out: Layout) -> list[Result]:
    dims, shifts = op.attr("dims"), op.attr("shifts")
    if not dims:
        flat = Layout((out.owner.numel(),), out.owner.reshape(-1))
        if flat.is_constant:
            return [out]
        return [Why.UNKNOWN]
    owner = out.owner
    for dim, shift in zip(dims, shifts, strict=True):
        if owner.shape[dim] > 1:
            owner = owner.roll(-shift, dim)
    return [Layout(out.shape, owner)]


@owners("diagonal")
def _diagonal(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    one, two = positive(op.attr("dim1"), len(shape)), positive(op.attr("dim2"), len(shape))
    rest = [d for d in range(len(shape)) if d not in (one, two)]
    sizes = [1] * len(shape)
    sizes[one], sizes[two] = shape[one], shape[two]
    for position, d in enumerate(rest):
        sizes[d] = out.owner.shape[position]
    full = torch.full(sizes, NOBODY, dtype=torch.int64, device="cpu")
    full.diagonal(op.attr("offset"), one, two).copy_(out.owner)
    return [compressed(shape, full)]


@owners("unfold")
def _unfold(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = positive(op.attr("dimension"), len(shape))
    plain = smear(out, [dim, len(out.shape) - 1])
    return [Why.UNKNOWN if plain is None else Layout(shape, plain.owner.squeeze(-1))]


@owners("constant_pad_nd")
def _pad(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    owner, pad = out.owner, op.attr("pad")
    for i in range(len(pad) // 2):
        dim, before, after = len(shape) - 1 - i, pad[2 * i], pad[2 * i + 1]
        if owner.shape[dim] > 1:
            if before < 0 or after < 0:
                return [Why.UNKNOWN]
            owner = owner.narrow(dim, before, shape[dim])
    return [compressed(shape, owner)]


@owners("view_as_real", "view_as_complex")
def _complex_view(op: Op, out: Layout) -> list[Result]:
    shape = op.in_shapes[0]
    assert shape is not None
    if op.name == "view_as_real":
        plain = smear(out, [len(out.shape) - 1])
        return [Why.UNKNOWN if plain is None else Layout(shape, plain.owner.squeeze(-1))]
    return [Layout(shape, out.owner.unsqueeze(-1))]
