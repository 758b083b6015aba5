"""Rows of a batch as they lie, each of one example: laid out by example when somebody asks.

Owns: `StrewnOuter` and `StrewnSum`.
Does not know: ops.

A weight that is used step by step, by fewer examples at each step, has as many factors as there are
steps, each with rows of other examples. These are joined as they lie, and laid out once.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property, lru_cache
from typing import Any, Self

import torch
from torch import Tensor

from pergrad.factors import Dense, Factor, Isometry, Zero, dots, grams, mapped
from pergrad.factors.isometry import isometry
from pergrad.factors.numeric import Index, result_dtype
from pergrad.ops.rows import Partition, by_owner, outer


class _Strewn(Factor):
    """What both have in common: everything is asked of the factor that is laid out."""

    multilinear = False  # a tensor has rows, not examples

    def __init__(
        self, sides: tuple[Tensor, ...], groups: Partition, shape: tuple[int, ...]
    ) -> None:
        super().__init__(groups.batch, shape, sides[0].device, result_dtype(*sides))
        self.sides = sides
        self.groups = groups

    def settled(self) -> Factor:
        """Laid out by example."""
        return self._settled

    @cached_property
    def _settled(self) -> Factor:
        raise NotImplementedError

    def _like(self, sides: tuple[Tensor, ...], groups: Partition) -> Self:
        return type(self)(sides, groups, self.shape)

    @property
    def joins(self) -> Hashable:
        """Those with rows of the same lengths."""
        return type(self), self.batch, *(side.shape[1] for side in self.sides)

    def joined(self, others: Sequence[Self]) -> Self:
        """One after the other, as they lie."""
        every = (self, *others)
        sides = tuple(torch.cat(several) for several in zip(*(f.sides for f in every), strict=True))
        return self._like(sides, _joined(tuple(f.groups for f in every)))

    def tensors(self) -> tuple[Tensor, ...]:
        """The sides."""
        return self.sides

    def _map(self, change: Callable[[Tensor], Tensor]) -> Factor:
        return self._like(tuple(change(side) for side in self.sides), self.groups)

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self._settled.dense()

    def sq_norms(self) -> Tensor:
        """(B,)."""
        return self._settled.sq_norms()

    def matvec(self, v: Tensor) -> Tensor:
        """(B,)."""
        return self._settled.matvec(v)

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Shaped as the parameter."""
        return self._settled.weighted_sum(c)

    def scale(self, c: Tensor) -> Factor:
        """Row b times c[b]."""
        return self._settled.scale(c)

    def _select(self, index: Index) -> Factor:
        return self._settled._select(index)

    @property
    def norm_method(self) -> str:
        """That of the factor that is laid out."""
        return self._settled.norm_method

    @property
    def norm_cost(self) -> int:
        """That of the factor that is laid out."""
        return self._settled.norm_cost


class StrewnOuter(_Strewn):
    """G[b] = Σ g[r] ⊗ a[r] over the rows r of example b.

    Args:
        sides: g (R, p) and a (R, d).
        groups: the rows of each example.
        shape: the parameter's; its elements in order are those of the matrix (p, d).
    """

    @cached_property
    def _settled(self) -> Factor:
        g, a = self.sides
        found = outer(g[:, None], a[:, None], self.groups, self.shape)
        return Zero(self.batch, self.shape, self.device, self.dtype) if found is None else found

    def absorb(self, chain: Isometry) -> Factor:
        """A view is another shape; a transposition swaps the sides."""
        g, a = self.sides
        kind, how = chain.steps[0]
        if kind == "view":
            taken = StrewnOuter(self.sides, self.groups, tuple(how))
        elif self.shape == (g.shape[1], a.shape[1]) and how == (1, 0):
            taken = StrewnOuter((a, g), self.groups, (a.shape[1], g.shape[1]))
        else:
            return mapped(self._settled, chain.steps)
        rest = isometry(taken.shape, chain.steps[1:])
        return taken.absorb(rest) if rest.steps else taken


class StrewnSum(_Strewn):
    """G[b] = Σ g[r] over the rows r of example b.

    Args:
        sides: g (R, p).
        groups: the rows of each example.
        shape: the parameter's, of p elements.
    """

    @cached_property
    def _settled(self) -> Factor:
        (g,) = self.sides
        total = by_owner(g.to(self.dtype), self.groups.owners, self.batch)
        return Dense(total.reshape(self.batch, *self.shape))

    def absorb(self, chain: Isometry) -> Factor:
        """The sums, rearranged."""
        return mapped(self._settled, chain.steps)


@lru_cache(maxsize=16)
def _joined(groups: tuple[Partition, ...]) -> Partition:
    """The rows of one after those of the other: found again where a plan's are."""
    return Partition(torch.cat([each.owners for each in groups]), groups[0].batch)


def _laid_out(f: Any, h: Factor) -> tuple[Factor, Factor]:
    return f.settled(), f.settled() if f is h else h


for _kind in (StrewnOuter, StrewnSum):

    @dots.register(_kind, Factor)
    def _dot(f: Any, h: Factor) -> Tensor:
        return dots(*_laid_out(f, h))

    @grams.register(_kind, Factor)
    def _gram(f: Any, h: Factor) -> Tensor:
        return grams(*_laid_out(f, h))
