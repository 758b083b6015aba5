"""Norms of an `Outer` from the Grams of its positions, and of a sum over them.

Owns: the symmetric half in rows of blocks, the numbers a guard needs.
Does not know: when this is the method to use, and when its result may be trusted (`outer.norms`).
"""

from math import prod

import torch
from torch import Tensor

from pergrad.factors import costs
from pergrad.factors.numeric import result_dtype, tracing
from pergrad.factors.workspace import chunks, lent, scratch


def gram(g: Tensor, a: Tensor, side: int | None = None) -> list[Tensor]:
    """Σ_ts (g_t·g_s)(a_t·a_s), half of it, and |A|²|G|², both (B,).

    And |Σ_t s_t|² and T |S|² of a side, g (0) or a (1), if one is asked for and there is one group.
    """
    return _Grams(g, a, side).norms()


class _Grams:
    """The Grams of both sides, block by block, of some examples at a time."""

    def __init__(self, g: Tensor, a: Tensor, side: int | None) -> None:
        _, N, T, _ = g.shape
        self.g, self.a = g, a
        self.dtype = result_dtype(g, a)
        block = -(-T // costs.gram_blocks(T))
        self.bounds = [(lo, min(T, lo + block)) for lo in range(0, T, block)]
        self.block = block
        self.plain = not tracing(g, a)
        self.side = side if N == 1 else None

    def norms(self) -> list[Tensor]:
        """The squared norms, and the sizes of what they are sums of."""
        g = self.g
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
        return pieces[0] if len(pieces) == 1 else [
            torch.cat(x) for x in zip(*pieces, strict=True)
        ]  # fmt: skip

    def _piece(self, rows: slice, room: Tensor | None) -> list[Tensor]:
        """Norms and sizes of some examples, and of their sums if these are asked about."""
        N, T = self.g.shape[1:3]
        G, A = (x[rows].to(self.dtype).reshape(-1, T, x.shape[3]) for x in (self.g, self.a))
        halves = (None, None) if room is None else room.chunk(2)
        sums: list[Tensor] = []  # the product's, of the traces, and of the side asked about
        for i in range(len(self.bounds)):
            left, right = self._product(G, i, halves[0]), self._product(A, i, halves[1])
            here = [_trace(left), _trace(right)]
            if self.side is not None:
                here.append(_upper_and_lower((left, right)[self.side]))
            here.append(_upper_and_lower(left.mul_(right) if self.plain else left * right))
            sums = here if i == 0 else [x + y for x, y in zip(sums, here, strict=True)]
        size = sums[0] * sums[1]
        found = [sums[-1], size] if N == 1 else [x.view(-1, N).sum(1) for x in (sums[-1], size)]
        return found if self.side is None else [*found, sums[2], T * sums[self.side]]

    def _product(self, x: Tensor, i: int, room: Tensor | None) -> Tensor:
        """Block i of the Gram of one side."""
        lo, hi = self.bounds[i]
        if room is None:
            return torch.bmm(x[:, lo:hi], x[:, lo:].mT)
        shape = (len(x), hi - lo, x.shape[1] - lo)
        return torch.bmm(x[:, lo:hi], x[:, lo:].mT, out=room[: prod(shape)].view(shape))


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
