"""`Sum`, several uses of one parameter, and `Placed`, some examples of a larger batch.

Owns: the two classes, and which parts of a sum become one.
Does not know: products of two factors (`algebra`).
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from pergrad.factors.base import Factor
from pergrad.factors.dense import Dense, Zero
from pergrad.factors.guard import repaired
from pergrad.factors.mapped import Embedded, Mapped
from pergrad.factors.numeric import Index
from pergrad.factors.outer import Outer
from pergrad.factors.rows import Rows


class Sum(Factor):
    """G[b] = Σ_i factors[i][b]: tied and re-used weights, with every cross term.

    Parts of one kind become one part: Dense and Dense, Rows and Rows, Outer and Outer of the same
    sizes (one after the other along T; that never costs more than their cross terms).
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        if not factors:
            raise ValueError("A sum of no factors has no shape.")
        first = factors[0]
        for f in factors:
            if (f.batch, f.shape) != (first.batch, first.shape):
                raise ValueError(f"{first} and {f} cannot be added.")
        self.factors = _merged(factors)
        dtype = first.dtype
        for f in factors:
            dtype = torch.promote_types(dtype, f.dtype)
        super().__init__(first.batch, first.shape, first.device, dtype)
        self.tiles = all(f.tiles for f in self.factors)

    @property
    def bytes_per_row(self) -> int:
        """One row of the sum and of one part."""
        return super().bytes_per_row + max(f.bytes_per_row for f in self.factors)

    def _total(self, of: Callable[[Factor], Tensor]) -> Tensor:
        total = of(self.factors[0]).to(self.dtype)
        for f in self.factors[1:]:
            total = total + of(f)
        return total

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self._total(lambda f: f.dense())

    def tile(self, lo: int, hi: int) -> Tensor:
        """The parts' tiles, added."""
        return self._total(lambda f: f.tile(lo, hi))

    def pick(self, rows: Tensor) -> Tensor | None:
        """The parts' rows, added."""
        total: Tensor | None = None
        for f in self.factors:
            part = f.pick(rows)
            if part is None:
                return None
            total = part if total is None else total + part
        return total

    def sq_norms(self) -> Tensor:
        """Σ_i ‖F_i‖² + 2 Σ_{i<j} F_i·F_j."""
        if len(self.factors) == 1:
            return self.factors[0].sq_norms().to(self.dtype)
        norms = [f.sq_norms().to(self.dtype) for f in self.factors]
        total = torch.stack(norms).sum(0)
        for i, f in enumerate(self.factors):
            for h in self.factors[:i]:
                total = total + 2 * f.dot(h)
        # parts that cancel: as with a Gram, the error is that of the parts' sizes
        sizes = torch.stack(norms).sqrt().sum(0).square()
        return repaired(total, sizes, lambda rows: Factor.sq_norms(self._select(rows)))

    def matvec(self, v: Tensor) -> Tensor:
        """The parts', added."""
        return self._total(lambda f: f.matvec(v))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """The parts', added."""
        return self._total(lambda f: f.weighted_sum(c))

    def _each(self, change: Callable[[Factor], Factor]) -> "Sum":
        return Sum([change(f) for f in self.factors])

    def scale(self, c: Tensor) -> "Sum":
        """The parts, scaled."""
        return self._each(lambda f: f.scale(c))

    def _times_diagonal(self, diagonal: Tensor) -> "Sum":
        return self._each(lambda f: f.times_diagonal(diagonal))

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> "Sum":
        return self._each(lambda f: f.kronecker(A, S))

    def _select(self, index: Index) -> "Sum":
        return self._each(lambda f: f._select(index))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Sum":
        return self._each(lambda f: f._map(change))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Sum":
        """The parts elsewhere."""
        return self._each(lambda f: f.to(device, dtype))

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all parts."""
        return tuple(t for f in self.factors for t in f.tensors())


def _merged(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Nested sums flattened, zeros dropped, parts of one kind joined; at least one part."""
    groups: dict[Hashable, list[Factor]] = {}
    for factor in factors:
        for part in factor.factors if isinstance(factor, Sum) else (factor,):
            groups.setdefault(_kind(part), []).append(part)
    zeros = groups.pop(Zero, [])
    if not groups:
        return (zeros[0],)
    return tuple(_joined(g) if len(g) > 1 else g[0] for g in groups.values())


def _kind(part: Factor) -> Hashable:
    """Equal for parts that can become one."""
    if isinstance(part, Outer):
        N, _, p, d = part.sizes
        return (Outer, N, p, d)
    if isinstance(part, Mapped):
        return (Mapped, part.isometry)
    if isinstance(part, Embedded):
        return (Embedded, part.index)
    if isinstance(part, Dense):
        return Dense
    return type(part) if isinstance(part, (Rows, Zero)) else id(part)


def _joined(parts: list[Factor]) -> Factor:
    """Several parts of one kind as one."""
    first = parts[0]
    if isinstance(first, Outer):
        outers = [f for f in parts if isinstance(f, Outer)]
        g = torch.cat([f.g for f in outers], 2)
        return Outer(g, torch.cat([f.a for f in outers], 2), first.shape)
    if isinstance(first, Rows):
        rows = [f for f in parts if isinstance(f, Rows)]
        ids = torch.cat([f.ids for f in rows], 1)
        return Rows(ids, torch.cat([f.g for f in rows], 1), first.shape)
    if isinstance(first, Mapped):
        return Mapped(Sum([f.factor for f in parts if isinstance(f, Mapped)]), first.isometry)
    if isinstance(first, Embedded):
        inner = Sum([f.factor for f in parts if isinstance(f, Embedded)])
        return Embedded(inner, first.shape, first.index)
    total = first.dense()
    for part in parts[1:]:
        total = total + part.dense()
    return Dense(total)


class Placed(Factor):
    """Rows index[i] = factor[i] of a batch of `batch` examples; all others are zero.

    Args:
        factor: the rows that there are.
        index: (factor.batch,), ascending, without repetition.
        batch: how many examples there are in all.
    """

    def __init__(self, factor: Factor, index: Tensor, batch: int) -> None:
        if index.shape != (factor.batch,):
            raise ValueError(f"{factor.batch} rows cannot go to {tuple(index.shape)} places.")
        super().__init__(batch, factor.shape, factor.device, factor.dtype)
        self.factor = factor
        self.index = index.to(factor.device)
        self.tiles = factor.tiles

    @property
    def bytes_per_row(self) -> int:
        """The inner row's, and the row."""
        return super().bytes_per_row + self.factor.bytes_per_row

    def spread(self, rows: Tensor) -> Tensor:
        """Results for the inner rows as results for all: zeros elsewhere."""
        out = rows.new_zeros((self.batch, *rows.shape[1:]))
        return out.index_copy(0, self.index, rows)

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.spread(self.factor.dense())

    def tile(self, lo: int, hi: int) -> Tensor:
        """The inner tile, spread."""
        return self.spread(self.factor.tile(lo, hi))

    def pick(self, rows: Tensor) -> Tensor | None:
        """The inner rows, spread."""
        picked = self.factor.pick(rows)
        return None if picked is None else self.spread(picked)

    def sq_norms(self) -> Tensor:
        """The inner norms, and zeros."""
        return self.spread(self.factor.sq_norms())

    def matvec(self, v: Tensor) -> Tensor:
        """The inner products, and zeros."""
        return self.spread(self.factor.matvec(v))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """The inner sum with the inner rows' weights."""
        return self.factor.weighted_sum(c.to(self.device)[self.index])

    def _inside(self, factor: Factor) -> "Placed":
        return Placed(factor, self.index, self.batch)

    def scale(self, c: Tensor) -> "Placed":
        """The inner rows, scaled."""
        return self._inside(self.factor.scale(c.to(self.device)[self.index]))

    def _times_diagonal(self, diagonal: Tensor) -> "Placed":
        return self._inside(self.factor.times_diagonal(diagonal))

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> "Placed":
        return self._inside(self.factor.kronecker(A, S))

    def _select(self, index: Index) -> "Placed":
        place = torch.full((self.batch,), -1, device=self.device)
        place[self.index] = torch.arange(self.factor.batch, device=self.device)
        place = place[index]
        present = (place >= 0).nonzero()[:, 0]
        return Placed(self.factor._select(place[present]), present, len(place))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Placed":
        return self._inside(self.factor._map(change))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Placed":
        """The inner rows elsewhere."""
        return self._inside(self.factor.to(device, dtype))

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the inner factor, and the index."""
        return (*self.factor.tensors(), self.index)
