"""Outer products added to a matrix.

Owns: `addr`: whose rows and columns of the result are whose, and the factors of its three operands.
Does not know: outer products of many vectors, which are matrix products.
"""

from pergrad.factors import Dense
from pergrad.graph.layout import Layout, reduce_to, smear
from pergrad.graph.ops import Op, Reads, Result, Why, declare, or_why, owners
from pergrad.ops.registry import Served, Situation, rule
from pergrad.ops.rows import reduced

declare("addr", needs=["vec1", "vec2", "alpha", "beta"], reads=Reads.MISSING, weights=True)


@owners("addr")
def _addr(op: Op, out: Layout) -> list[Result]:
    bias, one, two = op.in_shapes
    column, row = smear(out, [1]), smear(out, [0])
    return [
        None if bias is None else or_why(reduce_to(out, bias), Why.SHARED),
        None if one is None else or_why(column and Layout(one, column.owner[:, 0]), Why.CONTRACTED),
        None if two is None else or_why(row and Layout(two, row.owner[0]), Why.CONTRACTED),
    ]


@rule("addr")
def outer_product(use: Situation) -> Served:
    """out[i, j] = beta * matrix[i, j] + alpha * column[i] * row[j]."""
    g = use.g
    served: Served = {}
    by = (use.attr("beta"), use.attr("alpha"), use.attr("alpha"))
    for slot, operand in use.operands.items():
        if slot == 0:
            values, shape = g, operand.shape
        elif slot == 1:  # the operand as it is broadcast: a column
            values, shape = g * use.saved("vec2"), (*operand.shape, 1)
        else:
            values, shape = g * use.saved("vec1")[:, None], operand.shape
        factor = reduced(values, use.layout, shape, use.batch).values
        served[slot] = Dense((by[slot] * factor).reshape(use.batch, *operand.shape))
    return served
