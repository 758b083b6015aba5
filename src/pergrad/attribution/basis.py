"""Queries times a curvature's inverse, kept in its basis, where that costs less.

Owns: which blocks are compared in the basis, and inner products there.
Does not know: data sets, files, how a curvature was estimated.

    g_q' (F + damping)⁻¹ g_i  =  the sum of (Ql' G_q Qr) * (Ql' G_i Qr) / (Lambda + damping)

For an outer product of one position Ql' (g a') Qr = (Ql' g) (Qr' a)', so neither side is rotated as a
matrix. All other blocks are solved as they are.
"""  # noqa: E501

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pergrad.attribution.fit import Curved, Fit
from pergrad.factors import Dense, Factor, Outer
from pergrad.matrix import GradientMatrix


class Solved:
    """(F + damping)⁻¹ times queries' gradients, to be compared with examples'."""

    def __init__(self, fit: Fit, queries: Iterable[GradientMatrix]) -> None:
        self.fit = fit
        inside: dict[str, list[Tensor]] = {}
        outside: dict[str, list[Tensor]] = {}
        for J in queries:
            with J._working(), torch.no_grad():
                for c in fit.curved:
                    weight = c.block.weight
                    turned = _turned(c, J._factors[weight]) if weight not in outside else None
                    if turned is not None:
                        rows = turned.dense()[:, None]
                        inside.setdefault(weight, []).append(rows / self._divisor(c, rows))
                        continue
                    if weight in inside:  # the batches before had one position, and this has more
                        outside |= self._out(c, inside.pop(weight))
                    own = {n: J._factors[n].dense() for n in c.block.names}
                    for n, part in fit.solve_block(c, own).items():
                        outside.setdefault(n, []).append(part)
        self.inside = {n: torch.cat(parts) for n, parts in inside.items()}
        self.outside = {n: torch.cat(parts) for n, parts in outside.items()}

    def against(self, J: GradientMatrix) -> Tensor:
        """(B, Q): inner products of examples' gradients with all queries."""
        total: Tensor | None = None
        for _, part in self.by_block(J):
            total = part if total is None else total + part.to(total)
        assert total is not None
        return total

    def by_block(self, J: GradientMatrix) -> Iterator[tuple[str, Tensor]]:
        """The same in parts: a block's weight, and (B, Q)."""
        with J._working(), torch.no_grad():
            for c in self.fit.curved:
                for part in self._block(c, J):
                    yield c.block.weight, part

    def _block(self, c: Curved, J: GradientMatrix) -> Iterable[Tensor]:
        weight = c.block.weight
        if weight in self.inside:
            turned = _turned(c, J._factors[weight])
            if turned is not None:
                yield turned.gram(Dense(self.inside[weight][:, 0]))
                return
            self.outside |= {n: rows[0] for n, rows in self._out(c, [self.inside[weight]]).items()}
            del self.inside[weight]
        for n in c.block.names:
            factor = J._factors[n]
            yield factor.gram(Dense(self.outside[n].to(factor.device, factor.dtype)))

    def _divisor(self, c: Curved, like: Tensor) -> Tensor:
        return c.Lambda.to(like) + self.fit.added[c.block.weight]

    def _out(self, c: Curved, parts: list[Tensor]) -> dict[str, list[Tensor]]:
        """Rows in the basis as rows of the parameters."""
        back = c.block.grads(c.back(torch.cat(parts)), self.fit.shapes)
        return {n: [rows] for n, rows in back.items()}


def _turned(c: Curved, factor: Factor) -> Outer | None:
    """An outer product of one position in the basis, its bias with it; None for all else."""
    block = c.block
    if not isinstance(factor, Outer) or block.how != "outer" or block.steps is not None:
        return None
    N, T, p, d = factor.sizes
    if T != 1 or (N, p, d) != (1, block.rows, block.columns) or c.left is None or c.right is None:
        return None
    g, a = block.extended(factor)
    return Outer(g @ c.left.to(g), a @ c.right.to(a))
