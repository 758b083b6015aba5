"""Tables looked up by index: embeddings, and bags of them.

Owns: lowering a look-up to `Rows`; how ownership moves to the weights of a bag's entries.
Does not know: what the indices mean; other ops with an index (`indexing`).
"""

from math import prod

import torch
from torch import Tensor

from pergrad.factors import Factor, mapped
from pergrad.graph.layout import NOBODY, Layout, along, smear
from pergrad.graph.ops import Op, Reads, Result, Step, Why, contracted, declare, owners, steps
from pergrad.ops.registry import Served, Situation, by_row, rule
from pergrad.ops.rows import Partition, partition, row_owners, rows_by_id
from pergrad.recording import flagged, is_recorded, read

declare(
    "embedding",
    needs=["indices", "scale_grad_by_freq", "padding_idx", "sparse"],
    reads=Reads.ALWAYS,
    weights=True,
    looks_up=True,
)


@owners("embedding")
def _embedding(op: Op, out: Layout) -> list[Result]:
    return contracted(op.in_shapes)


@steps("embedding", read_data=True)
def _neighbours(op: Op, _: int) -> tuple[Step, ...] | None:
    """A look-up of rows that lie one after the other, as positions do, is a slice of the table."""
    ids, shape = op.data("indices").reshape(-1), op.in_shapes[0]
    assert shape is not None
    padding = op.attr("padding_idx")
    if not ids.numel() or op.attr("scale_grad_by_freq"):
        return None
    ideal = ids[0] + torch.arange(ids.numel(), dtype=ids.dtype, device=ids.device)
    # read at once: a GPU makes the CPU wait each time
    start, equal = read(lambda: torch.stack([ids[0], (ids == ideal).all().to(ids.dtype)]).tolist())
    if equal and is_recorded():
        flagged(ids != start + ideal - ids[0])
    if not equal or (padding is not None and start <= padding < start + ids.numel()):
        return None
    count = prod(op.out_shapes[0]) // max(1, shape[1])
    return ("view", (count, shape[1])), ("embed", shape, 0, int(start))


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
    return {0: rows_by_id(ids, g, rows, shape, sparse=bool(use.attr("sparse")))}


@by_row("embedding")
def _ids(use: Situation) -> tuple[str, ...] | None:
    # torch scales by how often an index occurs in the forward pass
    return None if use.attr("scale_grad_by_freq") else ("indices",)


declare(
    "embedding_bag",
    needs=[
        "indices",
        "offsets",
        "scale_grad_by_freq",
        "sparse",
        "mode",
        "padding_idx",
        "per_sample_weights",
        "result2",
        "result3",
    ],
    reads=Reads.MISSING,
    weights=True,
    looks_up=True,
)


@owners("embedding_bag")
def _embedding_bag(op: Op, out: Layout) -> list[Result]:
    table, *rest = op.in_shapes
    results: list[Result] = [None if table is None else Why.CONTRACTED]
    for shape in rest:  # the weights of single entries
        plain = None if shape is None else smear(out, [1])
        if shape is None:
            results.append(None)
        elif plain is None:
            results.append(Why.UNKNOWN)
        else:
            _, bag = bags(op.data("indices"), op.data("offsets"), out.shape[0])
            owner = plain.owner[:, 0].expand(out.shape[0])[bag.clamp_min(0).cpu()]
            results.append(along(shape, 0, torch.where(bag.cpu() < 0, NOBODY, owner)))
    return results


def bags(indices: Tensor, offsets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(entries,) twice: the row that an entry looks up, and its bag; -1 behind the last one."""
    places = torch.arange(indices.numel(), device=indices.device)
    bag = torch.searchsorted(offsets.long(), places, right=True) - 1
    return indices.reshape(-1).long(), torch.where(bag < count, bag, -1)


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
    sparse = bool(use.attr("sparse"))
    return {0: rows_by_id(ids, rows, Partition(whose, use.batch), shape, sparse=sparse)}


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
