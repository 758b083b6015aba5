"""`Factor`: per-example gradients of one parameter, and what can be asked of them.

Owns: the contract, and the algorithms that work for every factor, over dense pieces.
Does not know: which factors there are (`products` and `seen_through` ask those that were entered),
graphs, parameters' names.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pergrad.factors.guard import SqNorms
from pergrad.factors.isometry import Isometry
from pergrad.factors.numeric import (
    Index,
    added,
    bytes_of,
    flat,
    normal_index,
    row_dots,
    row_squares,
)
from pergrad.factors.products import dots, grams
from pergrad.factors.workspace import by_chunks, chunks, limit, row_bytes, scratch

# The kinds that see any other factor through a map: "isometry", "diagonal" and "kronecker". Their
# files enter them, for they stand above this one.
seen_through: dict[str, Callable[..., "Factor"]] = {}


class Factor(ABC):
    """G[b], b < B: the gradients of B examples by one parameter of shape `shape`. Immutable.

    `dense()` is the specification of everything else. Results have `dtype`, the dtype of the
    tensors held but at least float32.
    """

    batch: int
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    multilinear = False  # whether a row is zero wherever that of one of its tensors is
    tiles = True  # whether `tile` costs its share of `dense`; else it costs all of it

    def __init__(
        self, batch: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.batch = batch
        self.shape = tuple(shape)
        self.device = device
        self.dtype = dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a pickle; one of before held what its norms had left for others."""
        self.__dict__ |= {name: x for name, x in state.items() if name not in ("notes", "guarded")}

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

    def sq_norms_and_doubts(self) -> SqNorms:
        """`sq_norms` before those in doubt, if any, are taken again."""
        return SqNorms(self.sq_norms())

    def weighted_sums(self, C: Tensor) -> Tensor:
        """(Q, *shape): for each q the sum over b of C[b, q] G[b].

        Rows are formed once for all q, a chunk of examples at a time: with T positions that takes
        (T + Q) p d multiply-adds an example, where Q sums on their own would take Q T p d.
        """
        C = C.to(self.device, self.dtype)
        if C.shape[1] == 1:
            return self.weighted_sum(C[:, 0])[None]
        out = self._zeros(C.shape[1], prod(self.shape))
        for rows in chunks(self.batch, 2 * self.bytes_per_row, limit(self.device)):
            out = out + C[rows].mT @ flat(self.select(rows).dense())
        return out.reshape(C.shape[1], *self.shape)

    def weighted_gradient(self, c: Tensor) -> Tensor:
        """`weighted_sum`, sparse where the op's own gradient is."""
        return self.weighted_sum(c)

    def second_moment(self, c: Tensor) -> Tensor:
        """Sum over b of c[b] G[b]², element by element; shaped as the parameter."""
        c = c.to(self.device, self.dtype)
        count, wide = self.matrix_shape
        budget = min(limit(self.device), 8 * scratch(self.device))
        each = 2 * self.bytes_per_row  # and the squares
        spans = [slice(0, count)]
        if each > budget and self.tiles:  # one example alone exceeds it
            spans = chunks(count, each // max(1, count), budget)
        total = self._zeros(count * wide)
        for rows in chunks(self.batch, each, budget):
            part = self if rows == slice(0, self.batch) else self.select(rows)
            tiles = (part.tile(span.start, span.stop) for span in spans)
            terms = [torch.mv((tile * tile).mT, c[rows]) for tile in tiles]
            total = added(total, terms[0] if len(terms) == 1 else torch.cat(terms))
        return total.reshape(self.shape)

    def dot(self, other: "Factor") -> Tensor:
        """(B,): inner products, row b with row b."""
        f, h = _meeting(self, other)
        if f.batch != h.batch:
            raise ValueError(f"Row by row needs equally many rows, not {f.batch} and {h.batch}.")
        return f.sq_norms() if f is h else dots(f, h)

    def gram(self, other: "Factor") -> Tensor:
        """(B, K): all inner products with the rows of another factor; of itself they cost less."""
        return grams(*_meeting(self, other))

    @property
    def norm_method(self) -> str:
        """How `sq_norms` is computed, in one word."""
        return "sum"

    @property
    def norm_cost(self) -> int:
        """Multiply-adds of `sq_norms`, for all examples."""
        return self.batch * prod(self.shape)

    # -- other forms of the same rows --------------------------------------------------------------

    def absorb(self, chain: Isometry) -> "Factor":
        """The factor after some steps (at least one), as the simplest one that says the same."""
        return seen_through["isometry"](self, chain)

    @property
    def joins(self) -> Hashable:
        """Equal for factors of one kind of which `joined` makes one; else like nothing else."""
        return object()

    def joined(self, others: Sequence[Any]) -> "Factor":
        """The sum of this factor and of others that join it, as one of their kind."""
        raise NotImplementedError(f"{type(self).__name__} joins no others.")

    @property
    def stacks(self) -> Hashable:
        """Equal for factors of other examples of which `stacked` makes one; else None."""
        return None

    def stacked(self, others: Sequence[Any]) -> "Factor":
        """The examples of this factor, then those of others that stack with it."""
        raise NotImplementedError(f"{type(self).__name__} is stacked on no others.")

    def materialized(self) -> "Factor":
        """The same rows with all that is lazy formed: what it needs may soon be gone."""
        return self

    def settled(self) -> "Factor":
        """The same rows laid out for whoever asks: no others will join them."""
        return self

    def formed(self) -> "Factor":
        """The same rows formed, if the norms form them anyway and they take no more memory."""
        return self

    def met_by(self, others: int) -> "Factor":
        """The same rows for `gram` with many batches of `others` rows, one after the other.

        Formed, where each of these products would form them anew.
        """
        return self

    @property
    def smaller_formed(self) -> bool:
        """Whether the rows take no more memory than what is held."""
        return self.batch * self.bytes_per_row <= bytes_of(self.tensors())

    def cloned(self) -> "Factor":
        """The same rows over memory of their own."""
        return self._map(torch.clone)

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
        return seen_through["diagonal"](self, diagonal)

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
        return seen_through["kronecker"](self, A, S)

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


def _meeting(f: Factor, h: Factor) -> tuple[Factor, Factor]:
    """Two factors whose rows can be multiplied, both with the wider of the two dtypes."""
    if not isinstance(h, Factor):
        raise TypeError(
            f"{type(h).__name__} is no kind of factor, so it has no products with {f}. A kind is a "
            "class that derives from Factor."
        )
    if f.shape != h.shape:
        raise ValueError(f"Gradients of parameters of shapes {f.shape} and {h.shape} do not meet.")
    if f.device != h.device:
        raise ValueError(f"Gradients on {f.device} and on {h.device} do not meet; use `.to`.")
    if f.dtype == h.dtype:
        return f, h
    dtype = torch.promote_types(f.dtype, h.dtype)
    return (f if f.dtype == dtype else f.to(dtype=dtype)), (
        h if h.dtype == dtype else h.to(dtype=dtype)
    )


@dots.general(Factor)
def general_dot(f: Factor, h: Factor) -> Tensor:
    """Over tiles of the parameter."""
    return over_tiles(
        (f, h), lambda parts, lo, hi: row_dots(parts[0].tile(lo, hi), parts[1].tile(lo, hi))
    )


@grams.general(Factor)
def general_gram(f: Factor, h: Factor) -> Tensor:
    """Over tiles of the parameter where both sides can give tiles; else over blocks of examples."""
    rows, _ = f.matrix_shape
    out = f._zeros(f.batch, h.batch)
    if f.tiles and h.tiles and rows > 1:
        each = f.batch * f.bytes_per_row + (0 if h is f else h.batch * h.bytes_per_row)
        for span in chunks(rows, each // rows, limit(f.device)):
            F = f.tile(span.start, span.stop)
            H = F if h is f else h.tile(span.start, span.stop)
            out = out + F @ H.mT
        return out
    bands = []
    budget = limit(f.device) // 2
    for here in chunks(f.batch, f.bytes_per_row, budget):
        F = flat(f.select(here).dense())
        cells = []
        for there in chunks(h.batch, h.bytes_per_row, budget):
            same = h is f and there == here
            H = F if same else flat(h.select(there).dense())
            cells.append(F @ H.mT)
        bands.append(torch.cat(cells, 1) if cells else f._zeros(len(F), 0))
    return torch.cat(bands) if bands else out
