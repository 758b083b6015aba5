"""A curvature's inverse as a few Kronecker products, through which factors stay factors.

Owns: the expansion of 1 / (Lambda + damping), its error, and what it makes of outer products.
Does not know: how a curvature was estimated, data sets, queries.

    1 / (Lambda + damping)  ~  the sum over r < terms of u_r v_r'    (where gradients are, the best)
    (F + damping)⁻¹ (g a')  ~  the sum over r of (Ql diag(u_r) Ql' g) (Qr diag(v_r) Qr' a)'

A gradient of T positions becomes one of T x terms. Where that is no smaller than the gradient
itself, and for blocks that are no outer products, the solve is exact and its rows are formed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pergrad.attribution.blocks import Block
from pergrad.errors import UsageError
from pergrad.factors import Dense, Factor, Outer
from pergrad.precondition import Preconditioner

if TYPE_CHECKING:
    from pergrad.attribution.fit import Curved, Fit


def check_terms(terms: object) -> None:
    """A positive number, or None.

    Raises:
        UsageError: it is something else.
    """
    good = isinstance(terms, int) and not isinstance(terms, bool) and terms >= 1
    if terms is not None and not good:
        raise UsageError(
            f"terms is {terms!r}; pass a positive number of Kronecker products, such as 8, or None "
            "for the exact inverse."
        )


@dataclass(frozen=True)
class _Expanded:
    """One block: a matrix for either side and each term."""

    left: Tensor  # (terms, groups, rows, rows)
    right: Tensor  # (terms, groups, columns, columns)


class FewTerms(Preconditioner):
    """A curvature's inverse in a few terms; made by `fit.in_terms(8)`.

    `off` is how far scores are expected to be off, relative to their size: the error of
    1 / (Lambda + damping), where both gradients have the energy Lambda.
    """

    def __init__(self, fit: "Fit", terms: int) -> None:
        check_terms(terms)
        self.fit, self.terms = fit, terms
        self._expanded: dict[str, _Expanded] = {}
        whole = missing = 0.0
        for c in fit.curved:
            if c.block.how == "outer" and c.left is not None and c.right is not None:
                D = 1 / (c.Lambda.double() + fit.added[c.block.weight])
                U, V = _best(D, terms, c.Lambda.double())
                whole += float((D * c.Lambda).square().sum())
                missing += float(((D - U @ V) * c.Lambda).square().sum())
                self._expanded[c.block.weight] = _Expanded(
                    _sandwiched(c.left, U.permute(2, 0, 1)),
                    _sandwiched(c.right, V.permute(1, 0, 2)),
                )
        self.off = (missing / whole) ** 0.5 if whole else 0.0

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """The gradients are for the parameters that the curvature is about."""
        self.fit.check(shapes)

    def apply_all(self, factors: Mapping[str, Factor]) -> dict[str, Factor]:
        """Outer products stay outer products; all else is formed, exactly."""
        found: dict[str, Factor] = {}
        for c in self.fit.curved:
            factor = factors[c.block.weight]
            if self._worth(c, factor):
                assert isinstance(factor, Outer)
                found |= self._outer(c.block, factor, factors)
            else:
                own = {n: factors[n].dense() for n in c.block.names}
                solved = self.fit.solve_block(c, own)
                found |= {n: Dense(solved[n].to(factors[n].dtype)) for n in c.block.names}
        return {n: found[n] for n in factors}

    def _worth(self, c: "Curved", factor: Factor) -> bool:
        """Whether the factor of all terms is smaller than the gradient."""
        if c.block.weight not in self._expanded or not isinstance(factor, Outer):
            return False
        N, T, p, d = factor.sizes
        same = (N, p, d) == (c.block.groups, c.block.rows, c.block.columns)
        return same and c.block.steps is None and self.terms * T * (p + d) < p * d

    def _outer(
        self, block: Block, factor: Outer, factors: Mapping[str, Factor]
    ) -> dict[str, Factor]:
        parts = self._expanded[block.weight]
        g, a = block.extended(factor)  # (B, N, T, rows), (B, N, T, columns)
        # position t of term r at r * T + t
        left = torch.cat([g @ L.to(g).mT for L in parts.left], 2)
        right = torch.cat([a @ R.to(a).mT for R in parts.right], 2)
        found: dict[str, Factor] = {}
        g, a = left[..., : block.rows], right[..., : block.columns]
        if block.bias is not None:
            rows = left[..., block.rows :].mT @ a if block.bias_is_row else (
                g.mT @ right[..., block.columns :])  # fmt: skip
            own = factors[block.bias]
            found[block.bias] = Dense(rows.reshape(own.batch, *own.shape).to(own.dtype))
        found[block.weight] = Outer(g.contiguous(), a.contiguous(), factor.shape)
        return found

    def __repr__(self) -> str:
        return f"{self.fit!r}\ninverse in {self.terms} terms, scores off by {self.off:.1%}"


def _best(D: Tensor, terms: int, Lambda: Tensor) -> tuple[Tensor, Tensor]:
    """(N, p, R), (N, R, d): the product of rank R closest to D (N, p, d), weighted by energy.

    An entry counts by how large gradients are there on both sides, Lambda, taken as a product of
    its means by rows and by columns. Unweighted, most of the terms would go to where there is
    nothing (an LDS of .565 instead of .682 on digits, with eight).
    """
    rows, columns = (_positive(Lambda.mean(k)) for k in (2, 1))
    M = rows[:, :, None] * D * columns[:, None, :]
    wide = M.shape[1] <= M.shape[2]
    M = M if wide else M.mT
    _, vectors = torch.linalg.eigh(M @ M.mT)
    U = vectors[..., -terms:]
    V = U.mT @ M
    U, V = (U, V) if wide else (V.mT, U.mT)
    return U / rows[:, :, None], V / columns[:, None, :]


def _positive(weights: Tensor) -> Tensor:
    """Relative to the largest, and none so small that dividing by it loses digits."""
    most = weights.amax(1, True)
    return (weights / torch.where(most > 0, most, 1.0)).clamp_min(1e-4)


def _sandwiched(Q: Tensor, values: Tensor) -> Tensor:
    """(R, N, d, d): Q diag(values[r]) Q' of values (R, N, d)."""
    Q = Q.double()
    return (Q * values[..., None, :]) @ Q.mT
