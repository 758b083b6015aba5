"""`Mapped` and `Embedded`: a factor in other coordinates, or filling a part of a parameter.

Owns: the two classes, and their products with others.
Does not know: how other kinds take a map (`Factor.absorb`), maps that change lengths (`lazy`).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from pergrad.factors.base import Factor, seen_through
from pergrad.factors.combined import Sum
from pergrad.factors.dense import Dense, Zero
from pergrad.factors.guard import SqNorms
from pergrad.factors.isometry import Isometry, Step, isometry
from pergrad.factors.numeric import Index
from pergrad.factors.products import dots, grams


def mapped(factor: Factor, steps: Sequence[Step]) -> Factor:
    """The factor after the steps ("view", shape) and ("permute", order), simplified."""
    chain = isometry(factor.shape, steps)
    return factor.absorb(chain) if chain.steps else factor


class Mapped(Factor):
    """G[b] = isometry(factor[b]). Lengths and angles are the inner factor's."""

    tiles = False

    def __init__(self, factor: Factor, isometry: Isometry) -> None:
        if factor.shape != isometry.source:
            raise ValueError(f"An isometry from {isometry.source} cannot map {factor}.")
        super().__init__(factor.batch, isometry.target, factor.device, factor.dtype)
        self.factor = factor
        self.isometry = isometry

    @property
    def bytes_per_row(self) -> int:
        """The inner row, and its rearranged copy."""
        return super().bytes_per_row + self.factor.bytes_per_row

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.isometry.apply(self.factor.dense())

    def sq_norms(self) -> Tensor:
        """The inner norms."""
        return self.factor.sq_norms()

    def sq_norms_and_doubts(self) -> SqNorms:
        """The inner norms."""
        return self.factor.sq_norms_and_doubts()

    def matvec(self, v: Tensor) -> Tensor:
        """The inner products with v brought back."""
        return self.factor.matvec(self.isometry.invert(v.reshape(1, *self.shape))[0])

    def weighted_sum(self, c: Tensor) -> Tensor:
        """The inner sum, mapped."""
        return self.isometry.apply(self.factor.weighted_sum(c)[None])[0]

    def weighted_sums(self, C: Tensor) -> Tensor:
        """The inner sums, mapped."""
        return self.isometry.apply(self.factor.weighted_sums(C))

    def second_moment(self, c: Tensor) -> Tensor:
        """The inner one, mapped."""
        return self.isometry.apply(self.factor.second_moment(c)[None])[0]

    def absorb(self, chain: Isometry) -> Factor:
        """The inner factor after both chains."""
        return mapped(self.factor, (*self.isometry.steps, *chain.steps))

    @property
    def joins(self) -> Hashable:
        """Those in the same coordinates."""
        return Mapped, self.isometry

    def joined(self, others: Sequence["Mapped"]) -> "Mapped":
        """The inner factors, added."""
        return Mapped(Sum([self.factor, *(f.factor for f in others)]), self.isometry)

    @property
    def norm_method(self) -> str:
        """That of the inner factor."""
        return self.factor.norm_method

    @property
    def norm_cost(self) -> int:
        """That of the inner factor."""
        return self.factor.norm_cost

    def settled(self) -> Factor:
        """The inner factor, laid out."""
        inner = self.factor.settled()
        return self if inner is self.factor else mapped(inner, self.isometry.steps)

    def materialized(self) -> "Mapped":
        """The inner factor, formed."""
        return Mapped(self.factor.materialized(), self.isometry)

    def scale(self, c: Tensor) -> "Mapped":
        """The inner rows, scaled."""
        return Mapped(self.factor.scale(c), self.isometry)

    def _times_diagonal(self, diagonal: Tensor) -> "Mapped":
        inner = self.isometry.invert(diagonal[None])[0]
        return Mapped(self.factor.times_diagonal(inner), self.isometry)

    def _select(self, index: Index) -> "Mapped":
        return Mapped(self.factor._select(index), self.isometry)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Mapped":
        return Mapped(self.factor._map(change), self.isometry)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Mapped":
        """The inner rows elsewhere."""
        return Mapped(self.factor.to(device, dtype), self.isometry)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the inner factor."""
        return self.factor.tensors()


class Embedded(Factor):
    """The factor fills lo:hi along dimension `dim` of the parameter; zero elsewhere.

    Args:
        factor: the gradients of the slice.
        shape: the parameter's.
        index: (dim, lo, hi).
    """

    def __init__(self, factor: Factor, shape: tuple[int, ...], index: tuple[int, int, int]) -> None:
        shape = tuple(shape)
        dim, lo, hi = index
        inside = 0 <= dim < len(shape) and 0 <= lo <= hi <= shape[dim]
        if not inside or factor.shape != (*shape[:dim], hi - lo, *shape[dim + 1 :]):
            raise ValueError(f"{factor} is not the slice {lo}:{hi} along {dim} of {shape}.")
        super().__init__(factor.batch, shape, factor.device, factor.dtype)
        self.factor = factor
        self.index = (dim, lo, hi)
        self.tiles = factor.tiles

    @property
    def bytes_per_row(self) -> int:
        """The inner row's, and the row."""
        return super().bytes_per_row + self.factor.bytes_per_row

    def cut(self, x: Tensor, lead: int = 0) -> Tensor:
        """The slice of a tensor shaped as the parameter, after `lead` dimensions."""
        dim, lo, hi = self.index
        return x.narrow(dim + lead, lo, hi - lo)

    def fill(self, x: Tensor, lead: int = 0) -> Tensor:
        """A slice back in its place between zeros."""
        dim, lo, hi = self.index
        before, after = list(x.shape), list(x.shape)
        before[dim + lead] = lo
        after[dim + lead] = self.shape[dim] - hi
        return torch.cat([x.new_zeros(before), x, x.new_zeros(after)], dim + lead)

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.fill(self.factor.dense(), 1)

    def tile(self, lo: int, hi: int) -> Tensor:
        """The inner tile, and zeros around it."""
        dim, start, stop = self.index
        if dim:
            inner = self.factor.tile(lo, hi).reshape(self.batch, hi - lo, *self.factor.shape[1:])
            return self.fill(inner, 1).reshape(self.batch, (hi - lo) * self.matrix_shape[1])
        wide = self.matrix_shape[1]
        low, high = min(max(lo, start), hi), max(min(hi, stop), lo)
        high = max(low, high)
        zeros = self._zeros(self.batch, (low - lo) * wide)
        more = self._zeros(self.batch, (hi - high) * wide)
        if high == low:
            return torch.cat([zeros, more], 1)
        return torch.cat([zeros, self.factor.tile(low - start, high - start), more], 1)

    def sq_norms(self) -> Tensor:
        """The inner norms."""
        return self.factor.sq_norms()

    def sq_norms_and_doubts(self) -> SqNorms:
        """The inner norms."""
        return self.factor.sq_norms_and_doubts()

    def matvec(self, v: Tensor) -> Tensor:
        """The inner products with the slice of v."""
        return self.factor.matvec(self.cut(v.reshape(self.shape)))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """The inner sum between zeros."""
        return self.fill(self.factor.weighted_sum(c))

    def weighted_sums(self, C: Tensor) -> Tensor:
        """The inner sums between zeros."""
        return self.fill(self.factor.weighted_sums(C), 1)

    def second_moment(self, c: Tensor) -> Tensor:
        """The inner one between zeros."""
        return self.fill(self.factor.second_moment(c))

    def _inside(self, factor: Factor) -> "Embedded":
        return Embedded(factor, self.shape, self.index)

    @property
    def joins(self) -> Hashable:
        """Those that fill the same part."""
        return Embedded, self.index

    def joined(self, others: Sequence["Embedded"]) -> "Embedded":
        """The inner factors, added."""
        return self._inside(Sum([self.factor, *(f.factor for f in others)]))

    @property
    def norm_method(self) -> str:
        """That of the inner factor."""
        return self.factor.norm_method

    @property
    def norm_cost(self) -> int:
        """That of the inner factor."""
        return self.factor.norm_cost

    def settled(self) -> "Embedded":
        """The inner factor, laid out."""
        inner = self.factor.settled()
        return self if inner is self.factor else self._inside(inner)

    def materialized(self) -> "Embedded":
        """The inner factor, formed."""
        return self._inside(self.factor.materialized())

    def scale(self, c: Tensor) -> "Embedded":
        """The inner rows, scaled."""
        return self._inside(self.factor.scale(c))

    def _times_diagonal(self, diagonal: Tensor) -> "Embedded":
        return self._inside(self.factor.times_diagonal(self.cut(diagonal)))

    def _select(self, index: Index) -> "Embedded":
        return self._inside(self.factor._select(index))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Embedded":
        return self._inside(self.factor._map(change))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Embedded":
        """The inner rows elsewhere."""
        return self._inside(self.factor.to(device, dtype))

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the inner factor."""
        return self.factor.tensors()


seen_through["isometry"] = Mapped


def _brought_back(f: Mapped, h: Factor) -> Factor | None:
    """`h` in the coordinates in which f lives, where it has a simple form there."""
    if isinstance(h, Mapped) and h.isometry == f.isometry:
        return h.factor
    other = mapped(h, f.isometry.inverse().steps)
    return None if isinstance(other, Mapped) else other


def _cut(f: Embedded, h: Factor) -> Factor | None:
    """The slice of h that f fills, where it has a simple form."""
    if isinstance(h, Dense):
        return Dense(f.cut(h.values, 1))
    if isinstance(h, Embedded) and h.index[0] == f.index[0]:
        if h.index == f.index:
            return h.factor
        if h.index[2] <= f.index[1] or f.index[2] <= h.index[1]:  # disjoint
            return Zero(h.batch, f.factor.shape, h.device, h.dtype)
    return None


def _meets_inside(
    kind: type[Mapped] | type[Embedded], inside: Callable[[Any, Factor], Factor | None]
) -> None:
    """Products of this kind are those of the inner factor with what `inside` makes of the other."""

    @dots.register(kind, Factor)
    def dot(f: Any, h: Factor) -> Tensor | None:
        other = inside(f, h)
        return None if other is None else f.factor.dot(other)

    @grams.register(kind, Factor)
    def gram(f: Any, h: Factor) -> Tensor | None:
        inner: Factor = f.factor
        other = inner if f is h else inside(f, h)
        return None if other is None else inner.gram(other)


_meets_inside(Mapped, _brought_back)
_meets_inside(Embedded, _cut)
