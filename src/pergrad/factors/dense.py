"""`Dense`, `Summed` and `Zero`: gradients that are simply there, and gradients that are not.

Owns: the three classes.
Does not know: other kinds.
"""

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from pergrad.factors.base import Factor
from pergrad.factors.guard import SqNorms
from pergrad.factors.isometry import Isometry
from pergrad.factors.numeric import (
    Index,
    columns,
    flat,
    flat_rows,
    result_dtype,
    row_squares,
    row_sums,
    row_weights,
    take_turns,
)
from pergrad.factors.products import dots, grams
from pergrad.factors.workspace import by_chunks, chunks, limit


class Dense(Factor):
    """G[b] = values[b]: biases, norm layers, whatever had to be formed.

    Args:
        values: (B, *shape).
        sq_norms: (B,), where whoever made the values has taken them as well.
    """

    multilinear = True

    def __init__(self, values: Tensor, sq_norms: Tensor | None = None) -> None:
        batch, *shape = values.shape
        super().__init__(batch, tuple(shape), values.device, result_dtype(values))
        self.values = values
        self._sq_norms = sq_norms

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.values.to(self.dtype)

    def tile(self, lo: int, hi: int) -> Tensor:
        """A view, cast where it must be."""
        wide = self.matrix_shape[1]
        return flat(self.values)[:, lo * wide : hi * wide].to(self.dtype)

    def pick(self, rows: Tensor) -> Tensor | None:
        """(B, U, C)."""
        return self.values.reshape(self.batch, *self.matrix_shape)[:, rows].to(self.dtype)

    def sq_norms(self) -> Tensor:
        """‖G[b]‖²."""
        if self._sq_norms is not None:
            return self._sq_norms
        if self.batch * self.bytes_per_row > limit(self.device):
            return super().sq_norms()
        return row_squares(self.values.to(self.dtype))

    def matvec(self, v: Tensor) -> Tensor:
        """G[b] · v."""
        v = v.to(self.device, self.dtype).reshape(-1)
        if self.batch * self.bytes_per_row <= limit(self.device):
            return torch.mv(flat(self.values).to(self.dtype), v)
        return by_chunks(
            self.batch,
            self.bytes_per_row,
            lambda rows: torch.mv(flat(self.values[rows]).to(self.dtype), v),
            like=self._zeros(0),
        )

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_b c[b] G[b]."""
        c = c.to(self.device, self.dtype)
        out = self._zeros(prod(self.shape))
        for rows in chunks(self.batch, self.bytes_per_row, limit(self.device)):
            out = out + torch.mv(flat(self.values[rows]).to(self.dtype).mT, c[rows])
        return out.reshape(self.shape)

    def absorb(self, chain: Isometry) -> "Dense":
        """The values, rearranged."""
        return Dense(chain.apply(self.values))

    @property
    def joins(self) -> Hashable:
        """All that is formed."""
        return Dense

    def joined(self, others: Sequence["Dense"]) -> "Dense":
        """The values, added."""
        return Dense(sum((f.dense() for f in others), self.dense()))

    @property
    def stacks(self) -> Hashable:
        """All that is formed, or soon is."""
        return Dense, self.shape, self.dtype

    def stacked(self, others: Sequence["Dense"]) -> "Dense":
        """The values, one after the other."""
        return Dense(torch.cat([self.dense(), *(f.dense() for f in others)]))

    def scale(self, c: Tensor) -> "Dense":
        """Row b times c[b]."""
        return Dense(self.dense() * columns(c.to(self.device, self.dtype), self.values))

    def _times_diagonal(self, diagonal: Tensor) -> "Dense":
        return Dense(self.dense() * diagonal)

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> "Dense":
        return Dense(sandwich(self.dense(), A, S))

    def _select(self, index: Index) -> "Dense":
        return Dense(self.values[index])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Dense":
        return Dense(change(self.values))

    def tensors(self) -> tuple[Tensor, ...]:
        """The values."""
        return (self.values,)


class SumTold(Protocol):
    """What may know the norms of sums over positions, see `outer.norms.Both`."""

    @property
    def tells(self) -> bool:
        """Whether it does."""

    def of_sum(self) -> SqNorms | None:
        """(B,): squared norms of the sums; None if it does not."""


class Summed(Dense):
    """G[b] = Σ_t g[b, t]: a bias behind a weight over the same g. Formed when asked for.

    Args:
        g: (B, 1, T, p).
        shape: the parameter's, of p elements.
        both: the norms of the weight and of this bias, if they are taken together.
    """

    both: SumTold | None = None

    def __init__(self, g: Tensor, shape: tuple[int, ...], both: SumTold | None = None) -> None:
        Factor.__init__(self, g.shape[0], shape, g.device, result_dtype(g))
        self.g = g
        self.both = both
        self._sq_norms = None
        self._formed: Tensor | None = None

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """(B, *shape)."""
        if self._formed is None:
            one = self.g.shape[2] == 1  # position: nothing to sum, and nothing to copy
            total = self.g.to(self.dtype) if one else self.g[:, 0].sum(1, dtype=self.dtype)
            self._formed = total.reshape(self.batch, *self.shape)
        return self._formed

    def sq_norms(self) -> Tensor:
        """‖Σ_t g_t‖²."""
        return self.sq_norms_and_doubts().settled()

    def sq_norms_and_doubts(self) -> SqNorms:
        """From what the weight's norms are taken from, if that tells."""
        told = None if self.both is None else self.both.of_sum()
        return SqNorms(super().sq_norms()) if told is None else told

    def formed(self) -> Dense:
        """The sums, unless their norms are told without them."""
        return self if self.both is not None and self.both.tells else Dense(self.values)

    def matvec(self, v: Tensor) -> Tensor:
        """Σ_t g_t · v, without the sums of single examples."""
        if self._formed is not None or self.g.dtype != self.dtype:
            return super().matvec(v)
        turns = take_turns(self.g)
        v = v.to(self.device, self.dtype).reshape(-1)
        return row_sums(torch.mv(flat_rows(self.g, turns=turns), v), self.batch, turns=turns)

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_bt c[b] g[b, t], without the sums of single examples."""
        if self._formed is not None or self.g.dtype != self.dtype:
            return super().weighted_sum(c)
        turns = take_turns(self.g)
        weights = row_weights(c.to(self.device, self.dtype), self.g.shape[2], turns=turns)
        return torch.mv(flat_rows(self.g, turns=turns).mT, weights).reshape(self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        """`g`."""
        return (self.g,)


class Zero(Factor):
    """G[b] = 0: a parameter that no loss reaches."""

    def __init__(
        self,
        batch: int,
        shape: tuple[int, ...],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        dtype = torch.promote_types(dtype, torch.float32)
        super().__init__(batch, shape, torch.device(device), dtype)

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self._zeros(self.batch, *self.shape)

    def tile(self, lo: int, hi: int) -> Tensor:
        """Zeros."""
        return self._zeros(self.batch, (hi - lo) * self.matrix_shape[1])

    def pick(self, rows: Tensor) -> Tensor | None:
        """Zeros."""
        return self._zeros(self.batch, len(rows), self.matrix_shape[1])

    def sq_norms(self) -> Tensor:
        """0."""
        return self._zeros(self.batch)

    def matvec(self, v: Tensor) -> Tensor:
        """0."""
        return self._zeros(self.batch)

    def weighted_sum(self, c: Tensor) -> Tensor:
        """0."""
        return self._zeros(*self.shape)

    def weighted_sums(self, C: Tensor) -> Tensor:
        """0."""
        return self._zeros(C.shape[1], *self.shape)

    def second_moment(self, c: Tensor) -> Tensor:
        """0."""
        return self._zeros(*self.shape)

    @property
    def norm_method(self) -> str:
        """None."""
        return "none"

    @property
    def norm_cost(self) -> int:
        """Nothing."""
        return 0

    def absorb(self, chain: Isometry) -> "Zero":
        """Zeros of another shape."""
        return Zero(self.batch, chain.target, self.device, self.dtype)

    @property
    def joins(self) -> Hashable:
        """All zeros."""
        return Zero

    def joined(self, others: Sequence["Zero"]) -> "Zero":
        """Itself."""
        return self

    def scale(self, c: Tensor) -> "Zero":
        """Itself."""
        return self

    def _times_diagonal(self, diagonal: Tensor) -> "Zero":
        return self

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> "Zero":
        return self

    def _select(self, index: Index) -> "Zero":
        if isinstance(index, slice):
            count = len(range(*index.indices(self.batch)))
        else:
            count = len(index)
        return Zero(count, self.shape, self.device, self.dtype)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Zero":
        """Elsewhere, or of another dtype."""
        return Zero(self.batch, self.shape, device or self.device, dtype or self.dtype)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Zero":
        return self

    def tensors(self) -> tuple[Tensor, ...]:
        """None."""
        return ()


@dots.register(Zero, Factor)
def _dot_zero(f: Zero, h: Factor) -> Tensor:
    return f._zeros(f.batch)


@grams.register(Zero, Factor)
def _gram_zero(f: Zero, h: Factor) -> Tensor:
    return f._zeros(f.batch, h.batch)


def sandwich(x: Tensor, A: Tensor | None, S: Tensor | None) -> Tensor:
    """S x A for every row of x (B, *shape), its first dimension against all others."""
    shape = x.shape
    rows = shape[1] if len(shape) > 1 else 1
    out = x.reshape(len(x), rows, prod(shape[2:]))
    if A is not None:
        A = A.to(x.dtype)
        out = out * A if A.dim() == 1 else out @ A
    if S is not None:
        S = S.to(x.dtype)
        out = out * S[:, None] if S.dim() == 1 else S @ out
    return out.reshape(shape)
