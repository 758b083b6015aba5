"""`Scaled`, `Pulled` and `Computed`: gradients that are evaluated when asked, a chunk at a time.

Owns: another factor seen through a linear map, and rows that a function computes; diagonal and
Kronecker maps of factors that have no formula for them.
Does not know: where a map or a function comes from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pergrad.factors.base import Factor, over_tiles, seen_through
from pergrad.factors.dense import Dense, sandwich
from pergrad.factors.numeric import Index, columns, flat, result_dtype, row_squares
from pergrad.factors.products import dots, grams
from pergrad.factors.rows import Rows
from pergrad.factors.workspace import by_chunks, chunks, limit


class Scaled(Factor):
    """G[b] = diagonal * factor[b], element by element."""

    def __init__(self, factor: Factor, diagonal: Tensor) -> None:
        if tuple(diagonal.shape) != factor.shape:
            raise ValueError(f"A diagonal for {factor.shape} has shape {tuple(diagonal.shape)}.")
        dtype = torch.promote_types(factor.dtype, diagonal.dtype)
        super().__init__(factor.batch, factor.shape, factor.device, dtype)
        self.factor = factor
        self.diagonal = diagonal
        self.tiles = factor.tiles

    @property
    def bytes_per_row(self) -> int:
        """The inner row and its product."""
        return super().bytes_per_row + self.factor.bytes_per_row

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.factor.dense() * self.diagonal

    def tile(self, lo: int, hi: int) -> Tensor:
        """The inner tile times its part of the diagonal."""
        return self.factor.tile(lo, hi) * self._matrix[lo:hi].reshape(-1)

    def pick(self, rows: Tensor) -> Tensor | None:
        """The inner rows times theirs of the diagonal."""
        picked = self.factor.pick(rows)
        return None if picked is None else picked * self._matrix[rows]

    @property
    def _matrix(self) -> Tensor:
        return self.diagonal.reshape(self.matrix_shape)

    @property
    def norm_method(self) -> str:
        """That of the inner factor."""
        return self.factor.norm_method

    @property
    def norm_cost(self) -> int:
        """That of the inner factor."""
        return self.factor.norm_cost

    def materialized(self) -> "Scaled":
        """The inner factor, formed."""
        return Scaled(self.factor.materialized(), self.diagonal)

    def matvec(self, v: Tensor) -> Tensor:
        """factor[b] · (diagonal * v)."""
        return self.factor.matvec(v.to(self.device, self.dtype) * self.diagonal)

    def weighted_sum(self, c: Tensor) -> Tensor:
        """`diagonal` * Σ_b c[b] factor[b]."""
        return self.factor.weighted_sum(c) * self.diagonal

    def second_moment(self, c: Tensor) -> Tensor:
        """`diagonal`² times the inner one."""
        # twice, not times the square: that may overflow where the products do not
        return self.factor.second_moment(c) * self.diagonal * self.diagonal

    def scale(self, c: Tensor) -> "Scaled":
        """The inner rows, scaled."""
        return Scaled(self.factor.scale(c), self.diagonal)

    def _times_diagonal(self, diagonal: Tensor) -> "Scaled":
        return Scaled(self.factor, self.diagonal * diagonal)

    def _select(self, index: Index) -> "Scaled":
        return Scaled(self.factor._select(index), self.diagonal)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Scaled":
        return Scaled(self.factor._map(change), change(self.diagonal))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Scaled":
        """The factor and the diagonal elsewhere."""
        return Scaled(self.factor.to(device, dtype), self.diagonal.to(device=device, dtype=dtype))

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the factor, and the diagonal."""
        return (*self.factor.tensors(), self.diagonal)


Pull = Callable[[Tensor], Tensor]


class Pulled(Factor):
    """G[b] = pull(factor.dense())[b] for a linear map `pull`, a chunk of examples at a time.

    Args:
        factor: the gradients before the map.
        pull: linear, (n, *factor.shape) -> (n, *shape), row by row.
        shape: the parameter's.
    """

    tiles = False

    def __init__(self, factor: Factor, pull: Pull, shape: tuple[int, ...]) -> None:
        super().__init__(factor.batch, shape, factor.device, factor.dtype)
        self.factor = factor
        self.pull = pull

    @property
    def bytes_per_row(self) -> int:
        """The row before and after, and as much again inside the map."""
        return 2 * (super().bytes_per_row + self.factor.bytes_per_row)

    def dense(self) -> Tensor:
        """(B, *shape)."""

        def piece(rows: slice) -> Tensor:
            part = self.factor if rows == slice(0, self.batch) else self.factor.select(rows)
            return self._pull(part.dense())

        return by_chunks(
            self.batch, self.bytes_per_row, piece, like=self._zeros(0), tail=self.shape
        )

    def _pull(self, x: Tensor) -> Tensor:
        out = self.pull(x)
        if out.shape != (len(x), *self.shape):
            raise ValueError(f"A pull to {self.shape} returned {tuple(out.shape)}.")
        return out.to(self.device, self.dtype)

    def materialized(self) -> Dense:
        """The rows, formed once and for all."""
        return Dense(self.dense())

    @property
    def norm_method(self) -> str:
        """A map of each row."""
        return "pull"

    @property
    def norm_cost(self) -> int:
        """Those of the inner rows, and of these; what the map costs is not known."""
        return self.factor.norm_cost + super().norm_cost

    def matvec(self, v: Tensor) -> Tensor:
        """pull(factor[b]) · v."""
        v = v.to(self.device, self.dtype).reshape(-1)
        return over_tiles((self,), lambda parts, lo, hi: torch.mv(flat(parts[0].dense()), v))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """pull(Σ_b c[b] factor[b]): linear, so one row goes through the map."""
        return self._pull(self.factor.weighted_sum(c)[None])[0]

    def scale(self, c: Tensor) -> "Pulled":
        """The inner rows, scaled."""
        return Pulled(self.factor.scale(c), self.pull, self.shape)

    def _select(self, index: Index) -> "Pulled":
        return Pulled(self.factor._select(index), self.pull, self.shape)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Pulled":
        # what `pull` holds cannot be changed: change what comes out of it
        pull = self.pull
        return Pulled(self.factor._map(change), lambda x: change(pull(x)), self.shape)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Factor:
        """Formed first: the map works where its own tensors are."""
        same = device is None or torch.device(device) == self.device
        if same and (dtype is None or dtype == self.dtype):
            return self
        return self.materialized().to(device, dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the factor; what the map holds is its own."""
        return self.factor.tensors()


class Computed(Factor):
    """G[b] = rows([b])[0], whatever that takes; a chunk of examples at a time.

    Args:
        batch: how many examples there are.
        shape: the parameter's.
        rows: example numbers (n,) -> (n, *shape).
        like: a tensor of the results' device and dtype.
    """

    tiles = False

    def __init__(
        self,
        batch: int,
        shape: tuple[int, ...],
        rows: Callable[[Tensor], Tensor],
        like: Tensor,
        index: Tensor | None = None,
    ) -> None:
        super().__init__(batch, shape, like.device, result_dtype(like))
        self.rows = rows
        self.index = torch.arange(batch, device="cpu") if index is None else index

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self._chunked(lambda part: part)

    def _chunked(
        self, of: Callable[[Tensor], Tensor], tail: tuple[int, ...] | None = None
    ) -> Tensor:
        tail = self.shape if tail is None else tail
        return by_chunks(self.batch, 2 * self.bytes_per_row,
                         lambda rows: of(self.rows(self.index[rows]).to(self.dtype)),
                         like=self._zeros(0), tail=tail)  # fmt: skip

    def materialized(self) -> Dense:
        """The rows, computed once and for all."""
        return Dense(self.dense())

    @property
    def norm_method(self) -> str:
        """Row by row."""
        return "loop"

    def sq_norms(self) -> Tensor:
        """(B,)."""
        return self._chunked(row_squares, ())

    def matvec(self, v: Tensor) -> Tensor:
        """(B,)."""
        v = v.to(self.device, self.dtype).reshape(-1)
        return self._chunked(lambda part: torch.mv(flat(part), v), ())

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_b c[b] G[b]."""
        total = self._zeros(*self.shape)
        c = c.to(self.device, self.dtype)
        for rows in chunks(self.batch, 2 * self.bytes_per_row, limit(self.device)):
            part = self.rows(self.index[rows]).to(self.dtype)
            total = total + (columns(c[rows], part) * part).sum(0)
        return total

    def scale(self, c: Tensor) -> Factor:
        """Formed first."""
        return self.materialized().scale(c)

    def _select(self, index: Index) -> "Computed":
        picked = self.index[index.cpu() if isinstance(index, Tensor) else index]
        return Computed(len(picked), self.shape, self.rows, self._zeros(0), picked)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Factor:
        return self.materialized()._map(change)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Factor:
        """Formed first."""
        return self.materialized().to(device, dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the function holds is its own."""
        return ()


@dataclass(frozen=True, eq=False, slots=True)
class Sandwich:
    """The linear map G -> S G A on rows."""

    A: Tensor | None
    S: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """(n, *shape) -> (n, *shape)."""
        return sandwich(x, self.A, self.S)


seen_through["diagonal"] = Scaled


def _sandwiched(factor: Factor, A: Tensor | None, S: Tensor | None) -> Pulled:
    return Pulled(factor, Sandwich(A, S), factor.shape)


seen_through["kronecker"] = _sandwiched


@dots.register(Scaled, Dense)
@dots.register(Scaled, Rows)
def _dot_scaled(f: Scaled, h: Factor) -> Tensor:
    return f.factor.dot(h.times_diagonal(f.diagonal))


@grams.register(Scaled, Dense)
@grams.register(Scaled, Rows)
def _gram_scaled(f: Scaled, h: Factor) -> Tensor:
    return f.factor.gram(h.times_diagonal(f.diagonal))
