"""Bilinear forms of two inputs.

Owns: lowering `aten._trilinear`, as `nn.Bilinear` calls it, to `Outer`.
Does not know: the bias, which is added afterwards.
"""

from pergrad.graph.layout import Layout, smear
from pergrad.graph.ops import Op, Reads, Result, Why, declare, owners, resized
from pergrad.ops.registry import Served, Situation, rule
from pergrad.ops.rows import outer, partition

declare(
    "trilinear",
    needs=["i1", "i3", "expand1", "expand2", "expand3", "sumdim"],
    reads=Reads.MISSING,
    weights=True,
)


@owners("trilinear")
def _trilinear(op: Op, out: Layout) -> list[Result]:
    """The product of three tensors, each expanded along some dimensions, some of them summed."""
    owner = out.owner
    for dim in sorted(op.attr("sumdim")):
        owner = owner.unsqueeze(dim)
    full = Layout(tuple(owner.shape), owner)
    results: list[Result] = []
    for shape, name in zip(op.in_shapes, ("expand1", "expand2", "expand3"), strict=True):
        dims = list(op.attr(name))
        lone = None if shape is None else smear(full, dims)
        if shape is None or lone is None:
            results.append(None if shape is None else Why.CONTRACTED)
        else:
            kept = [size for d, size in enumerate(lone.owner.shape) if d not in dims]
            results.append(resized(Layout(tuple(kept), lone.owner.reshape(kept)), shape))
    return results


@rule("trilinear")
def bilinear(use: Situation) -> Served:
    """out[t, o] = sum over i, j of left[t, i] weight[o, i, j] right[t, j]."""
    form = [tuple(use.attr(name)) for name in ("expand1", "expand2", "expand3", "sumdim")]
    rows = partition(use.layout, (0,), use.batch)
    if form != [(1, 3), (0,), (1, 2), (2, 3)] or 1 not in use.operands or rows is None:
        return {}
    g, left, right = use.g, use.saved("i1"), use.saved("i3")
    shape = use.operands[1].shape
    if g.shape[1] <= right.shape[1]:  # of two ways to join three vectors the smaller one
        one, two = (g[:, :, None] * left[:, None]).flatten(1), right
    else:
        one, two = g, (left[:, :, None] * right[:, None]).flatten(1)
    return {1: outer(one[:, None], two[:, None], rows, shape)}
