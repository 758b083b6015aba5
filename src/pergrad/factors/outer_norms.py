"""Norms of `Outer`: three exact methods, and the guard between them.

Owns: the formulas of `sq_norms`, and when a Gram's result may not be trusted.
Does not know: other factors. Everything here works on the tensors g (B,N,T,p) and a (B,N,T,d).
"""

from functools import partial
from math import prod

import torch
from torch import Tensor

from pergrad.factors import costs
from pergrad.factors.constants import constants
from pergrad.factors.notes import Notes
from pergrad.factors.numeric import last_squares, product, result_dtype, row_squares, tracing
from pergrad.factors.workspace import by_chunks, chunks, lent, scratch

# κ² = |A|²|G|² / |AᵀG|². A Gram's terms are of size |A|²|G|² and cancel down to |AᵀG|², so its
# relative error is at most about u κ² (in practice a hundredth of it) against u κ of the direct
# form. Below the limit the Gram keeps 4e-6 or so in float32 and 1e-12 in float64. Unrelated
# tokens have κ = √T and stay below it wherever a Gram is the cheaper method.
KAPPA_LIMIT = {torch.float32: 64.0, torch.float64: 1000.0}


def sq_norms(g: Tensor, a: Tensor, notes: Notes | None = None) -> Tensor:
    """(B,): ‖Σ_t g[b,n,t] ⊗ a[b,n,t]‖², summed over groups."""
    B, N, T, p = g.shape
    d = a.shape[3]
    if T == 0 or 0 in (N, p, d):
        return g.new_zeros(B, dtype=result_dtype(g, a))
    by = constants(g.device, result_dtype(g, a))
    method = costs.outer_norm_method(*sizes_and_readers(g, a, notes), by)
    if method == "rows":
        return by_rows(g, a, notes)
    if method == "direct":
        return direct(g, a)
    norms, sizes = gram(g, a, notes)
    doubtful = cancels(norms, sizes)
    if not bool(doubtful.any()):
        return norms
    rows = doubtful.nonzero()[:, 0]
    return norms.index_copy(0, rows, direct(g[rows], a[rows]))


def sizes_and_readers(g: Tensor, a: Tensor, notes: Notes | None) -> tuple[int, int, int, int]:
    """T, the width of a side of one's own, of the side that others read too, and their number."""
    T, p, d = g.shape[2], g.shape[3], a.shape[3]
    if notes is None or notes.kept is None:
        return T, p, d, 1
    return (T, d, p, notes.readers) if notes.read is g else (T, p, d, notes.readers)


def cancels(norms: Tensor, sizes: Tensor) -> Tensor:
    """Whether κ is above the limit; also where a Gram overflowed (so not `>`: NaN must be true)."""
    norms, sizes = norms.detach(), sizes.detach()
    return ~(sizes <= KAPPA_LIMIT[norms.dtype] ** 2 * norms)


def by_rows(g: Tensor, a: Tensor, notes: Notes | None = None) -> Tensor:
    """T = 1: Σ_n |g_n|² |a_n|². N (p + d) multiply-adds."""
    dtype = result_dtype(g, a)
    left, right = last_squares(g, dtype), last_squares(a, dtype)  # (B, N, 1), no copy on the way
    if notes is not None and notes.summed is not None and g.shape[1] == 1:
        notes.sq_norms = (left if notes.summed is g else right).reshape(-1)
    return (left * right).flatten(1).sum(1) if g.shape[1] > 1 else (left * right).reshape(-1)


def direct(g: Tensor, a: Tensor) -> Tensor:
    """Form gᵀ a in one reused buffer, square, sum. N T p d multiply-adds."""
    dtype = result_dtype(g, a)
    B, N, _, p = g.shape
    d = a.shape[3]
    budget = scratch(g.device)
    each = p * d * dtype.itemsize
    # not bmm into fresh memory: on a CPU its page faults cost more than the multiplication
    groups = chunks(N, each, budget)
    spans = chunks(p, d * dtype.itemsize, budget) if each > budget else [slice(0, p)]
    widest = min(N, max(1, budget // each)) * spans[0].stop * d
    step = max(1, budget // (widest * dtype.itemsize))

    def piece(rows: slice, buffer: Tensor | None) -> Tensor:
        total = g.new_zeros(rows.stop - rows.start, dtype=dtype)
        for group in groups:
            right = a[rows, group].to(dtype)
            for span in spans:
                formed = product(g[rows, group, :, span], right, dtype, buffer)
                total = total + _sum_of_squares(formed)
        return total

    def pieces(buffer: Tensor | None) -> Tensor:
        return by_chunks(B, widest * dtype.itemsize, partial(piece, buffer=buffer),
                         like=g.new_zeros(0, dtype=dtype), budget=budget)  # fmt: skip

    if tracing(g, a):
        return pieces(None)
    with lent(min(step, B) * widest, dtype, g.device) as buffer:
        return pieces(buffer)


def _sum_of_squares(x: Tensor) -> Tensor:
    """(B,): of (B, N, p, d), row by row."""
    if tracing(x):
        return row_squares(x)  # a norm has no derivative at zero
    # vector_norm is the fastest reduction, but its single running sum loses digits over millions
    # of elements (1e-4 measured): let it do short rows, and pairwise sums the rest
    return torch.linalg.vector_norm(x, dim=3).square().flatten(1).sum(1)


def outer_size(g: Tensor, a: Tensor) -> Tensor:
    """(B,): Σ_n |G_n|² |A_n|², for guards alone: no derivative, no copy."""
    G, A = (torch.linalg.vector_norm(x.detach(), dim=3).square().sum(2) for x in (g, a))
    return (G * A).sum(1)


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


def gram(g: Tensor, a: Tensor, notes: Notes | None = None) -> tuple[Tensor, Tensor]:
    """Σ_ts (g_t·g_s)(a_t·a_s), half of it, and |A|²|G|², both (B,)."""
    dtype = result_dtype(g, a)
    B, N, T, p = g.shape
    d = a.shape[3]
    k = costs.gram_blocks(T)
    block = -(-T // k)
    bounds = [(lo, min(T, lo + block)) for lo in range(0, T, block)]
    # what is read alone needs no room; half precision is widened first
    copies = p * (g.dtype != dtype) + d * (a.dtype != dtype)
    each = N * T * (copies + 2 * block) * dtype.itemsize
    plain = not tracing(g, a)
    asked = notes.summed if notes is not None and N == 1 else None
    kept = notes.kept if notes is not None and plain else None
    read = notes.read if notes is not None and kept is not None else None
    version = notes.version if notes is not None else 0
    known = kept.blocks(read, version) if kept is not None and read is not None else None
    ours = None  # blocks that are formed here and kept for other readers
    if known is None and kept is not None and read is not None:
        ours = kept.room(read, [(B * N, hi - lo, T - lo) for lo, hi in bounds], dtype)

    def product(x: Tensor, which: Tensor, rows: slice, i: int, room: Tensor | None) -> Tensor:
        """Block i of the Gram of the rows x of one side."""
        lo, hi = bounds[i]
        if which is read and known is not None:
            return known[i][rows.start * N : rows.stop * N]
        if room is None:
            return torch.bmm(x[:, lo:hi], x[:, lo:].mT)
        if which is read and ours is not None:
            into = ours[i][rows.start * N : rows.stop * N]
        else:
            shape = (len(x), hi - lo, T - lo)
            into = room[: prod(shape)].view(shape)
        return torch.bmm(x[:, lo:hi], x[:, lo:].mT, out=into)

    def piece(rows: slice, room: Tensor | None) -> list[Tensor]:
        G, A = g[rows].to(dtype).reshape(-1, T, p), a[rows].to(dtype).reshape(-1, T, d)
        one, two = (None, None) if room is None else room.chunk(2)
        sums: list[Tensor] = []  # the product's, of the traces, and of the side asked about
        for i in range(len(bounds)):
            left, right = product(G, g, rows, i, one), product(A, a, rows, i, two)
            here = [_trace(left), _trace(right)]
            if asked is not None:
                here.append(_upper_and_lower(left if asked is g else right))
            if not plain:
                both = left * right
            else:  # a block that others will read is only read
                both = right.mul_(left) if read is g else left.mul_(right)
            here.append(_upper_and_lower(both))
            sums = here if i == 0 else [x + y for x, y in zip(sums, here, strict=True)]
        size = sums[0] * sums[1]
        found = [sums[-1], size] if N == 1 else [x.view(-1, N).sum(1) for x in (sums[-1], size)]
        return found if asked is None else [*found, sums[2], T * sums[0 if asked is g else 1]]

    cut = chunks(B, each, scratch(g.device))
    if not cut:
        return g.new_zeros(0, dtype=dtype), g.new_zeros(0, dtype=dtype)
    if plain:
        with lent(2 * (cut[0].stop * N) * block * T, dtype, g.device) as room:
            pieces = [piece(rows, room) for rows in cut]
    else:
        pieces = [piece(rows, None) for rows in cut]
    if kept is not None and read is not None and ours is not None:
        kept.keep(read, version, ours)
    columns = pieces[0] if len(pieces) == 1 else [torch.cat(x) for x in zip(*pieces, strict=True)]
    if notes is not None and asked is not None:
        notes.sq_norms, notes.sizes = columns[2:]
    return columns[0], columns[1]
