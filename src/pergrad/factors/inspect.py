"""What a factor is made of: how its norm is computed, and forms of it that outlive its graph.

Owns: questions and rewrites that go through every class of factor.
Does not know: graphs, ops.
"""

from math import prod

import torch

from pergrad.factors import outer_norms
from pergrad.factors.base import Factor
from pergrad.factors.combined import Placed, Sum
from pergrad.factors.correlation import Correlation
from pergrad.factors.dense import Dense, Summed, Zero
from pergrad.factors.lazy import Computed, Pulled, Scaled
from pergrad.factors.mapped import Embedded, Mapped
from pergrad.factors.numeric import bytes_of
from pergrad.factors.outer import Outer
from pergrad.factors.rows import Rows


def materialized(factor: Factor) -> Factor:
    """The same factor with all that is lazy formed: what it needs may soon be gone."""
    if isinstance(factor, (Pulled, Computed)):
        return factor.materialize()
    if isinstance(factor, Sum):
        return Sum([materialized(part) for part in factor.factors])
    if isinstance(factor, Placed):
        return Placed(materialized(factor.factor), factor.index, factor.batch)
    if isinstance(factor, Mapped):
        return Mapped(materialized(factor.factor), factor.isometry)
    if isinstance(factor, Embedded):
        return Embedded(materialized(factor.factor), factor.shape, factor.index)
    if isinstance(factor, Scaled):
        return Scaled(materialized(factor.factor), factor.diagonal)
    return factor


def formed(factor: Factor) -> Factor:
    """The same factor as rows, if its norms form them anyway and they take no more memory."""
    if isinstance(factor, (Outer, Correlation)):
        held = bytes_of(factor.tensors())
        small = factor.batch * factor.bytes_per_row <= held
        if small and method(factor) in ("direct", "convolution"):
            return Dense(factor.dense())
    if isinstance(factor, Summed) and factor.notes.sq_norms is None:
        return Dense(factor.values)
    return factor


def cloned(factor: Factor) -> Factor:
    """The same factor over memory of its own."""
    return factor._map(torch.clone)


def method(factor: Factor) -> str:
    """How the norm is computed, in one word."""
    if isinstance(factor, Outer):
        return outer_norms.method(factor.g, factor.a, factor.notes)
    if isinstance(factor, Correlation):
        return factor.norm_method
    if isinstance(factor, Rows):
        return "segments"
    if isinstance(factor, Computed):
        return "loop"
    if isinstance(factor, Pulled):
        return "pull"
    if isinstance(factor, Sum):
        return " + ".join(sorted({method(part) for part in factor.factors}))
    if isinstance(factor, (Placed, Mapped, Embedded, Scaled)):
        return method(factor.factor)
    return "none" if isinstance(factor, Zero) else "sum"


def cost(factor: Factor) -> int:
    """Multiply-adds of the squared norms of all examples."""
    if isinstance(factor, Outer):
        return factor.batch * factor.sizes[0] * outer_norms.cost(factor.g, factor.a, factor.notes)
    if isinstance(factor, Correlation):
        return factor.batch * factor.norm_cost
    if isinstance(factor, Rows):
        return factor.g.numel()
    if isinstance(factor, Pulled):
        return cost(factor.factor) + factor.batch * prod(factor.shape)
    if isinstance(factor, Sum):
        parts = [cost(part) for part in factor.factors]
        return sum(parts) * len(parts)
    if isinstance(factor, (Placed, Mapped, Embedded, Scaled)):
        return cost(factor.factor)
    return 0 if isinstance(factor, Zero) else factor.batch * prod(factor.shape)
