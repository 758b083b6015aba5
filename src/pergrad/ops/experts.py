"""Grouped matrix products: the fused mixture of experts.

Owns: lowering rows sorted by expert to `Outer`, an expert a group.
Does not know: routing. The saved offsets tell which expert has a row, the layout which example.
"""

import torch

from pergrad.graph.layout import Layout, smear
from pergrad.graph.ops import Op, Reads, Result, Why, declare, owners, resized
from pergrad.ops.registry import Served, Situation, rule
from pergrad.ops.rows import outer_by_group, row_owners

declare("grouped_mm", needs=["self", "offs"], reads=Reads.MISSING, weights=True)


@owners("grouped_mm")
def _grouped_mm(op: Op, out: Layout) -> list[Result]:
    one, two = op.in_shapes[:2]
    left: Result = None
    if one is not None:
        left = resized(smear(out, [len(out.shape) - 1]), one) if len(one) == 2 else Why.UNKNOWN
    return [left, None if two is None else Why.CONTRACTED] + [None] * (len(op.in_shapes) - 2)


@rule("grouped_mm")
def grouped(use: Situation) -> Served:
    """out[t] = rows[t] @ weight[e] for t below offsets[e] and not below offsets[e - 1]."""
    ends = use.saved("offs")
    if 1 not in use.operands or len(use.operands[1].shape) != 3 or ends is None:
        return {}
    rows = use.saved("self")
    owners = row_owners(use.layout, (0,)) if rows.dim() == 2 else None
    if owners is None:
        return {}
    shape = use.operands[1].shape
    expert = torch.searchsorted(
        ends.long(), torch.arange(len(rows), device=ends.device), right=True
    )
    expert = torch.where(expert < shape[0], expert, -1)  # rows behind the last expert are nobody's
    return {1: outer_by_group(rows, use.g, owners, expert, shape[0], use.batch, shape)}
