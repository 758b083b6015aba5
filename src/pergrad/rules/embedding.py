"""Tables looked up by index: embeddings, bags of them, rows of a parameter.

Owns: lowering a look-up to `Rows`.
Does not know: what the indices mean.
"""

import torch
from torch import Tensor

from pergrad.factors import Factor, mapped
from pergrad.graph.layout import NOBODY
from pergrad.graph.transfer import bags
from pergrad.rules.positions import Partition, partition, row_owners, rows_by_id
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


_MODES = ("sum", "mean", "max")


@rule("embedding_bag")
def embedding_bag(use: Situation) -> Served:
    """out[bag] = sum, mean or maximum of weight[index] over a bag, perhaps each times a weight."""
    owners = row_owners(use.layout, (0,))
    if 0 not in use.operands or owners is None or use.attr("scale_grad_by_freq"):
        return {}
    g, shape, mode = use.g, use.operands[0].shape, _MODES[use.attr("mode")]
    if len(g) == 0:
        return {0: None}
    if mode == "max":
        return {0: _largest_of_bag(use, owners)}
    ids, bag = bags(use.saved("indices"), use.saved("offsets"), len(g))
    padding = use.attr("padding_idx")  # unsigned: none is 2^64 - 1
    counts = (bag >= 0) & (ids != padding if padding < shape[0] else True)
    at = bag.clamp_min(0)
    rows = g[at]
    if mode == "mean":
        size = torch.zeros(len(g), dtype=g.dtype, device=g.device)
        size = size.index_add(0, at, counts.to(g.dtype))
        rows = rows / size.clamp_min(1)[at][:, None]
    given = use.saved("per_sample_weights")
    if given is not None:
        rows = rows * given[:, None]
    whose = torch.where(counts.cpu(), owners[at.cpu()], NOBODY)
    return {0: rows_by_id(ids, rows, Partition(whose, use.batch), shape)}


def _largest_of_bag(use: Situation, owners: Tensor) -> Factor | None:
    """The maximum is taken column by column: single numbers of the table are looked up."""
    g, shape = use.g, use.operands[0].shape
    width = shape[1]
    columns = torch.arange(width, device=g.device)
    ids = use.saved("result3").long() * width + columns
    ids = torch.where(use.saved("result2")[:, None] > 0, ids, -1)  # empty bags
    whose = owners[:, None].expand(-1, width).reshape(-1)
    groups = Partition(whose, use.batch)
    factor = rows_by_id(ids.reshape(-1), g.reshape(-1), groups, (shape[0] * width,))
    return None if factor is None else mapped(factor, (("view", tuple(shape)),))


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
