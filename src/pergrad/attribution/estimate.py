"""From per-example gradients to a curvature: covariances of the two sides, then eigenvalues.

Owns: the sums over examples that K-FAC, EK-FAC, Shampoo and the diagonal are made of.
Does not know: data sets, labels, files.

    K-FAC       A = mean over positions of right right', S = sum over positions of left left', mean
                over examples; F = S ⊗ A
    EK-FAC      the eigenvectors of A and S; Lambda = mean over examples of (Qs' G Qa)²
    Shampoo     the eigenvectors of E[G G'] and E[G' G]; Lambda likewise
    diagonal    no eigenvectors; Lambda = mean over examples of G²

A covariance of looked-up rows is diagonal, so it is kept as a vector, and its side keeps its
coordinates. So does a side wider than MOST_SIDE.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pergrad.attribution.blocks import MOST_SIDE, Block, outers, uses
from pergrad.factors import Correlation, Factor, Outer, Rows
from pergrad.factors.workspace import chunks, limit

NARROW = 128  # a product with fewer columns is slower than what it saves
Kind = Literal["kfac", "ekfac", "shampoo", "diagonal"]


@dataclass(frozen=True)
class Estimator:
    """The sums of one block, named tensors in float64, to which batches are added."""

    block: Block
    kind: Kind

    # --- the two sides ---------------------------------------------------------------------------

    @property
    def rotated(self) -> tuple[bool, bool]:
        """Whether the left and the right side get a basis."""
        _, rows, columns = self.block.shape
        if self.kind == "diagonal" or self.block.how == "diagonal":
            return False, False
        left = self.block.how != "table" and rows <= MOST_SIDE
        return left, columns <= MOST_SIDE and self.block.how != "vector"

    def empty_sides(self) -> dict[str, Tensor]:
        """Sums of the two sides, of their sizes, and how many positions there were."""
        N, rows, columns = self.block.shape
        left, right = self.rotated
        return {
            "left": torch.zeros((N, rows, rows) if left else (N, rows), dtype=torch.float64),
            "right": torch.zeros((N, columns, columns) if right else (N, columns),
                                 dtype=torch.float64),
            "positions": torch.zeros(1, dtype=torch.float64),
        }  # fmt: skip

    def add_sides(self, sums: dict[str, Tensor], factors: Mapping[str, Factor]) -> None:
        """Add a batch's gradients for one label."""
        if self.block.how == "vector" or self.kind == "shampoo":
            self._add_products(sums, factors)
            return
        for use in uses(factors[self.block.weight]) or ():
            part = self._looked_up(use) if isinstance(use, Rows) else self._multiplied(use)
            kind = f":{type(use).__name__}" if self.block.how == "shared" else ""
            for name, value in part.items():
                value = value.to("cpu", torch.float64)
                sums[name + kind] = sums[name + kind] + value if name + kind in sums else value

    def _multiplied(self, use: Factor) -> dict[str, Tensor]:
        """The sides of an Outer or Correlation; positions without gradient, such as padding, are
        left out, or A would depend on how far a batch was padded.
        """
        left, right = self.rotated
        total: dict[str, Tensor] = {}
        for part in outers(use):
            g, a = part.g.to(part.dtype), part.a.to(part.dtype)
            n, N, T, _ = g.shape
            each = g.new_full((N,), float(n * T))
            if T > 1 and not isinstance(use, Correlation):
                there = (g != 0).any(3) & (a != 0).any(3)
                g, a = g * there[..., None], a * there[..., None]
                each = there.sum((0, 2)).to(g)
            row, column = self._ones
            piece = {
                "left": _bordered(_second(g, full=left), g, each) if row
                else _second(g, full=left),
                "right": _bordered(_second(a, full=right), a, each) if column
                else _second(a, full=right),
                "positions": each.mean(),
            }  # fmt: skip
            total = {k: total[k] + v if k in total else v for k, v in piece.items()}
        return total

    @property
    def _ones(self) -> tuple[bool, bool]:
        """Whether the left and the right side have a one more, for a bias."""
        biased, row = self.block.bias is not None, self.block.bias_is_row
        return biased and row, biased and not row

    def _looked_up(self, use: Rows) -> dict[str, Tensor]:
        where, _, ids = use.entries
        g = use.positions(where)
        left, right = self.rotated
        counts = torch.bincount(ids, minlength=self.block.rows).to(g.dtype)
        return {
            "left": (counts.diag() if left else counts)[None],
            "right": (g.mT @ g if right else g.square().sum(0))[None],
            "positions": g.new_tensor(float(len(ids))),
        }

    def _add_products(self, sums: dict[str, Tensor], factors: Mapping[str, Factor]) -> None:
        """G G' and G' G, summed over examples."""
        left, right = self.rotated
        factor = factors[self.block.weight]
        parts = uses(factor)
        if self.block.how == "table" and parts is not None:
            for use in parts:
                assert isinstance(use, Rows)
                keys, rows = use.segments()
                squares = rows.square().sum(1)
                ids = keys % self.block.rows
                one = torch.zeros(self.block.rows, dtype=rows.dtype, device=rows.device)
                sums["left"] += one.index_add(0, ids, squares).cpu().double()[None]
                product = rows.mT @ rows if right else rows.square().sum(0)
                sums["right"] += product.cpu().double()[None]
        else:
            for G in self.block.dense(factors):  # (n, N, rows, columns)
                by_left = G.transpose(0, 1).transpose(2, 3).flatten(1, 2)  # (N, n columns, rows)
                by_right = G.transpose(0, 1).flatten(1, 2)  # (N, n rows, columns)
                sums["left"] += _gram(by_left, full=left).cpu().double()
                sums["right"] += _gram(by_right, full=right).cpu().double()
        sums["positions"] += factor.batch

    def sides(self, sums: Mapping[str, Tensor], examples: float) -> tuple[Tensor, Tensor]:
        """(A, S) from the sums; `examples` counts each once for every draw that was divided by."""
        right, left = sums["right"], sums["left"]
        if self.kind == "shampoo" or self.block.how in ("vector", "shared"):
            return right / examples, left / examples
        A, S = (left, right) if self.swapped else (right, left)
        return A / sums["positions"].clamp_min(1), S / examples

    @property
    def swapped(self) -> bool:
        """Whether the rows are the inputs: a table, or a weight (inputs, outputs)."""
        return self.block.how == "table" or (self.block.bias_is_row and self.block.bias is not None)

    def mixed(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of a weight with several uses as those of one: each use's side counts by how
        large its other side is, which is the partial trace of what they make together.
        """
        kinds = [name.removeprefix("left:") for name in sums if name.startswith("left:")]
        if not kinds:
            return {n: sums[n] for n in ("left", "right", "positions")}
        left, right = sums["left"].clone(), sums["right"].clone()
        for kind in kinds:
            L, R = sums[f"left:{kind}"], sums[f"right:{kind}"]
            count = float(sums[f"positions:{kind}"].clamp_min(1))
            left += L * (_trace(R) / count)
            right += R * (_trace(L) / count)
        return {"left": left, "right": right, "positions": sums["positions"]}

    def bases(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Eigenvectors of the sides that get a basis, from mixed sums."""
        found = {}
        for side, full in zip(("left", "right"), self.rotated, strict=True):
            if full:
                _, found[side] = torch.linalg.eigh(sums[side])
        return found

    # --- the eigenvalues -------------------------------------------------------------------------

    @property
    def corrected(self) -> bool:
        """Whether Lambda comes from a second pass; else it is K-FAC's product."""
        return self.kind != "kfac" or self.block.how not in ("outer", "table")

    def product(self, sums: Mapping[str, Tensor], examples: float) -> Tensor:
        """K-FAC's Lambda (N, rows, columns): products of the sides' eigenvalues."""
        A, S = self.sides(sums, examples)
        left, right = (A, S) if self.swapped else (S, A)
        values = [torch.linalg.eigvalsh(M) if M.dim() == 3 else M for M in (left, right)]
        return values[0].clamp_min(0)[:, :, None] * values[1].clamp_min(0)[:, None, :]

    def squares(self, factors: Mapping[str, Factor], bases: Mapping[str, Tensor]) -> Tensor:
        """(N, rows, columns): the sum over examples of (Ql' G Qr)²."""
        factor = factors[self.block.weight]
        parts = uses(factor) if self.block.how in ("outer", "table") else None
        dtype, device = factor.dtype, factor.device
        left, right = (
            bases[side].to(device, dtype) if side in bases else None for side in ("left", "right")
        )
        out = torch.zeros(self.block.shape, dtype=dtype, device=device)
        if parts is not None and len(parts) <= 1:
            for use in parts:
                if isinstance(use, Rows):
                    keys, rows = use.segments()
                    rows = rows if right is None else rows @ right[0]
                    out[0].index_add_(0, keys % self.block.rows, rows.square())
                    continue
                for part in outers(use):
                    out += _squares(part, self._ones, left, right)
            return out
        for G in self.block.dense(factors):
            G = G if left is None else left.mT @ G
            G = G if right is None else G @ right
            out += G.square().sum(0)
        return out


def _second(x: Tensor, *, full: bool) -> Tensor:
    """(N, d, d), or (N, d): Σ x x' over examples and positions of (n, N, T, d)."""
    return _gram(x.transpose(0, 1).flatten(1, 2), full=full)


def _gram(rows: Tensor, *, full: bool) -> Tensor:
    """X' X, or its diagonal, for each (N, m, d). Half of it by symmetry, where it is wide."""
    if not full:
        return rows.square().sum(1)
    N, m, d = rows.shape
    if d < 2 * NARROW or m < NARROW:
        return rows.mT @ rows
    out = rows.new_empty((N, d, d))
    step = -(-d // min(4, d // NARROW))
    for lo in range(0, d, step):
        hi = min(lo + step, d)
        upper = rows[:, :, lo:hi].mT @ rows[:, :, lo:]
        out[:, lo:hi, lo:] = upper
        out[:, hi:, lo:hi] = upper[:, :, hi - lo :].mT
    return out


def _trace(M: Tensor) -> Tensor:
    return M.diagonal(dim1=-2, dim2=-1).sum() if M.dim() == 3 else M.sum()


def _bordered(M: Tensor, x: Tensor, each: Tensor) -> Tensor:
    """The second moments of x (n, N, T, d), a one after each, from those of x alone."""
    N, d = M.shape[:2]
    if M.dim() == 2:
        return torch.cat([M, each[:, None]], 1)
    out = M.new_empty((N, d + 1, d + 1))
    out[:, :d, :d], out[:, d, d] = M, each
    out[:, d, :d] = out[:, :d, d] = x.sum((0, 2))
    return out


def _squares(
    part: Outer, ones: tuple[bool, bool], left: Tensor | None, right: Tensor | None
) -> Tensor:
    """(N, p, d): Σ_n (Ql' (Σ_t g a') Qr)²; `ones` says which of g and a have a one more."""
    g, a = part.g.to(part.dtype), part.a.to(part.dtype)
    row, column = ones
    N, T, p, d = g.shape[1], g.shape[2], g.shape[3] + row, a.shape[3] + column
    turned = T * (p * p + d * d) <= p * d * (p + d)  # whether to turn factors, or what they make
    if turned or T == 1:
        g, a = _times(g, left, one=row), _times(a, right, one=column)
    if T == 1:  # one position: a square of products is a product of squares
        return torch.einsum("bnp,bnd->npd", g[:, :, 0].square(), a[:, :, 0].square())
    out = g.new_zeros((N, p, d))
    for some in chunks(len(g), 4 * N * p * d * g.element_size(), limit(g.device)):
        G = g[some].mT @ a[some]
        if not turned:
            if column:
                G = torch.cat([G, g[some].sum(2)[..., None]], 3)
            if row:
                G = torch.cat([G, a[some].sum(2)[:, :, None]], 2)
            G = _times(G if left is None else left.mT @ G, right, one=False)
        out += G.square_().sum(0)
    return out


def _times(x: Tensor, Q: Tensor | None, *, one: bool) -> Tensor:
    """x Q, or with a one after each x."""
    if not one:
        return x if Q is None else x @ Q
    if Q is None:
        return torch.cat([x, x.new_ones((*x.shape[:-1], 1))], -1)
    return x @ Q[..., :-1, :] + Q[..., -1:, :]
