"""Bilinear forms of two inputs.

Owns: lowering `aten._trilinear`, as `nn.Bilinear` calls it, to `Outer`.
Does not know: the bias, which is added afterwards.
"""

from pergrad.rules.positions import outer, partition
from pergrad.rules.registry import Served, Situation, rule


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
