"""Inner products of `Rows` with any factor that can give chosen rows.

Owns: joins on ids; the cross term of a tied embedding and head.
Does not know: how other factors form their rows (`Factor.pick`).
"""

import torch
from torch import Tensor

from pergrad.factors import costs
from pergrad.factors.base import Factor
from pergrad.factors.constants import constants
from pergrad.factors.dense import Dense
from pergrad.factors.outer.factor import Outer
from pergrad.factors.products import dots, grams
from pergrad.factors.rows.factor import Rows
from pergrad.factors.workspace import by_chunks, chunks, limit


@dots.register(Rows, Rows)
def dot_rows(f: Rows, h: Rows) -> Tensor:
    """Join on (example, id): O(B T C)."""

    def piece(rows: slice) -> Tensor:
        one, two = f._select(rows), h._select(rows)
        out = one._zeros(one.batch)
        (keys, values), (others, more) = one.segments(), two.segments()
        if not len(others):
            return out
        place = torch.searchsorted(others, keys).clamp_max(len(others) - 1)
        found = (others[place] == keys).nonzero()[:, 0]
        products = (values[found] * more[place[found]]).sum(1)
        return out.index_add(0, keys[found] // f.shape[0], products)

    each = f.bytes_per_lookup_row + h.bytes_per_lookup_row
    return by_chunks(f.batch, each, piece, like=f._zeros(0))


@dots.register(Rows, Dense)
def dot_dense(f: Rows, h: Dense) -> Tensor:
    """Σ_t g[b,t] · D[b, ids[b,t]]."""

    def piece(rows: slice) -> Tensor:
        part = f._select(rows)
        where, whose, ids = part.entries
        values = h.values[rows].reshape(part.batch, *f.matrix_shape)
        products = (values[whose, ids].to(f.dtype) * part.positions(where)).sum(1)
        return part._zeros(part.batch).index_add(0, whose, products)

    return by_chunks(f.batch, f.bytes_per_lookup_row, piece, like=f._zeros(0))


@dots.register(Rows, Outer)
def dot_outer(f: Rows, h: Outer) -> Tensor | None:
    """Σ_ts g_h[b, s, ids[b,t]] (g_f[b,t] · a_h[b,s]): a tied embedding and head."""
    if not h.aligned or h.sizes[0] != 1:
        return None
    T, S, C = f.ids.shape[1], h.sizes[1], f.matrix_shape[1]
    if 0 in (T, S, *f.shape):
        return f._zeros(f.batch)
    each = (2 * T * S + 3 * T * C + S * C) * f.dtype.itemsize

    def piece(rows: slice) -> Tensor:
        ids = f.ids[rows].long()
        valid = ids >= 0
        pages = ids.clamp_min(0)[:, None].expand(-1, S, -1)
        left = h.g[rows, 0].gather(2, pages).to(f.dtype)  # (n, S, T): of p only the ids
        right = f.g[rows].reshape(*ids.shape, C).to(f.dtype)
        right = torch.where(valid[..., None], right, 0)  # not `* valid`: 0 * NaN
        mixed = torch.bmm(left.mT, h.a[rows, 0].to(f.dtype))  # (n, T, C)
        return (torch.where(valid[..., None], mixed, 0) * right).sum((1, 2))

    return by_chunks(f.batch, each, piece, like=f._zeros(0))


@grams.register(Rows, Factor)
def gram(f: Rows, h: Factor, method: str | None = None) -> Tensor | None:
    """(B, K): over the ids present in f only; None where h cannot give chosen rows.

    Two `Rows` are multiplied by "join" or in "tables", whichever is cheaper unless it is said.
    """
    ids = f.ids_present()
    if h.pick(ids[:0]) is None:
        return None
    if isinstance(h, Rows):
        ids = ids if h is f else ids[torch.isin(ids, h.ids_present())]
        joined = None if method == "tables" else _join(f, h, len(ids), certain=method == "join")
        if joined is not None:
            return joined
    each = (f.batch + h.batch) * f.matrix_shape[1] * f.dtype.itemsize
    out = f._zeros(f.batch, h.batch)
    for span in chunks(len(ids), each, limit(f.device)):
        rows = ids[span]
        F, H = f.pick(rows), h.pick(rows)
        assert F is not None
        assert H is not None
        out = out + F.flatten(1) @ H.flatten(1).mT
    return out


def _join(f: Rows, h: Rows, ids: int, *, certain: bool) -> Tensor | None:
    """Products of every two segments with one id, added up; None where tables are cheaper."""
    table = f.shape[0]
    if table == 0:
        return None
    keys, values = f.segments()
    others, more = (keys, values) if h is f else h.segments()
    order = torch.argsort(others % table, stable=True)
    sorted_ids = (others % table)[order]
    first = torch.searchsorted(sorted_ids, keys % table)
    count = torch.searchsorted(sorted_ids, keys % table, right=True) - first
    pairs = int(count.sum())
    by, width = constants(f.device, f.dtype), f.matrix_shape[1]
    if not certain and not costs.join_is_cheaper(pairs, f.batch, h.batch, ids, width, by):
        return None
    left = torch.repeat_interleave(count)  # which segment of f, for every pair
    offset = torch.arange(pairs, device=f.device) - (count.cumsum(0) - count)[left]
    right = order[first[left] + offset]
    out = f._zeros(f.batch * h.batch)
    for span in chunks(pairs, 3 * width * f.dtype.itemsize, limit(f.device)):
        one, two = left[span], right[span]
        target = (keys[one] // table) * h.batch + others[two] // table
        out = out.index_add(0, target, (values[one] * more[two]).sum(1))
    return out.view(f.batch, h.batch)
