"""Norms of an `Outer` from the Grams of its positions, and what others have from these Grams.

Owns: the symmetric half in rows of blocks, the numbers a guard needs, what goes to `Notes`.
Does not know: when this is the method to use, and when its result may be trusted (`outer_norms`).
"""

from math import prod

import torch
from torch import Tensor

from pergrad.factors import costs
from pergrad.factors.notes import Notes
from pergrad.factors.numeric import result_dtype, tracing
from pergrad.factors.workspace import chunks, lent, scratch


def gram(g: Tensor, a: Tensor, notes: Notes | None = None) -> tuple[Tensor, Tensor]:
    """Σ_ts (g_t·g_s)(a_t·a_s), half of it, and |A|²|G|², both (B,)."""
    return _Grams(g, a, notes or Notes()).norms()


class _Grams:
    """The Grams of both sides, block by block, of some examples at a time."""

    def __init__(self, g: Tensor, a: Tensor, notes: Notes) -> None:
        B, N, T, _ = g.shape
        self.g, self.a, self.notes = g, a, notes
        self.dtype = result_dtype(g, a)
        block = -(-T // costs.gram_blocks(T))
        self.bounds = [(lo, min(T, lo + block)) for lo in range(0, T, block)]
        self.block = block
        self.plain = not tracing(g, a)
        self.asked = notes.summed if N == 1 else None  # the side whose sum a bias asks about
        # the Gram of the side that others read too: formed by one of them, or here for them
        self.known: list[Tensor] | None = None
        self.ours: list[Tensor] | None = None
        if self.plain:
            self.known = notes.blocks("rows")
            if self.known is None:
                shapes = [(B * N, hi - lo, T - lo) for lo, hi in self.bounds]
                self.ours = notes.room(shapes, self.dtype)

    def norms(self) -> tuple[Tensor, Tensor]:
        """The squared norms, and the sizes of what they are sums of."""
        g, notes = self.g, self.notes
        B, N, T, _ = g.shape
        # what is read alone needs no room; half precision is widened first
        copies = sum(x.shape[3] * (x.dtype != self.dtype) for x in (g, self.a))
        each = N * T * (copies + 2 * self.block) * self.dtype.itemsize
        cut = chunks(B, each, scratch(g.device))
        if self.plain:
            count = 2 * (cut[0].stop * N) * self.block * T
            with lent(count, self.dtype, g.device) as room:
                pieces = [self._piece(rows, room) for rows in cut]
        else:
            pieces = [self._piece(rows, None) for rows in cut]
        if self.ours is not None:
            notes.keep(self.ours, "rows")
        found = pieces[0] if len(pieces) == 1 else [torch.cat(x) for x in zip(*pieces, strict=True)]
        if self.asked is not None:
            notes.sq_norms, notes.sizes = found[2:]
        return found[0], found[1]

    def _piece(self, rows: slice, room: Tensor | None) -> list[Tensor]:
        """Norms and sizes of some examples, and of their sums if these are asked about."""
        N, T = self.g.shape[1:3]
        G, A = (x[rows].to(self.dtype).reshape(-1, T, x.shape[3]) for x in (self.g, self.a))
        halves = (None, None) if room is None else room.chunk(2)
        sums: list[Tensor] = []  # the product's, of the traces, and of the side asked about
        for i in range(len(self.bounds)):
            left = self._product(G, self.g, rows, i, halves[0])
            right = self._product(A, self.a, rows, i, halves[1])
            here = [_trace(left), _trace(right)]
            if self.asked is not None:
                here.append(_upper_and_lower(left if self.asked is self.g else right))
            if not self.plain:
                both = left * right
            else:  # a block that others will read is only read
                both = right.mul_(left) if self.notes.read is self.g else left.mul_(right)
            here.append(_upper_and_lower(both))
            sums = here if i == 0 else [x + y for x, y in zip(sums, here, strict=True)]
        size = sums[0] * sums[1]
        found = [sums[-1], size] if N == 1 else [x.view(-1, N).sum(1) for x in (sums[-1], size)]
        if self.asked is None:
            return found
        return [*found, sums[2], T * sums[0 if self.asked is self.g else 1]]

    def _product(self, x: Tensor, side: Tensor, rows: slice, i: int, room: Tensor | None) -> Tensor:
        """Block i of the Gram of one side."""
        lo, hi = self.bounds[i]
        if room is None:
            return torch.bmm(x[:, lo:hi], x[:, lo:].mT)
        shared = (self.known or self.ours) if side is self.notes.read else None
        if shared is None:
            shape = (len(x), hi - lo, x.shape[1] - lo)
            into = room[: prod(shape)].view(shape)
        else:
            N = side.shape[1]
            into = shared[i][rows.start * N : rows.stop * N]
            if self.known is not None:
                return into
        return torch.bmm(x[:, lo:hi], x[:, lo:].mT, out=into)


def _trace(x: Tensor) -> Tensor:
    """(n,): of (n, T, T) or more columns, for guards alone."""
    return x.detach().diagonal(dim1=1, dim2=2).sum(1)


def _upper_and_lower(x: Tensor) -> Tensor:
    """(n,): sum of rows (n, T, T + S) that start at a symmetric matrix' diagonal.

    Columns beyond the square stand for the rows below it too.
    """
    _, rows, columns = x.shape
    if columns == rows:
        return x.sum((1, 2))
    return x[:, :, :rows].sum((1, 2)) + 2 * x[:, :, rows:].sum((1, 2))
