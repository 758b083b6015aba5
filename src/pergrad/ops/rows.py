"""Rows of a tensor, grouped by example.

Owns: the step from a layout to arrays with a leading example dimension, which factors want.
Does not know: ops.
"""

from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from pergrad.factors import Beside, Dense, Factor, Outer, Placed, Rows
from pergrad.factors.numeric import result_dtype
from pergrad.graph.layout import NOBODY, Layout, regular_pattern, smear
from pergrad.recording import constants


class Bucket(NamedTuple):
    """Examples with about equally many rows, padded to the same number of positions."""

    examples: Tensor | None  # their numbers, ascending; None: all examples in order
    positions: int


class _Places(NamedTuple):
    """Where the rows of all buckets come from, one bucket after the other."""

    rows: Tensor  # (padded rows,) row numbers, any where padded
    padded: Tensor  # the places that are padded


class Partition:
    """R rows, each of one example (or of none), as arrays (examples, positions, ...)."""

    def __init__(self, owners: Tensor, batch: int) -> None:
        self.owners = owners
        self.batch = batch

    @cached_property
    def _pattern(self) -> tuple[int, int] | None:
        pattern = regular_pattern(self.owners) if self.owners.numel() else None
        return pattern if pattern and int(self.owners.max()) + 1 == self.batch else None

    @cached_property
    def _laid(self) -> tuple[list[Bucket], _Places | None]:
        if self._pattern is not None:
            return [Bucket(None, prod(self._pattern))], None
        return _buckets(self.owners)

    @property
    def buckets(self) -> list[Bucket]:
        """All examples that have a row, in groups of similar counts."""
        return self._laid[0]

    @cached_property
    def foldable(self) -> bool:
        """Whether the rows of an example lie one after the other, or the examples take turns."""
        return self._pattern is not None and 1 in self._pattern

    @property
    def one_each(self) -> bool:
        """Whether row b is all there is of example b."""
        return self._pattern == (1, 1)

    def fold(self, rows: Tensor, *groups: int) -> Tensor:
        """(R, p) -> (B, *groups, T, p), the same memory; if foldable. Groups are of size 1."""
        assert self._pattern is not None
        outer, inner = self._pattern
        if outer == 1:
            return rows.reshape(self.batch, *groups, inner, rows.shape[1])
        return rows.reshape(outer, self.batch, *groups, rows.shape[1]).movedim(0, -2)

    def gather(self, rows: Tensor, fill: float = 0) -> list[Tensor]:
        """(R, *rest) -> for each bucket (n, positions, *rest)."""
        rest = rows.shape[1:]
        buckets, places = self._laid
        if self._pattern is not None:
            outer, inner = self._pattern
            shaped = rows.reshape(outer, self.batch, inner, *rest)
            if outer == 1:
                return [shaped[0]]
            return [shaped.transpose(0, 1).reshape(self.batch, outer * inner, *rest)]
        if places is None:
            return []
        taken = rows.index_select(0, places.rows.to(rows.device))
        if len(places.padded):  # filled, not multiplied: it must not carry another row's nan
            taken.index_fill_(0, places.padded.to(rows.device), fill)
        found, start = [], 0
        for examples, positions in buckets:
            assert examples is not None
            count = len(examples) * positions
            found.append(taken[start : start + count].view(len(examples), positions, *rest))
            start += count
        return found

    def place(self, factors: Sequence[Factor]) -> Factor:
        """One factor for all examples from one per bucket."""
        placed = [
            factor if bucket.examples is None else Placed(factor, bucket.examples, self.batch)
            for factor, bucket in zip(factors, self.buckets, strict=True)
        ]
        return placed[0] if len(placed) == 1 else Beside(placed)


def _buckets(owners: Tensor) -> tuple[list[Bucket], _Places | None]:
    """Examples of similar row counts together: padding at most doubles the work."""
    rows = (owners != NOBODY).nonzero().reshape(-1)
    order = rows[torch.argsort(owners[rows], stable=True)]
    examples, counts = torch.unique_consecutive(owners[order], return_counts=True)
    starts = counts.cumsum(0) - counts
    size_class = torch.ceil(torch.log2(counts.double())).long()
    buckets, indices, absent = [], [], []
    for size in size_class.unique().tolist():
        members = (size_class == size).nonzero().reshape(-1)
        longest = int(counts[members].max())
        steps = torch.arange(longest, device="cpu")
        index = (starts[members, None] + steps).clamp_max(order.numel() - 1)
        buckets.append(Bucket(examples[members], longest))
        indices.append(order[index].reshape(-1))
        absent.append((steps >= counts[members, None]).reshape(-1))
    if not buckets:
        return [], None
    return buckets, _Places(torch.cat(indices), torch.cat(absent).nonzero().reshape(-1))


def row_owners(layout: Layout, dims: Sequence[int]) -> Tensor | None:
    """(R,): the owner of each row that runs over `dims`; None if a row has several."""
    rest = [d for d in range(len(layout.shape)) if d not in dims]
    # Where nobody's gradient arrives the cotangent is zero, so the row's lone owner may have it.
    whole = smear(layout, rest)
    if whole is None:
        return None
    owner = whole.owner.permute(*dims, *rest).reshape([whole.owner.shape[d] for d in dims])
    return owner.expand([layout.shape[d] for d in dims]).reshape(-1)


def partition(layout: Layout, dims: Sequence[int], batch: int) -> Partition | None:
    """Rows that run over `dims` of the tensor, in that order; None if a row has several owners.

    Kept with the layout: a plan's layouts are the same objects at every call.
    """
    key = (tuple(dims), batch)
    if key not in layout.memo:
        owners = row_owners(layout, dims)
        layout.memo[key] = None if owners is None else Partition(owners, batch)
    found: Partition | None = layout.memo[key]
    return found


def outer(g: Tensor, a: Tensor, groups: Partition, shape: Sequence[int]) -> Factor | None:
    """`Outer` from (R, N, p) and (R, N, d) rows, by example; None if no row has an owner."""
    factors = [
        Outer(left.transpose(1, 2), right.transpose(1, 2), shape=tuple(shape))  # (n, N, T, p)
        for left, right in zip(groups.gather(g), groups.gather(a), strict=True)
    ]
    return groups.place(factors) if factors else None


def outer_by_group(
    g: Tensor, a: Tensor, owners: Tensor, groups: Tensor, count: int, batch: int,
    shape: Sequence[int],
) -> Factor:  # fmt: skip
    """`Outer` from (R, p) and (R, d) rows, each of one example and of one of `count` groups.

    The rows of an example and group may lie anywhere; a group of -1 belongs to none.
    """
    owners, groups = owners.to(g.device), groups.to(g.device)
    inside = ((owners >= 0) & (groups >= 0)).nonzero()[:, 0]
    keys = owners[inside] * count + groups[inside]
    order = torch.argsort(keys, stable=True)
    keys, rows = keys[order], inside[order]
    counts = torch.bincount(keys, minlength=batch * count)
    place = torch.arange(len(keys), device=g.device) - (counts.cumsum(0) - counts)[keys]
    longest = int(counts.max()) if len(keys) else 0

    def lay(values: Tensor) -> Tensor:
        padded = values.new_zeros(batch * count, longest, values.shape[1])
        padded = padded.index_put((keys, place), values[rows])
        return padded.reshape(batch, count, longest, values.shape[1])

    return Outer(lay(g), lay(a), shape=tuple(shape))


def rows_by_id(
    ids: Tensor, g: Tensor, groups: Partition, shape: Sequence[int], *, sparse: bool = False
) -> Factor | None:
    """`Rows` from (R,) ids and (R, *rest) gradients, grouped by example."""
    factors = [
        Rows(own, values, tuple(shape), sparse=sparse)
        for own, values in zip(groups.gather(ids, fill=-1), groups.gather(g), strict=True)
    ]
    return groups.place(factors) if factors else None


def reduced(values: Tensor, layout: Layout, shape: Sequence[int], batch: int) -> Dense:
    """Sum a gradient over everything but the example and the operand's own dimensions.

    `values` has the op's output shape; the operand was broadcast from `shape`.
    """
    shape = tuple(shape)
    lead = values.dim() - len(shape)
    summed = [d for d in range(values.dim())
              if d < lead or (shape[d - lead] == 1 and values.shape[d] != 1)]  # fmt: skip
    with constants():
        layout = smear(layout, [d for d in range(values.dim()) if d not in summed]) or layout
        varying = list(layout.varying)
        one = len(varying) == 1 and varying[0] in summed
        pattern = regular(layout, batch) if one else None
    dtype = result_dtype(values)
    if pattern is not None:  # rows in a regular order: one plain sum, no scattering
        outer, inner = pattern
        (dim,) = varying
        sizes = values.shape
        folded = values.reshape(*sizes[:dim], outer, batch, inner, *sizes[dim + 1 :])
        drop = [d if d < dim else d + 2 for d in summed if d != dim] + [dim, dim + 2]
        drop = [d for d in drop if folded.shape[d] != 1]
        total = folded.sum(drop, keepdim=True, dtype=dtype) if drop else folded.to(dtype)
        return Dense(total.movedim(dim + 1, 0).reshape(batch, *shape))
    plain = [d for d in summed if d not in varying]
    if plain:
        values = values.sum(plain, keepdim=True, dtype=dtype)
    own = [d for d in varying if d not in summed]  # one position of the operand, several owners
    order = [d for d in varying if d in summed] + own
    rest = [d for d in range(values.dim()) if d not in varying]
    counts = [values.shape[d] for d in own]
    cells = prod(counts)
    with constants():
        owners = layout.owner.permute((*order, *rest)).reshape(-1, cells)
        keys = torch.where(owners < 0, -1, owners * cells + torch.arange(cells, device="cpu"))
        keys = keys.reshape(-1)
    rows = values.to(dtype).permute((*order, *rest))  # no dimension at all for a scalar
    rows = rows.reshape(len(keys), *rows.shape[len(order) :])
    total = by_owner(rows, keys, batch * cells).reshape(batch, *counts, *rows.shape[1:])
    dims = own + rest
    return Dense(
        total.permute(0, *[1 + dims.index(d) for d in sorted(dims)]).reshape(batch, *shape)
    )


def over_rows(shape: Sequence[int], rank: int) -> bool:
    """Whether an operand of this shape is the same for all along the first of `rank` dimensions."""
    return len(shape) < rank or shape[0] == 1


@lru_cache(maxsize=256)
def regular(layout: Layout, batch: int) -> tuple[int, int] | None:
    """(outer, inner) of a layout along one dimension, if every example has its regular share."""
    owners = layout.owner.reshape(-1)
    pattern = regular_pattern(owners)
    return pattern if pattern is not None and int(owners.max()) + 1 == batch else None


def in_order(layout: Layout, batch: int) -> bool:
    """Whether index i along the first dimension is example i, all of them there."""
    return layout.shape[0] == batch and regular(layout, batch) == (1, 1)


def by_owner(rows: Tensor, owners: Tensor, batch: int) -> Tensor:
    """(R, *rest) -> (batch, *rest): the sum of each example's rows."""
    owners = owners.to(rows.device)
    # Row `batch` collects what belongs to nobody.
    total = rows.new_zeros(batch + 1, *rows.shape[1:])
    return total.index_add(0, torch.where(owners < 0, batch, owners), rows)[:batch]
