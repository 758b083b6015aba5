"""Linear maps from a gradient to a few numbers, whose inner products stand for the gradients'.

Owns: the coordinates of a curvature's basis with most energy, TensorSketch, and their errors.
Does not know: data sets, files, queries.

Both are applied to factors: of a layer's inputs and output gradients, no gradient is formed.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pergrad.attribution.blocks import Block, block_of, outers
from pergrad.attribution.fit import Curved, Fit
from pergrad.factors import Correlation, Factor, Mapped, Outer, Placed, Rows, Sum, Zero
from pergrad.factors.workspace import chunks, limit
from pergrad.matrix import GradientMatrix

DEGREE = 8.0  # the variance of a TensorSketch is at most DEGREE |x|² |y|² / size


class Projection(Protocol):
    """Gradients (B, P) to (B, size)."""

    size: int

    def project(self, J: GradientMatrix) -> Tensor:
        """(B, size), float32."""


# --- coordinates of a basis -----------------------------------------------------------------------


class Coordinates:
    """The coordinates of (F + damping)^(-1/2) g in the curvature's basis that have most energy.

    The energy of a coordinate is its mean square over examples, Lambda / (Lambda + damping). Inner
    products of all coordinates are g' (F + damping)⁻¹ g exactly; what the others have is left out.
    """

    def __init__(self, fit: Fit, size: int) -> None:
        self.fit, self.size = fit, size
        self.added = fit.added  # once: it takes the mean of every Lambda
        energies = [self._energy(c).reshape(-1) for c in fit.curved]
        kept = torch.cat(energies).topk(size).indices.sort().values
        self.chosen: list[Tensor] = []  # of each block, numbers in its matrix
        first = 0
        for energy in energies:
            stop = first + len(energy)
            self.chosen.append(kept[(kept >= first) & (kept < stop)] - first)
            first = stop
        self.roots = [
            (c.Lambda.double() + self.added[c.block.weight]).reshape(-1)[chosen].sqrt()
            for c, chosen in zip(fit.curved, self.chosen, strict=True)
        ]

    def _energy(self, c: Curved) -> Tensor:
        L = c.Lambda.double()
        return L / (L + self.added[c.block.weight])

    @property
    def share(self) -> float:
        """Of the energy of all coordinates, what is kept."""
        every = torch.cat([self._energy(c).reshape(-1) for c in self.fit.curved])
        return float(every.topk(self.size).values.sum() / every.sum())

    def project(self, J: GradientMatrix) -> Tensor:
        """(B, size)."""
        with J._working(), torch.no_grad():
            parts = []
            for c, chosen, root in zip(self.fit.curved, self.chosen, self.roots, strict=True):
                if len(chosen):
                    values = _coordinates(c, J._factors, chosen.to(J.device))
                    parts.append(values / root.to(values))
            return torch.cat(parts, 1).float()

    def of_rows(self, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(K, size) of gradients that are formed, and (K,) the variance of what is left out.

        The variance is that of the inner product with the gradient of an example like those of the
        curvature, whose coordinates are uncorrelated: the basis is chosen so.
        """
        parts: list[Tensor] = []
        left_out: list[Tensor] = []
        for c, chosen in zip(self.fit.curved, self.chosen, strict=True):
            G = c.block.matrix(rows)
            G = c.rotate(G) / (c.Lambda.to(G) + self.added[c.block.weight]).sqrt()
            G = G.flatten(1).double()
            energy = self._energy(c).reshape(-1).to(G.device).clone()
            at = chosen.to(G.device)
            parts.append(G[:, at])
            energy[at] = 0
            left_out.append(G.square() @ energy)
        return torch.cat(parts, 1).float(), torch.stack(left_out).sum(0)


def _coordinates(c: Curved, factors: Mapping[str, Factor], chosen: Tensor) -> Tensor:
    """(B, S): the chosen entries of Ql' G Qr."""
    block, factor = c.block, factors[c.block.weight]
    _, rows, columns = block.shape
    n, i, j = chosen // (rows * columns), chosen // columns % rows, chosen % columns
    if _same(block, factor) and _readable(factor, rows=c.left is None and block.bias is None):
        return _picked(c, factor, (n, i, j))
    found = [c.rotate(G).flatten(1)[:, chosen] for G in block.dense(factors)]
    return torch.cat(found)


def _same(block: Block, factor: Factor) -> bool:
    """Whether a factor's uses lie in the matrix as those of the block do."""
    now = block_of(block.weight, factor)
    kinds = ("outer", "table", "shared")
    return block.how in kinds and now.how in kinds and (
        (now.groups, now.rows, now.columns, now.steps)
        == (block.groups, block.rows, block.columns, block.steps)
    )  # fmt: skip


def _readable(factor: Factor, *, rows: bool) -> bool:
    """Whether all uses are outer products, or rows where these are allowed."""
    if isinstance(factor, (Mapped, Placed)):
        return _readable(factor.factor, rows=rows)
    if isinstance(factor, Sum):
        return all(_readable(part, rows=rows) for part in factor.factors)
    return isinstance(factor, (Zero, Outer, Correlation)) or (rows and isinstance(factor, Rows))


def _picked(c: Curved, factor: Factor, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    n, i, j = at
    if isinstance(factor, Zero):
        return torch.zeros((factor.batch, len(n)), dtype=factor.dtype, device=factor.device)
    if isinstance(factor, Sum):
        return torch.stack([_picked(c, part, at) for part in factor.factors]).sum(0)
    if isinstance(factor, Placed):
        return factor.spread(_picked(c, factor.factor, at))
    if isinstance(factor, Mapped):
        return _picked(c, factor.factor, at)
    if isinstance(factor, Rows):
        return _picked_rows(c, factor, i, j)
    found = []
    for part in outers(factor):
        g, a = c.block.extended(part)  # (m, N, T, rows) and (m, N, T, columns)
        g = g if c.left is None else g @ c.left.to(g)
        a = a if c.right is None else a @ c.right.to(a)
        rows = []
        for some in chunks(len(g), 2 * g.shape[2] * len(n) * g.element_size(), limit(g.device)):
            left, right = g[some].movedim(2, 0), a[some].movedim(2, 0)  # (T, m, N, size)
            rows.append((left[:, :, n, i] * right[:, :, n, j]).sum(0))
        found.append(torch.cat(rows))
    return torch.cat(found)


def _picked_rows(c: Curved, use: Rows, i: Tensor, j: Tensor) -> Tensor:
    """The same of a table: each row that an example looked up, and the coordinates chosen of it."""
    keys, values = use.segments()
    values = values if c.right is None else values @ c.right[0].to(values)
    whose, ids = keys // c.block.rows, keys % c.block.rows
    by_row, order = i.sort(stable=True)
    low = torch.searchsorted(by_row, ids)
    count = torch.searchsorted(by_row, ids, right=True) - low
    entry = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), count)
    within = torch.arange(len(entry), device=ids.device) - (count.cumsum(0) - count)[entry]
    s = order[low[entry] + within]
    out = values.new_zeros((use.batch, len(i)))
    return out.index_put((whose[entry], s), values[entry, j[s]])


# --- TensorSketch ---------------------------------------------------------------------------------


class TensorSketch:
    """Each number of a gradient's matrix, with a random sign, to a random place of `size`.

        entry (n, i, j)  ->  place (h[n, i] + k[n, j]) mod size,  sign s[n, i] t[n, j]

    so that an outer product becomes a circular convolution of two short vectors, by FFT. One vector
    for the whole model: all parameters add to it. E<Px, Py> = <x, y>, and the variance is at most
    8 |x|² |y|² / size.

    Source: Pham and Pagh 2013; Avron, Nguyen and Woodruff 2014.
    """

    def __init__(self, blocks: Sequence[Block], size: int, seed: int) -> None:
        self.blocks, self.size = list(blocks), size
        random = torch.Generator().manual_seed(seed)
        self.tables = []
        for block in self.blocks:
            sides = []
            for width in block.shape[1:]:
                shape = (block.groups, width)
                place = torch.randint(size, shape, generator=random)
                sign = torch.randint(2, shape, generator=random) * 2 - 1
                sides.append((place, sign))
            self.tables.append(sides)

    def project(self, J: GradientMatrix) -> Tensor:
        """(B, size)."""
        with J._working(), torch.no_grad():
            total = torch.zeros((len(J), self.size), dtype=J.dtype, device=J.device)
            for block, sides in zip(self.blocks, self.tables, strict=True):
                there = [tuple(t.to(J.device) for t in side) for side in sides]
                total += self._block(block, there, J._factors).to(total)
            return total.float()

    def _block(self, block: Block, sides: list[tuple[Tensor, ...]], factors: Mapping[str, Factor]) -> Tensor:  # noqa: E501  # fmt: skip
        factor = factors[block.weight]
        if _same(block, factor) and _readable(factor, rows=True):
            return self._use(factor, sides)
        return torch.cat([self._formed(G, sides) for G in block.dense(factors)])

    def _formed(self, G: Tensor, sides: list[tuple[Tensor, ...]]) -> Tensor:
        (h, s), (k, t) = sides
        place = (h[:, :, None] + k[:, None, :]) % self.size
        signed = G * (s[:, :, None] * t[:, None, :]).to(G)
        out = G.new_zeros((len(G), self.size))
        return out.index_add(1, place.reshape(-1), signed.flatten(1))

    def _use(self, factor: Factor, sides: list[tuple[Tensor, ...]]) -> Tensor:
        if isinstance(factor, Zero):
            shape = (factor.batch, self.size)
            return torch.zeros(shape, dtype=factor.dtype, device=factor.device)
        if isinstance(factor, Sum):
            return torch.stack([self._use(part, sides) for part in factor.factors]).sum(0)
        if isinstance(factor, Placed):
            return factor.spread(self._use(factor.factor, sides))
        if isinstance(factor, Mapped):
            return self._use(factor.factor, sides)
        if isinstance(factor, Rows):
            return self._rows(factor, sides)
        return torch.cat([self._outer(part, sides) for part in outers(factor)])

    def _outer(self, part: Outer, sides: list[tuple[Tensor, ...]]) -> Tensor:
        """By FFT; if forming the product is less work, that way."""
        g, a = part.g.to(part.dtype), part.a.to(part.dtype)  # (m, N, T, rows), (m, N, T, columns)
        m, N, T, p = g.shape
        d = a.shape[3]
        if p * d <= 4 * self.size:
            return self._formed(g.mT @ a, sides)
        found = []
        each = 6 * N * T * self.size * g.element_size()
        for some in chunks(m, each, limit(g.device)):
            spectra = [
                torch.fft.rfft(self._short(x[some], *side))
                for x, side in zip((g, a), sides, strict=True)
            ]
            product = (spectra[0] * spectra[1]).sum((1, 2))
            found.append(torch.fft.irfft(product, n=self.size))
        return torch.cat(found)

    def _short(self, x: Tensor, place: Tensor, sign: Tensor) -> Tensor:
        """(m, N, T, size) from (m, N, T, width)."""
        out = x.new_zeros((*x.shape[:3], self.size))
        at = place[None, :, None, :].expand(x.shape)
        return out.scatter_add(3, at, x * sign[None, :, None, :].to(x))

    def _rows(self, use: Rows, sides: list[tuple[Tensor, ...]]) -> Tensor:
        (h, s), (k, t) = sides
        where, whose, ids = use.entries
        values = use.positions(where) * t[0].to(use.dtype) * s[0][ids][:, None].to(use.dtype)
        place = (h[0][ids][:, None] + k[0][None]) % self.size
        out = values.new_zeros(use.batch * self.size)
        out = out.index_add(0, (whose[:, None] * self.size + place).reshape(-1), values.reshape(-1))
        return out.reshape(use.batch, self.size)


def plain_blocks(J: GradientMatrix) -> list[Block]:
    """A block for each parameter, without its bias."""
    return [block_of(name, factor) for name, factor in J._factors.items()]
