"""Grouped matrix products: the fused mixture of experts.

Owns: lowering rows sorted by expert to `Outer`, an expert a group.
Does not know: routing. The saved offsets tell which expert has a row, the layout which example.
"""

import torch

from pergrad.rules.positions import outer_by_group, row_owners
from pergrad.rules.registry import Served, Situation, rule


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
