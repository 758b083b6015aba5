"""Inner products of any two factors: `dot` (row by row) and `gram` (all pairs).

Owns: which formula serves which pair, and the general methods that serve every pair.
Does not know: the formulas themselves; matrices of several parameters.
"""

import torch
from torch import Tensor

from pergrad.factors import outer_products, rows_products
from pergrad.factors.base import Factor, over_tiles
from pergrad.factors.combined import Placed, Sum
from pergrad.factors.correlation import Correlation
from pergrad.factors.dense import Dense, Zero
from pergrad.factors.guard import cancels
from pergrad.factors.lazy import Scaled
from pergrad.factors.mapped import Embedded, Mapped
from pergrad.factors.numeric import flat, row_dots
from pergrad.factors.outer import Outer
from pergrad.factors.rows import Rows
from pergrad.factors.simplify import mapped
from pergrad.factors.workspace import chunks, limit


def dot(f: Factor, h: Factor) -> Tensor:
    """(B,): the inner product of row b with row b."""
    _check(f, h)
    if f.batch != h.batch:
        raise ValueError(f"Row by row needs equally many rows, not {f.batch} and {h.batch}.")
    if f is h:
        return f.sq_norms()
    f, h = _of_one_dtype(f, h)
    for one, two in ((f, h), (h, f)):
        found = _special_dot(one, two)
        if found is not None:
            return found
    return over_tiles(
        (f, h), lambda parts, lo, hi: row_dots(parts[0].tile(lo, hi), parts[1].tile(lo, hi))
    )


def gram(f: Factor, h: Factor) -> Tensor:
    """(B, K): all inner products; that of a factor with itself costs less."""
    _check(f, h)
    if f is not h:
        f, h = _of_one_dtype(f, h)
    found = _special_gram(f, h)
    if found is not None:
        return found
    if f is not h:
        found = _special_gram(h, f)
        if found is not None:
            return found.mT
    return _general_gram(f, h)


def _check(f: Factor, h: Factor) -> None:
    if f.shape != h.shape:
        raise ValueError(f"Gradients of parameters of shapes {f.shape} and {h.shape} do not meet.")
    if f.device != h.device:
        raise ValueError(f"Gradients on {f.device} and on {h.device} do not meet; use `.to`.")


def _of_one_dtype(f: Factor, h: Factor) -> tuple[Factor, Factor]:
    """Both with the wider of the two dtypes."""
    dtype = torch.promote_types(f.dtype, h.dtype)
    return (f if f.dtype == dtype else f.to(dtype=dtype)), (
        h if h.dtype == dtype else h.to(dtype=dtype)
    )


def _special_dot(f: Factor, h: Factor) -> Tensor | None:
    """A formula for this pair in this order, or None."""
    match f, h:
        case Zero(), _:
            return f._zeros(f.batch)
        case Placed(), _:
            return f.spread(f.factor.dot(h.select(f.index)))
        case Sum(), _:
            return f._total(lambda part: part.dot(h))
        case Outer(), Outer() if _same_sizes(f, h):
            return outer_products.dot(f, h)
        case Rows(), Rows():
            return rows_products.dot_rows(f, h)
        case Rows(), Dense():
            return rows_products.dot_dense(f, h)
        case Rows(), Outer():
            return rows_products.dot_outer(f, h)
        case Mapped(), _:
            other = _brought_back(f, h)
            return None if other is None else f.factor.dot(other)
        case Embedded(), _:
            other = _cut(f, h)
            return None if other is None else f.factor.dot(other)
        case Scaled(), Dense() | Rows():
            return f.factor.dot(h.times_diagonal(f.diagonal))
    return None


def _special_gram(f: Factor, h: Factor) -> Tensor | None:
    """A formula for this pair in this order, or None."""
    match f, h:
        case Zero(), _:
            return f._zeros(f.batch, h.batch)
        case Placed(), _ if f is h:
            return f.spread(f.spread(f.factor.gram(f.factor)).mT).mT
        case Placed(), _:
            return f.spread(f.factor.gram(h))
        case Sum(), _:
            return _sum_self_gram(f) if f is h else f._total(lambda part: part.gram(h))
        case Outer(), Outer() if _same_sizes(f, h):
            return outer_products.gram(f, h)
        case Correlation(), Correlation() if _fit_as_patches(f, h):
            one = f.outer(slice(0, f.batch))
            return one.gram(one if h is f else h.outer(slice(0, h.batch)))
        case Rows(), _:
            return rows_products.gram(f, h)
        case Mapped(), _:
            if f is h:
                return f.factor.gram(f.factor)
            other = _brought_back(f, h)
            return None if other is None else f.factor.gram(other)
        case Embedded(), _:
            other = f.factor if f is h else _cut(f, h)
            return None if other is None else f.factor.gram(other)
        case Scaled(), Dense() | Rows():
            return f.factor.gram(h.times_diagonal(f.diagonal))
    return None


def _same_sizes(f: Outer, h: Outer) -> bool:
    """Equal (N, p, d): only then do positions of one meet positions of the other."""
    return f.g.shape[1::2] == h.g.shape[1::2] and f.a.shape[3] == h.a.shape[3]


def _fit_as_patches(f: Correlation, h: Correlation) -> bool:
    """Whether all patches may be laid out once, instead of anew for each tile."""
    count = f.batch + (0 if h is f else h.batch)
    empty = f.g.numel() * f.x.numel() * h.g.numel() * h.x.numel() == 0
    return not empty and count * max(f.patch_bytes, h.patch_bytes) <= limit(f.device)


def _brought_back(f: Mapped, h: Factor) -> Factor | None:
    """`h` in the coordinates in which f lives, where it has a simple form there."""
    if isinstance(h, Mapped) and h.isometry == f.isometry:
        return h.factor
    other = mapped(h, f.isometry.inverse().steps)
    return None if isinstance(other, Mapped) else other


def _cut(f: Embedded, h: Factor) -> Factor | None:
    """The slice of h that f fills, where it has a simple form."""
    if isinstance(h, Dense):
        return Dense(f.cut(h.values, 1))
    if isinstance(h, Embedded) and h.index[0] == f.index[0]:
        if h.index == f.index:
            return h.factor
        if h.index[2] <= f.index[1] or f.index[2] <= h.index[1]:  # disjoint
            return Zero(h.batch, f.factor.shape, h.device, h.dtype)
    return None


def _sum_self_gram(f: Sum) -> Tensor:
    """Σ_ij F_i F_jᵀ, where F_j F_iᵀ is the transpose of F_i F_jᵀ."""
    own = [part.gram(part).to(f.dtype) for part in f.factors]
    total = own[0]
    for i, part in enumerate(f.factors[1:], 1):
        total = total + own[i]
        for other in f.factors[:i]:
            cross = part.gram(other)
            total = total + cross + cross.mT
    if len(own) > 1:
        sizes = torch.stack([x.detach().diagonal().clamp_min(0).sqrt() for x in own]).sum(0)
        lost = cancels(total.diagonal(), sizes.square()) & ~sizes.isnan()
        if bool(lost.any()):  # parts that cancel: add them up first
            return _general_gram(f, f)
    return total


def _general_gram(f: Factor, h: Factor) -> Tensor:
    """Over tiles of the parameter where both sides can give tiles; else over blocks of examples."""
    rows, _ = f.matrix_shape
    out = f._zeros(f.batch, h.batch)
    if f.tiles and h.tiles and rows > 1:
        each = f.batch * f.bytes_per_row + (0 if h is f else h.batch * h.bytes_per_row)
        for span in chunks(rows, each // rows, limit(f.device)):
            F = f.tile(span.start, span.stop)
            H = F if h is f else h.tile(span.start, span.stop)
            out = out + F @ H.mT
        return out
    bands = []
    budget = limit(f.device) // 2
    for here in chunks(f.batch, f.bytes_per_row, budget):
        F = flat(f.select(here).dense())
        cells = []
        for there in chunks(h.batch, h.bytes_per_row, budget):
            same = h is f and there == here
            H = F if same else flat(h.select(there).dense())
            cells.append(F @ H.mT)
        bands.append(torch.cat(cells, 1) if cells else f._zeros(len(F), 0))
    return torch.cat(bands) if bands else out
