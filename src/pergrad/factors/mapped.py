"""`Mapped` and `Embedded`: a factor in other coordinates, or filling a part of a parameter.

Owns: isometries (views and permutations), the two classes, and how chains of steps simplify.
Does not know: products of two factors (`algebra`), maps that change lengths (`lazy`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from pergrad.factors.base import Factor
from pergrad.factors.numeric import Index

Step = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Isometry:
    """("view", shape) and ("permute", order) steps from tensors of shape `source`; data only."""

    source: tuple[int, ...]
    steps: tuple[Step, ...]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Before the first step, and after every step."""
        shapes = [self.source]
        for kind, how in self.steps:
            now = shapes[-1]
            shapes.append(how if kind == "view" else tuple(now[i] for i in how))
        return shapes

    @property
    def target(self) -> tuple[int, ...]:
        """The shape that comes out."""
        return self.shapes[-1]

    def apply(self, x: Tensor) -> Tensor:
        """(n, *source) -> (n, *target)."""
        for kind, how in self.steps:
            if kind == "view":
                x = x.reshape(len(x), *how)
            else:
                x = x.permute(0, *(i + 1 for i in how))
        return x

    def invert(self, x: Tensor) -> Tensor:
        """(n, *target) -> (n, *source)."""
        return self.inverse().apply(x)

    def inverse(self) -> "Isometry":
        """The same steps backwards."""
        steps: list[Step] = []
        for before, (kind, how) in zip(self.shapes[-2::-1], self.steps[::-1], strict=True):
            if kind == "view":
                steps.append((kind, before))
            else:
                steps.append((kind, tuple(how.index(i) for i in range(len(how)))))
        return Isometry(self.target, tuple(steps))


def isometry(source: Sequence[int], steps: Sequence[Step]) -> Isometry:
    """The shortest chain that does the same: no step without effect, none that undoes another."""
    return _isometry(tuple(source), tuple(steps))


@lru_cache(maxsize=1024)  # the same few, at every step of a training
def _isometry(source: tuple[int, ...], steps: tuple[Step, ...]) -> Isometry:
    short: list[Step] = []
    shapes = [source]  # before each step of `short`, and after the last
    for kind, how in steps:
        how = tuple(how)
        if kind == "view":
            how = _resolved(shapes[-1], how)
        elif kind != "permute" or sorted(how) != list(range(len(shapes[-1]))):
            raise ValueError(f"{kind} {how} is no isometric step from {shapes[-1]}.")
        elif [i for i in how if shapes[-1][i] != 1] == [
            i for i in range(len(how)) if shapes[-1][i] != 1
        ]:  # only dimensions of size 1 move
            kind, how = "view", tuple(shapes[-1][i] for i in how)
        if short and short[-1][0] == kind:
            _, last = short.pop()
            shapes.pop()
            how = how if kind == "view" else tuple(last[i] for i in how)
        now = shapes[-1]
        if how != (now if kind == "view" else tuple(range(len(now)))):
            short.append((kind, how))
            shapes.append(how if kind == "view" else tuple(now[i] for i in how))
    return Isometry(source, tuple(short))


def _resolved(now: tuple[int, ...], how: tuple[int, ...]) -> tuple[int, ...]:
    """A view's shape with -1 spelled out."""
    if -1 in how:
        rest = prod(n for n in how if n != -1)
        how = tuple(prod(now) // max(1, rest) if n == -1 else n for n in how)
    if prod(how) != prod(now):
        raise ValueError(f"{now} cannot be viewed as {how}.")
    return how


class Mapped(Factor):
    """G[b] = isometry(factor[b]). Lengths and angles are the inner factor's."""

    tiles = False

    def __init__(self, factor: Factor, isometry: Isometry) -> None:
        if factor.shape != isometry.source:
            raise ValueError(f"An isometry from {isometry.source} cannot map {factor}.")
        super().__init__(factor.batch, isometry.target, factor.device, factor.dtype)
        self.factor = factor
        self.isometry = isometry
        self.guarded = factor.guarded

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

    def matvec(self, v: Tensor) -> Tensor:
        """The inner products with v brought back."""
        return self.factor.matvec(self.isometry.invert(v.reshape(1, *self.shape))[0])

    def weighted_sum(self, c: Tensor) -> Tensor:
        """The inner sum, mapped."""
        return self.isometry.apply(self.factor.weighted_sum(c)[None])[0]

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
        self.tiles, self.guarded = factor.tiles, factor.guarded

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

    def matvec(self, v: Tensor) -> Tensor:
        """The inner products with the slice of v."""
        return self.factor.matvec(self.cut(v.reshape(self.shape)))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """The inner sum between zeros."""
        return self.fill(self.factor.weighted_sum(c))

    def _inside(self, factor: Factor) -> "Embedded":
        return Embedded(factor, self.shape, self.index)

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
