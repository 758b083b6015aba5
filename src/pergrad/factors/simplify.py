"""`mapped`: a factor after views and permutations, as the simplest factor that says the same.

Owns: which factors absorb which steps.
Does not know: products, graphs.
"""

from collections.abc import Sequence

from pergrad.factors.base import Factor
from pergrad.factors.combined import Placed, Sum
from pergrad.factors.dense import Dense, Zero
from pergrad.factors.mapped import Isometry, Mapped, Step, isometry
from pergrad.factors.outer import Outer
from pergrad.factors.rows import Rows


def mapped(factor: Factor, steps: Sequence[Step]) -> Factor:
    """The factor after the steps ("view", shape) and ("permute", order), simplified."""
    if isinstance(factor, Mapped):
        chain = isometry(factor.factor.shape, (*factor.isometry.steps, *steps))
        return mapped(factor.factor, chain.steps)
    chain = isometry(factor.shape, steps)
    if not chain.steps:
        return factor
    if isinstance(factor, Zero):
        return Zero(factor.batch, chain.target, factor.device, factor.dtype)
    if isinstance(factor, Dense):
        return Dense(chain.apply(factor.values))
    if isinstance(factor, Sum):
        return Sum([mapped(f, chain.steps) for f in factor.factors])
    if isinstance(factor, Placed):
        return Placed(mapped(factor.factor, chain.steps), factor.index, factor.batch)
    return _absorbed(factor, chain)


def _absorbed(factor: Factor, chain: Isometry) -> Factor:
    """The first step taken by an Outer or Rows itself, where it can be; else a Mapped."""
    (kind, how), rest = chain.steps[0], chain.steps[1:]
    done: Factor | None = None
    if isinstance(factor, Outer):
        N, _, p, d = factor.sizes
        if kind == "view":
            done = Outer(factor.g, factor.a, how, factor.notes)
        elif N == 1 and factor.shape == (p, d) and how == (1, 0):
            done = Outer(factor.a, factor.g, notes=factor.notes)
        elif factor.shape == (N, p, d) and how == (0, 2, 1):
            done = Outer(factor.a, factor.g, (N, d, p), factor.notes)
    elif isinstance(factor, Rows) and kind == "view" and how[:1] == factor.shape[:1]:
        done = Rows(factor.ids, factor.g.reshape(*factor.ids.shape, *how[1:]), how)
    if done is None:
        return Mapped(factor, chain)
    return mapped(done, rest) if rest else done
