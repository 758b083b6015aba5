"""Inner products of two `Outer` of equal sizes, row by row and all pairs.

Owns: the two ways to take them (Gram of positions, or forming the gradients), and their guard.
Does not know: other pairs of kinds.
"""

import torch
from torch import Tensor

from pergrad.factors import costs
from pergrad.factors.constants import constants
from pergrad.factors.guard import KAPPA_LIMIT
from pergrad.factors.numeric import product, row_dots, tracing
from pergrad.factors.outer.factor import Outer
from pergrad.factors.outer.norms import outer_size, unrepaired
from pergrad.factors.products import dots, grams
from pergrad.factors.workspace import by_chunks, chunks, limit, scratch


def _same_sizes(f: Outer, h: Outer) -> bool:
    """Equal (N, p, d): only then do positions of one meet positions of the other."""
    return f.g.shape[1::2] == h.g.shape[1::2] and f.a.shape[3] == h.a.shape[3]


@dots.register(Outer, Outer)
def dot(f: Outer, h: Outer) -> Tensor | None:
    """(B,): row b with row b; None if their sizes differ."""
    if not _same_sizes(f, h):
        return None
    N, T, p, d = f.sizes
    S = h.sizes[1]
    if 0 in (N, T, S, p, d):
        return f._zeros(f.batch)
    method = costs.outer_dot_method(T, S, p, d, constants(f.device, f.dtype))
    if method == "direct":
        return direct_dot(f, h)
    return _row_dot(f, h) if method == "rows" and N == 1 else guarded_dot(f, h)


def guarded_dot(f: Outer, h: Outer) -> Tensor:
    """By Grams of positions, and directly where these lose digits."""
    products, sizes = _gram_dot(f, h)
    # A small product of large gradients is as exact as they allow: only where the gradients
    # themselves are small against their Outers' sizes has the Gram lost digits.
    bound = KAPPA_LIMIT[f.dtype] ** 2
    rows = (~(sizes <= bound * products.detach().abs())).nonzero()[:, 0]
    if len(rows):
        one, two = f._select(rows), h._select(rows)
        lengths = (one.detach().sq_norms() * two.detach().sq_norms()).sqrt()
        rows = rows[~(sizes[rows] <= bound * lengths)]
    if len(rows):
        products = products.index_copy(0, rows, direct_dot(f._select(rows), h._select(rows)))
    return products


def _row_dot(f: Outer, h: Outer) -> Tensor:
    """(g·g')(a·a'), one position: one term, so nothing cancels. p + d multiply-adds."""

    def piece(rows: slice) -> Tensor:
        fg, fa, hg, ha = (x[rows].to(f.dtype) for x in (f.g, f.a, h.g, h.a))
        return row_dots(fg, hg) * row_dots(fa, ha)

    each = 3 * sum(f.sizes[2:]) * f.dtype.itemsize
    return by_chunks(f.batch, each, piece, like=f._zeros(0))


def _gram_dot(f: Outer, h: Outer) -> tuple[Tensor, Tensor]:
    """Σ_nts (g_t·g'_s)(a_t·a'_s), and the product of the Outers' sizes, both (B,)."""
    N, T, p, d = f.sizes
    S = h.sizes[1]
    each = N * ((T + S) * (p + d) + 2 * T * S) * f.dtype.itemsize

    def piece(rows: slice) -> Tensor:
        fg, fa, hg, ha = (x[rows].to(f.dtype) for x in (f.g, f.a, h.g, h.a))
        total = row_dots(torch.matmul(fg, hg.mT), torch.matmul(fa, ha.mT))
        return torch.stack([total, (outer_size(fg, fa) * outer_size(hg, ha)).sqrt()], 1)

    pair = by_chunks(f.batch, each, piece, like=f._zeros(0), tail=(2,))
    return pair[:, 0], pair[:, 1].detach()


def direct_dot(f: Outer, h: Outer) -> Tensor:
    """Form f's gradient in one reused buffer, and pass h through it: (T + S) p d."""
    N, _, p, d = f.sizes
    budget = scratch(f.device)
    each = p * d * f.dtype.itemsize
    groups = chunks(N, each, budget)
    spans = chunks(p, d * f.dtype.itemsize, budget) if each > budget else [slice(0, p)]
    widest = min(N, max(1, budget // each)) * spans[0].stop * d
    step = max(1, budget // (widest * f.dtype.itemsize))
    buffer = None
    if not tracing(*f.tensors(), *h.tensors()):
        buffer = f.g.new_empty(min(step, f.batch) * widest, dtype=f.dtype)

    def piece(rows: slice) -> Tensor:
        total = f._zeros(rows.stop - rows.start)
        for group in groups:
            fa, ha = f.a[rows, group].to(f.dtype), h.a[rows, group].to(f.dtype)
            for span in spans:
                G = product(f.g[rows, group, :, span], fa, f.dtype, buffer)
                hg = h.g[rows, group, :, span].to(f.dtype)
                if d < hg.shape[3]:
                    total = total + row_dots(torch.matmul(hg, G), ha)
                else:
                    total = total + row_dots(torch.matmul(ha, G.mT), hg)
        return total

    return by_chunks(f.batch, widest * f.dtype.itemsize, piece, like=f._zeros(0), budget=budget)


@grams.register(Outer, Outer)
def gram(f: Outer, h: Outer) -> Tensor | None:
    """(B, K): all pairs; h may be f. None if their sizes differ."""
    if not _same_sizes(f, h):
        return None
    N, T, p, d = f.sizes
    S = h.sizes[1]
    if 0 in (f.batch, h.batch, N, T, S, p, d):
        return f._zeros(f.batch, h.batch)
    same = f is h
    by = constants(f.device, f.dtype)
    method = costs.outer_gram_method(f.batch, h.batch, T, S, p, d, same=same, by=by)
    if method == "tiles":
        return tile_gram(f, h)
    return _position_gram(f, h) if method == "rows" and N == 1 else guarded_gram(f, h)


def guarded_gram(f: Outer, h: Outer) -> Tensor:
    """By Grams of positions, or in tiles if these lose digits."""
    products = _position_gram(f, h)
    if _loses_digits(f) or (f is not h and _loses_digits(h)):
        return tile_gram(f, h)
    return products


def _loses_digits(f: Outer) -> bool:
    """Whether some row is so small against its Outer's size that a Gram may not be trusted."""
    sizes = by_chunks(
        f.batch,
        f.g[:1].numel() * f.dtype.itemsize,
        lambda rows: outer_size(f.g[rows].to(f.dtype), f.a[rows].to(f.dtype)),
        like=f._zeros(0),
    )
    # a NaN row stays NaN by any method; one that overflowed is worth the tiles
    (norms, _), _ = unrepaired(f.g.detach(), f.a.detach())
    small = ~(sizes <= KAPPA_LIMIT[f.dtype] ** 2 * norms) & ~sizes.isnan()
    return bool(small.any())


def _position_gram(f: Outer, h: Outer) -> Tensor:
    """Σ_nts (g_t·g'_s)(a_t·a'_s) for all pairs, by two matrix products per chunk of both."""
    N, T, _, _ = f.sizes
    S, K = h.sizes[1], h.batch
    budget = limit(f.device)
    pair = N * T * S * 2 * f.dtype.itemsize
    # measured: without positions to sum over, mirroring costs more than the half it saves
    half = f is h and N * T * S >= 4 and not tracing(*f.tensors())
    step = max(1, min(budget // pair, K, 4096))
    # half: four rows of blocks compute 5/8 of the matrix; more of them are slower again
    high = max(1, min(budget // (pair * step), -(-f.batch // 4) if half else f.batch))

    def side(x: Tensor, rows: slice) -> Tensor:
        x = x[rows].to(f.dtype).transpose(0, 1)
        return x.reshape(N, x.shape[1] * x.shape[2], x.shape[3])

    bands = []
    for lo in range(0, f.batch, high):
        rows = slice(lo, min(lo + high, f.batch))
        g, a = side(f.g, rows), side(f.a, rows)
        cells = []
        for left in range(0, rows.stop if half else K, step):
            cols = slice(left, min(left + step, rows.stop if half else K))
            both = torch.bmm(g, side(h.g, cols).mT) * torch.bmm(a, side(h.a, cols).mT)
            size = (N, rows.stop - lo, T, cols.stop - left, S)
            cells.append(both[0] if (N, T, S) == (1, 1, 1) else both.view(size).sum((0, 2, 4)))
        if half and rows.stop < K:
            cells.append(f._zeros(rows.stop - lo, K - rows.stop))
        bands.append(torch.cat(cells, 1) if len(cells) > 1 else cells[0])
    out = torch.cat(bands) if len(bands) > 1 else bands[0]
    return out.tril() + out.tril(-1).mT if half else out


def tile_gram(f: Outer, h: Outer) -> Tensor:
    """Form tiles of both sides and multiply them: (B T + K S + B K) N p d."""
    if f.sizes[3] > f.sizes[2]:  # tiles are cut along p: let that be the longer side
        same = f is h
        f = Outer(f.a, f.g)
        h = f if same else Outer(h.a, h.g)
    N, _, p, d = f.sizes
    B, K = f.batch, 0 if h is f else h.batch
    column = (B + K) * d * f.dtype.itemsize
    budget = min(limit(f.device), 8 * scratch(f.device))
    groups = chunks(N, column * p, budget)
    spans = chunks(p, column, budget) if column * p > budget else [slice(0, p)]
    widest = min(N, max(1, budget // (column * p))) * spans[0].stop * d
    buffers: list[Tensor | None] = [None, None]
    if not tracing(*f.tensors(), *h.tensors()):
        buffers = [f.g.new_empty(rows * widest, dtype=f.dtype) for rows in (B, K)]
    out = f._zeros(B, h.batch)
    for group in groups:
        for span in spans:
            F = product(f.g[:, group, :, span], f.a[:, group], f.dtype, buffers[0]).flatten(1)
            H = F
            if h is not f:
                H = product(h.g[:, group, :, span], h.a[:, group], f.dtype, buffers[1]).flatten(1)
            out = out + F @ H.mT
    return out
