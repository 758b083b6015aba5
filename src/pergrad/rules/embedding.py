"""Tables looked up by index: embedding, indexing and gathering rows of a parameter.

Owns: lowering a look-up to `Rows`.
Does not know: what the indices mean.
"""

import torch

from pergrad.rules.positions import partition, rows_by_id
from pergrad.rules.registry import Served, Situation, rule


@rule("embedding")
def embedding(use: Situation) -> Served:
    """out[...] = weight[indices[...]]; the row `padding_idx` gets no gradient."""
    ids = use.saved("indices")
    rows = partition(use.layout, tuple(range(ids.dim())), use.batch)
    if rows is None:
        return {}
    g = use.g.reshape(ids.numel(), use.g.shape[-1])
    ids = ids.reshape(-1).long()
    shape = use.operands[0].shape
    if use.attr("scale_grad_by_freq"):
        # By the counts in the whole batch, as torch does: the forward pass was one call.
        g = g / torch.bincount(ids, minlength=shape[0])[ids].to(g.dtype)[:, None]
    padding = use.attr("padding_idx")
    if padding is not None and padding >= 0:
        ids = torch.where(ids == padding, -1, ids)
    return {0: rows_by_id(ids, g, rows, shape)}


@rule("index_select")
def index_select(use: Situation) -> Served:
    """Rows of a parameter chosen along its first dimension."""
    if use.attr("dim") not in (0, -len(use.operands[0].shape)):
        return {}
    rows = partition(use.layout, (0,), use.batch)
    if rows is None:
        return {}
    return {0: rows_by_id(use.saved("index").reshape(-1).long(), use.g, rows,
                          use.operands[0].shape)}  # fmt: skip


@rule("index")
def index(use: Situation) -> Served:
    """table[ids] with one integer index tensor, on the first dimension."""
    indices = use.saved("indices")
    if len([i for i in indices if i is not None]) != 1 or indices[0] is None:
        return {}
    ids = indices[0]
    if ids.dtype in (torch.bool, torch.uint8):
        return {}
    rows = partition(use.layout, tuple(range(ids.dim())), use.batch)
    if rows is None:
        return {}
    shape = use.operands[0].shape
    ids = ids.to(use.g.device).reshape(-1).long()
    ids = torch.where(ids < 0, ids + shape[0], ids)
    return {0: rows_by_id(ids, use.g.reshape(ids.numel(), *shape[1:]), rows, shape)}
