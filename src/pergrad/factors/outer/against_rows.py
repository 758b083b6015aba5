"""Inner products of an `Outer` with rows that are formed, such as queries times an inverse.

Owns: the two ways to take them, without forming more of the `Outer` than stays in the caches.
Does not know: products of two `Outer` (`products`).
"""

import torch
from torch import Tensor

from pergrad.factors.dense import Dense
from pergrad.factors.numeric import product, tracing
from pergrad.factors.outer.factor import Outer
from pergrad.factors.products import grams
from pergrad.factors.workspace import chunks, limit, scratch


@grams.register(Outer, Dense)
def gram_with_rows(f: Outer, h: Dense) -> Tensor | None:
    """(B, K): all pairs; None where the rows cannot be read as f's matrix."""
    N, T, p, d = f.sizes
    if not f.aligned or 0 in (f.batch, h.batch, N, T, p, d):
        return None
    rows = h.dense().reshape(h.batch, N, p, d).to(f.dtype)
    return passed(f, rows[:, 0]) if (N, T) == (1, 1) else tiled(f, rows)


def passed(f: Outer, rows: Tensor) -> Tensor:
    """One position: g' H a for each of (K, p, d), some rows at a time; f is never formed."""
    p, d = rows.shape[1:]
    left, right = f.g[:, 0, 0].to(f.dtype), f.a[:, 0, 0].to(f.dtype)
    if p <= d:  # the wider side first: what is between is of the narrower
        rows = rows.mT
    else:
        left, right = right, left
    narrow = left.shape[1]
    examples = chunks(f.batch, narrow * f.dtype.itemsize, scratch(f.device))
    step = examples[0].stop
    each = step * narrow
    queries = chunks(len(rows), each * f.dtype.itemsize, scratch(f.device))
    room = None
    if not tracing(left, right, rows):
        room = left.new_empty(queries[0].stop * each)
    bands = []
    for some in examples:
        g, a = left[some], right[some]
        cells = []
        for part in queries:
            H = rows[part]
            many = a.expand(len(H), *a.shape)
            if room is None:
                cells.append((torch.bmm(many, H) * g).sum(2))
                continue
            between = room[: len(H) * g.numel()].view(len(H), *g.shape)
            cells.append(torch.bmm(many, H, out=between).mul_(g).sum(2))
        bands.append(torch.cat(cells).mT)
    return torch.cat(bands) if len(bands) > 1 else bands[0]


def tiled(f: Outer, rows: Tensor) -> Tensor:
    """More positions: tiles of f are formed, and multiplied with (K, N, p, d); B (T + K) N p d."""
    N, _, p, d = f.sizes
    column = f.batch * d * f.dtype.itemsize
    budget = min(limit(f.device), 2 * scratch(f.device))
    groups = chunks(N, column * p, budget)
    spans = chunks(p, column, budget) if column * p > budget else [slice(0, p)]
    room = None
    if not tracing(f.g, f.a, rows):
        room = f.g.new_empty(f.batch * groups[0].stop * spans[0].stop * d, dtype=f.dtype)
    out = f._zeros(f.batch, len(rows))
    for group in groups:
        for span in spans:
            F = product(f.g[:, group, :, span], f.a[:, group], f.dtype, room).flatten(1)
            out = out + F @ rows[:, group, span].flatten(1).mT
    return out
