"""Joining tensors, and cutting one into several outputs.

Owns: cat and stack, split and unbind: how ownership moves through them, and the steps back from a
piece.
Does not know: parameters; what is joined with a batch is left to the fallback.
"""

import torch
from torch import Tensor

from pergrad.graph.layout import NOBODY, Layout, compressed, constant
from pergrad.graph.ops import (
    Op,
    Reads,
    Result,
    Step,
    Why,
    declare,
    owners,
    owners_of_all,
    positive,
    resized,
    steps,
    unknown,
)

declare("cat", "stack", needs=["dim"], reads=Reads.MISSING, joins=True)


@owners("cat")
def _cat(op: Op, out: Layout) -> list[Result]:
    dim = positive(op.attr("dim"), len(out.shape))
    if out.owner.shape[dim] == 1:
        return [None if s is None else resized(out, s) for s in op.in_shapes]
    rank = len(out.shape)  # torch still lets an empty vector be joined to anything
    sizes = [None if s is None else s[dim] if len(s) == rank else 0 for s in op.in_shapes]
    starts: list[int | None] = [None] * len(sizes)
    position: int | None = 0
    for i, size in enumerate(sizes):
        starts[i] = position
        position = None if position is None or size is None else position + size
    position = out.shape[dim]  # pieces without gradient have no known size: count from the end too
    for i in range(len(sizes) - 1, -1, -1):
        size = sizes[i]
        position = None if position is None or size is None else position - size
        if starts[i] is None:
            starts[i] = position
    results: list[Result] = []
    for shape, start in zip(op.in_shapes, starts, strict=True):
        if shape is None:
            results.append(None)
        elif len(shape) != rank:
            results.append(constant(shape, NOBODY))
        elif start is None:
            results.append(Why.UNKNOWN)
        else:
            results.append(compressed(shape, out.owner.narrow(dim, start, shape[dim])))
    return results


@owners("stack")
def _stack(op: Op, out: Layout) -> list[Result]:
    dim = positive(op.attr("dim"), len(out.shape))
    results: list[Result] = []
    for i, shape in enumerate(op.in_shapes):
        if shape is None:
            results.append(None)
        else:
            at = i if out.owner.shape[dim] > 1 else 0
            results.append(compressed(shape, out.owner.select(dim, at)))
    return results


_CUTS = ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unbind")
declare(*_CUTS, needs=["dim"])


@owners_of_all(*_CUTS)
def _cut(op: Op, outs: list[Layout | None]) -> list[Result]:
    """split, chunk, unbind: the pieces laid end to end."""
    shape = op.in_shapes[0]
    assert shape is not None
    dim = positive(op.attr("dim"), len(shape))
    pieces: list[Tensor] = []
    for out, out_shape in zip(outs, op.out_shapes, strict=True):
        size = 1 if op.name == "unbind" else out_shape[dim]
        if out is None:
            owner = torch.full([1] * len(shape), NOBODY, dtype=torch.int64, device="cpu")
        else:
            owner = out.owner.unsqueeze(dim) if op.name == "unbind" else out.owner
        target = list(owner.shape)
        target[dim] = size
        pieces.append(owner.expand(target))
    common = [max(p.shape[d] for p in pieces) for d in range(len(shape))]
    wide = []
    for piece in pieces:
        target = list(common)
        target[dim] = piece.shape[dim]
        wide.append(piece.expand(target))
    return [compressed(shape, torch.cat(wide, dim))]


@steps("split", "unsafe_split", "split_with_sizes", "unbind")
def _uncut(op: Op, number: int) -> tuple[Step, ...]:
    shape = op.in_shapes[0]
    assert shape is not None
    dim = positive(op.attr("dim"), len(shape))
    begin = number if op.name == "unbind" else sum(s[dim] for s in op.out_shapes[:number])
    return (("embed", shape, dim, begin),)


# What distributed wrappers put around a module's inputs or outputs; the second is of fully_shard.
SINKS = ("_DDPSink", "RegisterPostBackwardFunction")
declare(*SINKS)


@owners_of_all(*SINKS)
def _sink(op: Op, outs: list[Layout | None]) -> list[Result]:
    """The identity of each."""
    return list(outs) if len(outs) == len(op.in_shapes) else unknown(op)
