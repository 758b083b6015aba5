"""Exact per-example gradients of any op: its own backward, once per example.

Owns: the masked calls of one node.
Does not know: ops. It is what remains when no rule serves an operand.
"""

import torch
from torch import Tensor

from pergrad.factors import Dense, Factor, Placed
from pergrad.factors.numeric import result_dtype
from pergrad.graph import nodes
from pergrad.graph.layout import Layout
from pergrad.rules.registry import Situation


def fallback(use: Situation, slots: list[int], *, wanted: bool) -> dict[int, Factor | None]:
    """The gradient of each operand for every example that reaches the op, one call each.

    `wanted`: the backward pass under way computes these gradients too, so a call inside it will.
    """
    return _serve(use, slots) if wanted else nodes.outside_pass(lambda: _serve(use, slots))


def _serve(use: Situation, slots: list[int]) -> dict[int, Factor | None]:
    present = [layout.examples() for layout in use.layouts if layout is not None]
    examples = torch.cat(present).unique() if present else torch.zeros(0, dtype=torch.int64)
    collected: dict[int, list[Tensor]] = {slot: [] for slot in slots}
    for example in examples.tolist():
        masked = [
            None if g is None or layout is None else _only(g, layout, example)
            for g, layout in zip(use.cotangents, use.layouts, strict=True)
        ]
        results = nodes.call(use.node, masked)
        for slot in slots:
            operand = use.operands[slot]
            value = results[slot]
            if value is None:
                g = next(g for g in use.cotangents if g is not None)
                value = g.new_zeros(operand.shape)
            elif operand.lead:  # the operand lies below an expand along batch dimensions
                value = value.reshape(*operand.lead, *value.shape[1:])
                dims = [d for d, shared in enumerate(operand.shared) if shared]
                value = value.sum(dims, keepdim=True).reshape(operand.shape)
            collected[slot].append(value.to(result_dtype(value)))
    factors: dict[int, Factor | None] = {}
    for slot, rows in collected.items():
        if not rows:
            factors[slot] = None
            continue
        dense = Dense(torch.stack(rows))
        whole = len(rows) == use.batch
        factors[slot] = dense if whole else Placed(dense, examples, use.batch)
    return factors


def _only(g: Tensor, layout: Layout, example: int) -> Tensor:
    """The cotangent with every other example's elements set to zero, nan included."""
    mine = (layout.owner == example).to(g.device)
    return torch.where(mine, g, torch.zeros((), dtype=g.dtype, device=g.device))


def direct(g: Tensor, layout: Layout, batch: int) -> Factor | None:
    """A parameter whose own gradient separates by example: each element has one owner."""
    examples = layout.examples()
    if examples.numel() == 0:
        return None
    rows = torch.stack([_only(g, layout, b) for b in examples.tolist()])
    dense = Dense(rows.to(result_dtype(rows)))
    return dense if examples.numel() == batch else Placed(dense, examples, batch)
