"""`Factor`: per-example gradients of one parameter, and what can be asked of them.

Owns: the contract, and the algorithms that work for every factor, over dense pieces.
Does not know: which factors there are, graphs, parameters' names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from pergrad.factors.numeric import Index, flat, normal_index, row_squares
from pergrad.factors.workspace import by_chunks, chunks, limit, row_bytes


class Factor(ABC):
    """G[b], b < B: the gradients of B examples by one parameter of shape `shape`. Immutable.

    `dense()` is the specification of everything else. Results have `dtype`, the dtype of the
    tensors held but at least float32.
    """

    batch: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    tiles = True  # whether `tile` costs its share of `dense`; else it costs all of it
    guarded = False  # whether `sq_norms` returns what `guard.repaired` does, or needs no guard

    def __init__(
        self, batch: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.batch = batch
        self.shape = tuple(shape)
        self.device = device
        self.dtype = dtype

    # -- what a class must say -----------------------------------------------------------------

    @abstractmethod
    def dense(self) -> Tensor:
        """(B, *shape): the gradients themselves."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """(B,): inner product of every row with v, shaped as the parameter."""

    @abstractmethod
    def weighted_sum(self, c: Tensor) -> Tensor:
        """Sum over b of c[b] G[b], shaped as the parameter."""

    @abstractmethod
    def scale(self, c: Tensor) -> "Factor":
        """Row b times c[b]."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors held; changing one of them in place changes the factor."""

    @abstractmethod
    def _select(self, index: Index) -> "Factor":
        """`select` of a normal index."""

    @abstractmethod
    def _map(self, change: Callable[[Tensor], Tensor]) -> "Factor":
        """The same factor over changed floating-point tensors (and integers on their device)."""

    # -- what follows from dense pieces ----------------------------------------------------------

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The parameter seen as a matrix: its first dimension, and all the rest."""
        return (self.shape[0], prod(self.shape[1:])) if self.shape else (1, 1)

    @property
    def bytes_per_row(self) -> int:
        """What forming one dense row takes."""
        return row_bytes(self.shape, self.dtype)

    def tile(self, lo: int, hi: int) -> Tensor:
        """(B, (hi - lo) * C): rows lo:hi of the parameter seen as a matrix (R, C)."""
        wide = self.matrix_shape[1]
        return flat(self.dense())[:, lo * wide : hi * wide]

    def pick(self, rows: Tensor) -> Tensor | None:
        """(B, U, C): chosen rows of the matrix, or None where that costs all of `dense`."""
        return None

    def sq_norms(self) -> Tensor:
        """(B,): squared norm of every row."""
        return over_tiles((self,), lambda parts, lo, hi: row_squares(parts[0].tile(lo, hi)))

    def dot(self, other: "Factor") -> Tensor:
        """(B,): inner products, row b with row b."""
        from pergrad.factors import algebra  # it knows all classes, so it cannot be above

        return algebra.dot(self, other)

    def gram(self, other: "Factor") -> Tensor:
        """(B, K): all inner products with the rows of another factor, or of itself."""
        from pergrad.factors import algebra

        return algebra.gram(self, other)

    # -- rows and coordinates ----------------------------------------------------------------------

    def select(self, index: Index | int) -> "Factor":
        """The rows of a slice, a LongTensor or a mask."""
        return self._select(normal_index(index, self.batch, self.device))

    def times_diagonal(self, diagonal: Tensor) -> "Factor":
        """Every row times `diagonal`, element by element; shaped as the parameter."""
        if tuple(diagonal.shape) != self.shape:
            raise ValueError(f"A diagonal for {self.shape} has shape {tuple(diagonal.shape)}.")
        return self._times_diagonal(diagonal.to(self.device, self.dtype))

    def _times_diagonal(self, diagonal: Tensor) -> "Factor":
        from pergrad.factors.lazy import Scaled

        return Scaled(self, diagonal)

    def kronecker(self, A: Tensor | float | None, S: Tensor | float | None) -> "Factor":
        """G -> S G A, the parameter as a matrix; each None, a number, a diagonal or a matrix."""
        rows, wide = self.matrix_shape
        out: Factor = self
        left, right = None, None
        for name, given, size in (("A", A, wide), ("S", S, rows)):
            if given is None:
                continue
            value = torch.as_tensor(given).to(self.device, self.dtype)
            if value.dim() == 0:
                out = out.scale(value.expand(self.batch))
            elif tuple(value.shape) not in ((size,), (size, size)):
                raise ValueError(
                    f"{name} for a parameter of shape {self.shape} must be a number, ({size},) or "
                    f"({size}, {size}), not {tuple(value.shape)}."
                )
            elif name == "A":
                right = value
            else:
                left = value
        return out if left is None and right is None else out._kronecker(right, left)

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> "Factor":
        """`kronecker` with tensors of one or two dimensions."""
        from pergrad.factors.lazy import Pulled, Sandwich

        return Pulled(self, Sandwich(A, S), self.shape)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Factor":
        """The same rows elsewhere, or in another floating dtype."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return self._map(move)

    def detach(self) -> "Factor":
        """The same rows without their graph."""
        return self._map(Tensor.detach)

    def __repr__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{type(self).__name__}(B={self.batch}, shape={self.shape}, {kind})"

    def _zeros(self, *size: int) -> Tensor:
        """Zeros of the result's dtype."""
        return torch.zeros(size, dtype=self.dtype, device=self.device)


Piece = Callable[[tuple[Factor, ...], int, int], Tensor]


def over_tiles(factors: tuple[Factor, ...], piece: Piece) -> Tensor:
    """(B,): sum of piece(the same rows of all factors, lo, hi) over tiles lo:hi.

    A chunk of examples at a time; where one example alone exceeds the budget, in several tiles.
    """
    first = factors[0]
    count = first.matrix_shape[0]
    budget = limit(first.device)
    each = sum(f.bytes_per_row for f in factors)
    spans = [slice(0, count)]
    if each > budget and all(f.tiles for f in factors):
        spans = chunks(count, each // max(1, count), budget)

    def total(rows: slice) -> Tensor:
        whole = rows == slice(0, first.batch)
        parts = factors if whole else tuple(f.select(rows) for f in factors)
        out = first._zeros(parts[0].batch)
        for span in spans:
            out = out + piece(parts, span.start, span.stop)
        return out

    return by_chunks(first.batch, each, total, like=first._zeros(0), budget=budget)
