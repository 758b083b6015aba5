"""`Rows`: gradients of a table by the rows that were looked up.

Owns: the class, and the sums over equal (example, id).
Does not know: products of two factors (`products`), padding conventions of any op.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from pergrad.factors.base import Factor
from pergrad.factors.isometry import Isometry, isometry
from pergrad.factors.numeric import (
    Index,
    columns,
    last_squares,
    reading_waits,
    result_dtype,
    row_squares,
    tracing,
)
from pergrad.factors.workspace import by_chunks, chunks, limit
from pergrad.recording import is_recorded


class Rows(Factor):
    """G[b] = Σ_t e[ids[b,t]] ⊗ g[b,t], where an id of -1 adds nothing.

    Args:
        ids: (B, T), integers below shape[0].
        g: (B, T, *shape[1:]).
        shape: the table's. Neither (B, V, ...) nor a T × T mask is ever formed for the norms.
        sparse: whether the look-up leaves a sparse gradient.
    """

    multilinear = True

    sparse = False

    def __init__(
        self, ids: Tensor, g: Tensor, shape: tuple[int, ...], *, sparse: bool = False
    ) -> None:
        shape = tuple(shape)
        if not shape or ids.dim() != 2 or tuple(g.shape) != (*ids.shape, *shape[1:]):
            raise ValueError(
                f"ids {tuple(ids.shape)} and g {tuple(g.shape)} do not fit a table {shape}."
            )
        super().__init__(len(g), shape, g.device, result_dtype(g))
        self.ids = ids
        self.g = g
        self.sparse = sparse

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where in (B T), whose, and which row: the lookups that count, in order.

        Recorded, all of them, as nobody can say how many count: the others are of zeros.
        """
        ids = self.ids.reshape(-1).long()
        if is_recorded():
            where = torch.arange(len(ids), device=ids.device)
            ids = ids.clamp(0, max(0, self.shape[0] - 1))
            return where, where // max(1, self.ids.shape[1]), ids
        where = (ids >= 0).nonzero()[:, 0]
        ids = ids[where]
        if ids.numel() and int(ids.max()) >= self.shape[0]:
            raise ValueError(f"Row {int(ids.max())} is looked up in a table {self.shape}.")
        return where, where // max(1, self.ids.shape[1]), ids

    def positions(self, where: Tensor) -> Tensor:
        """(U, C): g at positions of (B T)."""
        if is_recorded():
            return self._present()[where]
        return self.g.reshape(self.ids.numel(), self.matrix_shape[1])[where].to(self.dtype)

    @cached_property
    def _segments(self) -> tuple[Tensor, Tensor]:
        _, whose, ids = self.entries
        keys, segment = torch.unique(whose * self.shape[0] + ids, return_inverse=True)
        return keys, segment

    def segments(self) -> tuple[Tensor, Tensor]:
        """Ascending keys example * V + id (U,), and the sum of g over each (U, C)."""
        keys, segment = self._segments
        # index_add, not a difference of running sums: that would spread a NaN over what follows
        return keys, self._add_up(self.entries[0], segment, len(keys))

    def _add_up(self, where: Tensor, target: Tensor, count: int) -> Tensor:
        """(count, C): g at `where`, summed into rows `target`."""
        out = self._zeros(count, self.matrix_shape[1])
        return out.index_add(0, target, self.positions(where))

    def ids_present(self) -> Tensor:
        """Ascending: every row that any example looked up."""
        return torch.unique(self.entries[2])

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.tile(0, self.shape[0]).reshape(self.batch, *self.shape)

    def tile(self, lo: int, hi: int) -> Tensor:
        """Only the lookups of rows lo:hi are read."""
        where, whose, ids = self.entries
        inside = ((ids >= lo) & (ids < hi)).nonzero()[:, 0]
        target = whose[inside] * (hi - lo) + ids[inside] - lo
        out = self._add_up(where[inside], target, self.batch * (hi - lo))
        return out.reshape(self.batch, (hi - lo) * self.matrix_shape[1])

    def pick(self, rows: Tensor) -> Tensor | None:
        """(B, U, C); the rows must differ."""
        place = torch.full((self.shape[0],), -1, device=self.device)
        place[rows] = torch.arange(len(rows), device=self.device)
        where, whose, ids = self.entries
        inside = (place[ids] >= 0).nonzero()[:, 0]
        target = whose[inside] * len(rows) + place[ids[inside]]
        out = self._add_up(where[inside], target, self.batch * len(rows))
        return out.reshape(self.batch, len(rows), self.matrix_shape[1])

    @property
    def bytes_per_lookup_row(self) -> int:
        """What the lookups of one example take, twice over: gathered, and summed."""
        return 2 * self.ids.shape[1] * (self.matrix_shape[1] * self.dtype.itemsize + 8)

    def sq_norms(self) -> Tensor:
        """Sort by (example, id), sum each segment, square: O(B T C)."""

        def piece(rows: slice) -> Tensor:
            part = self if rows == slice(0, self.batch) else self._select(rows)
            if tracing(part.g):
                keys, values = part.segments()
                whose = keys // max(1, self.shape[0])
                return self._zeros(part.batch).index_add(0, whose, values.square().sum(1))
            return part._sorted_sq_norms() if reading_waits(self.device) else part._sq_norms()

        return by_chunks(self.batch, self.bytes_per_lookup_row, piece, like=self._zeros(0))

    def _sq_norms(self) -> Tensor:
        """Rows that an example looks up once are squared where they are; only others are summed."""
        where, whose, ids = self.entries
        _, segment, counts = torch.unique(
            whose * self.shape[0] + ids, return_inverse=True, return_counts=True
        )
        squares = last_squares(self.g.reshape(self.ids.numel(), self.matrix_shape[1]), self.dtype)
        again = counts[segment] > 1
        total = self._zeros(self.batch)
        total = total.index_add(0, whose, torch.where(again, 0.0, squares[where]))
        several = again.nonzero()[:, 0]
        if several.numel():
            place = (counts > 1).cumsum(0) - 1  # the segments that are left, renumbered
            target = place[segment[several]]
            count = int(place[-1]) + 1
            sums = row_squares(self._add_up(where[several], target, count))
            owner = whose.new_empty(count).index_copy(0, target, whose[several])
            total = total.index_add(0, owner, sums)
        return total

    def _sorted_sq_norms(self) -> Tensor:
        """The same by sums of as many rows as there are lookups, so that no size has to be read."""
        count = self.shape[0]
        if count == 0:
            return self._zeros(self.batch)
        ids = self.ids.long().clamp_max(count - 1)
        first = count * torch.arange(self.batch, device=self.device)
        keys, order = torch.where(ids >= 0, first[:, None] + ids, -1).reshape(-1).sort()
        new = torch.cat([keys.new_zeros(min(1, len(keys))), (keys[1:] != keys[:-1]).long()])
        segment = new.cumsum(0)
        g = self._present()[order]
        sums = torch.zeros_like(g).index_add_(0, segment, g)
        owner = torch.zeros_like(keys).scatter_(0, segment, keys.clamp_min(0) // count)
        return self._zeros(self.batch).index_add(0, owner, row_squares(sums))

    def _add_all(self, out: Tensor, c: Tensor) -> Tensor:
        """`out` and the weighted sum of all lookups, without reading how many those are."""
        if self.shape[0] == 0:
            return out
        ids = self.ids.reshape(-1).long().clamp(0, self.shape[0] - 1)
        return out.index_add(0, ids, self._present(c))

    def _present(self, c: Tensor | None = None) -> Tensor:
        """(B T, C): g times c[b]; zeros where there is no id, NaN where it is beyond the table."""
        g = self.g.reshape(self.ids.numel(), self.matrix_shape[1]).to(self.dtype)
        if c is not None:  # before the zeros: a weight may be infinite
            g = g * c.repeat_interleave(self.ids.shape[1])[:, None]
        ids = self.ids.reshape(-1, 1)
        return torch.where(ids < 0, 0.0, torch.where(ids < self.shape[0], g, torch.nan))

    def matvec(self, v: Tensor) -> Tensor:
        """Σ_t v[ids[b,t]] · g[b,t]."""
        v = v.to(self.device, self.dtype).reshape(self.matrix_shape)

        def piece(rows: slice) -> Tensor:
            part = self._select(rows)
            where, whose, ids = part.entries
            products = (v[ids] * part.positions(where)).sum(1)
            return self._zeros(part.batch).index_add(0, whose, products)

        return by_chunks(self.batch, self.bytes_per_lookup_row, piece, like=self._zeros(0))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """Σ_bt c[b] e[ids[b,t]] ⊗ g[b,t]."""
        c = c.to(self.device, self.dtype)
        out = self._zeros(*self.matrix_shape)
        for rows in chunks(self.batch, self.bytes_per_lookup_row, limit(self.device)):
            part = self._select(rows)
            if reading_waits(self.device):
                out = part._add_all(out, c[rows])
                continue
            where, whose, ids = part.entries
            out = out.index_add(0, ids, part.positions(where) * c[rows][whose, None])
        return out.reshape(self.shape)

    def weighted_sums(self, C: Tensor) -> Tensor:
        """One after the other: a table's rows, formed, are far wider than its lookups."""
        sums = [self.weighted_sum(c) for c in C.mT]
        return torch.stack(sums) if sums else self._zeros(0, *self.shape)

    def weighted_gradient(self, c: Tensor) -> Tensor:
        """With `sparse` a row for each look-up, as torch leaves it."""
        if not self.sparse:
            return self.weighted_sum(c)
        where, whose, ids = self.entries
        values = self.positions(where) * c.to(self.device, self.dtype)[whose, None]
        values = values.reshape(len(ids), *self.shape[1:])
        return torch.sparse_coo_tensor(ids[None], values, self.shape, check_invariants=False)

    def second_moment(self, c: Tensor) -> Tensor:
        """Σ_b c[b] (Σ_t e[ids[b,t]] ⊗ g[b,t])²: rows that nobody looked up cost nothing."""
        c = c.to(self.device, self.dtype)
        out = self._zeros(*self.matrix_shape)
        for rows in chunks(self.batch, self.bytes_per_lookup_row, limit(self.device)):
            keys, values = self._select(rows).segments()
            count = max(1, self.shape[0])
            whose = c[rows][torch.div(keys, count, rounding_mode="floor")]
            out = out.index_add(0, keys % count, values.square() * whose[:, None])
        return out.reshape(self.shape)

    @property
    def norm_method(self) -> str:
        """Sums over segments of equal ids."""
        return "segments"

    @property
    def norm_cost(self) -> int:
        """Every looked up number once."""
        return self.g.numel()

    def absorb(self, chain: Isometry) -> Factor:
        """A view of each row of the table."""
        kind, how = chain.steps[0]
        if kind != "view" or how[:1] != self.shape[:1]:
            return super().absorb(chain)
        taken = Rows(self.ids, self.g.reshape(*self.ids.shape, *how[1:]), how)
        rest = isometry(taken.shape, chain.steps[1:])
        return taken.absorb(rest) if rest.steps else taken

    @property
    def joins(self) -> Hashable:
        """All lookups in the table."""
        return Rows

    def joined(self, others: Sequence["Rows"]) -> "Rows":
        """One lookup after the other."""
        ids = torch.cat([self.ids, *(f.ids for f in others)], 1)
        sparse = self.sparse and all(f.sparse for f in others)
        return Rows(ids, torch.cat([self.g, *(f.g for f in others)], 1), self.shape, sparse=sparse)

    @property
    def stacks(self) -> Hashable:
        """Those of about as many lookups: the fewer are filled up with none."""
        length = self.ids.shape[1].bit_length()
        return Rows, self.shape, length, self.ids.dtype, self.g.dtype, self.sparse

    def stacked(self, others: Sequence["Rows"]) -> "Rows":
        """One after the other along B."""
        parts = (self, *others)
        most = max(f.ids.shape[1] for f in parts)
        ids = [pad(f.ids, (0, most - f.ids.shape[1]), value=-1) for f in parts]
        g = [pad(f.g, (0, 0) * (f.g.dim() - 2) + (0, most - f.g.shape[1])) for f in parts]
        return Rows(torch.cat(ids), torch.cat(g), self.shape, sparse=self.sparse)

    def scale(self, c: Tensor) -> "Rows":
        """`g` times c[b]."""
        g = self.g.to(self.dtype) * columns(c.to(self.device, self.dtype), self.g)
        return Rows(self.ids, g, self.shape)

    def _times_diagonal(self, diagonal: Tensor) -> "Rows":
        return Rows(self.ids, self.g.to(self.dtype) * self._at_ids(diagonal), self.shape)

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> Factor:
        if S is not None and S.dim() == 2:
            return super()._kronecker(A, S)  # every row of the table is reached
        g = self.g.to(self.dtype).reshape(*self.ids.shape, self.matrix_shape[1])
        if A is not None:
            g = g * A if A.dim() == 1 else g @ A
        if S is not None:
            g = g * self._at_ids(S)[..., None]
        return Rows(self.ids, g.reshape(self.g.shape), self.shape)

    def _at_ids(self, table: Tensor) -> Tensor:
        """table[ids], with some row's values where there is no id."""
        if self.shape[0] == 0:
            return table.new_zeros((*self.ids.shape, *table.shape[1:]))
        return table[self.ids.long().clamp_min(0)]

    def _select(self, index: Index) -> "Rows":
        return Rows(self.ids[index], self.g[index], self.shape, sparse=self.sparse)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        return Rows(change(self.ids), change(self.g), self.shape, sparse=self.sparse)

    def tensors(self) -> tuple[Tensor, ...]:
        """`ids` and `g`."""
        return (self.ids, self.g)
