"""Several cotangents of one op, those of losses that share its data, served as one.

Owns: the step from a situation for each part of the losses to one for all, where that can be.
Does not know: ops (`by_row` tells), parts of losses.

A rule that goes by rows needs no cotangent to belong to the op's own rows: it is handed those of
all parts, one after the other, and what the op saved of each row as often. One call then does what
would take as many as there are parts, and is busy with numbers for longer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pergrad.graph.layout import Layout, compressed
from pergrad.ops.registry import Situation, fields_by_row


def stacked(several: Sequence[Situation]) -> Situation | None:
    """One situation, in which example b of part j is example j * batch + b; None if there is none.

    All are of one node, with the same operands.
    """
    first = several[0]
    gs = [use.cotangents[0] for use in several]
    if any(g is not None for use in several for g in use.cotangents[1:]):
        return None
    if any(g is None or not g.dim() or g.is_complex() for g in gs):
        return None
    fields = fields_by_row(first)
    if fields is None:
        return None
    count = first.g.shape[0]
    for field in fields:
        value = first.saved(field, dense=False)
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        if not value.dim() or value.shape[0] != count:
            return None
    layouts = tuple(use.layout for use in several)
    return Situation(
        first.node, first.name, first.batch * len(several), [torch.cat([use.g for use in several])],
        (_one_after_the_other(layouts, first.batch),), first.operands,
        times=len(several), by_row=fields,
    )  # fmt: skip


def _one_after_the_other(layouts: tuple[Layout, ...], batch: int) -> Layout:
    """Kept with the first of them: a plan's layouts are the same objects at every call."""
    key = ("stacked", batch, *map(id, layouts))
    found = layouts[0].memo.get(key)
    if found is None:
        count, *rest = layouts[0].shape
        owners = []
        for part, layout in enumerate(layouts):
            owner = layout.owner.expand(count, *layout.owner.shape[1:])
            owners.append(torch.where(owner < 0, owner, owner + part * batch))
        sizes = [max(owner.shape[d] for owner in owners) for d in range(1, 1 + len(rest))]
        whole = torch.cat([owner.expand(count, *sizes) for owner in owners])
        layout = compressed((count * len(layouts), *rest), whole)
        # with the layouts, so that none of these numbers becomes another's
        found = layouts[0].memo[key] = (layouts, layout)
    stacked_: Layout = found[1]
    return stacked_
