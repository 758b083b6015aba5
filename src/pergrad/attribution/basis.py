"""Queries times a curvature's inverse, kept in its basis, where that costs less.

Owns: which blocks are compared in the basis, and inner products there.
Does not know: data sets, files, how a curvature was estimated.

    g_q' (F + damping)⁻¹ g_i  =  the sum of (Ql' G_q Qr) * (Ql' G_i Qr) / (Lambda + damping)

For an outer product of one position Ql' (g a') Qr = (Ql' g) (Qr' a)', so neither side is rotated as a
matrix. All other blocks are solved as they are.
"""  # noqa: E501

from collections.abc import Iterable, Iterator, Mapping

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
                        inside.setdefault(weight, []).append(rows.div_(self._divisor(c, rows)))
                        continue
                    if weight in inside:  # the batches before had one position, and this has more
                        outside |= self._out(c, inside.pop(weight))
                    for n, part in self._solved(c, J._factors).items():
                        outside.setdefault(n, []).append(part)
        self.inside = {n: _joined(parts) for n, parts in inside.items()}
        self.outside = {n: _joined(parts) for n, parts in outside.items()}

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

    def _solved(self, c: Curved, factors: Mapping[str, Factor]) -> dict[str, Tensor]:
        """A block's part of the queries, formed; turned before they are formed if that is less."""
        factor = factors[c.block.weight]
        if _is_plain(c, factor):
            assert isinstance(factor, Outer)
            _, T, p, d = factor.sizes
            if T * (p * p + d * d) < p * d * (p + d):
                rows = _in_basis(c, factor).dense()[:, None]
                G = c.back(rows.div_(self._divisor(c, rows)))
                return c.block.grads(G, self.fit.shapes)
        return self.fit.solve_block(c, {n: factors[n].dense() for n in c.block.names})

    def _divisor(self, c: Curved, like: Tensor) -> Tensor:
        return c.Lambda.to(like) + self.fit.added[c.block.weight]

    def _out(self, c: Curved, parts: list[Tensor]) -> dict[str, list[Tensor]]:
        """Rows in the basis as rows of the parameters."""
        back = c.block.grads(c.back(torch.cat(parts)), self.fit.shapes)
        return {n: [rows] for n, rows in back.items()}


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _turned(c: Curved, factor: Factor) -> Outer | None:
    """An outer product of one position in the basis, its bias with it; None for all else."""
    if not _is_plain(c, factor) or factor.sizes[1] != 1:  # type: ignore[attr-defined]
        return None
    assert isinstance(factor, Outer)
    return _in_basis(c, factor)


def _is_plain(c: Curved, factor: Factor) -> bool:
    """Whether the factor is a sum of outer products of the block's own sides, both with a basis."""
    block = c.block
    if not isinstance(factor, Outer) or block.how != "outer" or block.steps is not None:
        return False
    N, _, p, d = factor.sizes
    return (N, p, d) == (1, block.rows, block.columns) and None not in (c.left, c.right)


def _in_basis(c: Curved, factor: Outer) -> Outer:
    g, a = c.block.extended(factor)
    assert c.left is not None
    assert c.right is not None
    return Outer(g @ c.left.to(g), a @ c.right.to(a))
