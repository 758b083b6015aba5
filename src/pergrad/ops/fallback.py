"""Exact per-example gradients of any op: its own backward, once per example.

Owns: the masked calls of one node.
Does not know: ops, but for the one that hides others. It is what remains when no rule serves.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pergrad.factors import Computed, Dense, Factor, Placed
from pergrad.factors.numeric import result_dtype
from pergrad.graph import nodes
from pergrad.graph.layout import Layout
from pergrad.graph.ops import Reads, declare, traits
from pergrad.ops.registry import Operand, Situation

declare("copy_slices", reads=Reads.UNKNOWN, hides_saved=True)  # an op in place on a view


def fallback(use: Situation, slots: list[int], *, wanted: bool) -> dict[int, Factor | None]:
    """The gradient of each operand for every example that reaches the op, one call each.

    `wanted`: the backward pass under way computes these gradients too, so a call inside it will.
    The factors are lazy and good for as long as the node's saved tensors are. They are real: the
    gradient of a complex operand has one more dimension, of its real and imaginary parts.
    """
    present = [layout.examples() for layout in use.layouts if layout is not None]
    examples = (
        torch.cat(present).unique() if present else torch.zeros(0, dtype=torch.int64, device="cpu")
    )
    if examples.numel() == 0:
        return dict.fromkeys(slots)
    # What an in-place slice saved cannot be seen from outside: if a checkpointed block recomputes
    # it, a pass may read it once, but a call outside the pass as often as it likes.
    calls = _Calls(use, slots, examples, wanted and not traits(use.name).hides_saved)
    like = next(g for g in use.cotangents if g is not None)
    like = like.real if like.is_complex() else like
    factors: dict[int, Factor | None] = {}
    for slot in slots:
        shape = use.operands[slot].shape
        child, number = nodes.edges(use.node)[slot]
        if nodes.metas(child)[number].dtype.is_complex:
            shape = (*shape, 2)
        rows = Computed(len(examples), shape, calls.of(slot), like.new_empty(0))
        whole = len(examples) == use.batch
        factors[slot] = rows if whole else Placed(rows, examples, use.batch)
    return factors


class _Calls:
    """Masked calls of one node. A call serves all operands, so the last chunk's are kept."""

    def __init__(self, use: Situation, slots: list[int], examples: Tensor, wanted: bool) -> None:
        self.use, self.slots, self.examples, self.wanted = use, slots, examples, wanted
        self.index: Tensor | None = None
        self.rows: dict[int, Tensor] = {}

    def of(self, slot: int) -> Callable[[Tensor], Tensor]:
        """The function from positions in `examples` to rows of one operand's gradient."""

        def rows(index: Tensor) -> Tensor:
            if self.index is None or not torch.equal(self.index, index):
                if self.wanted:
                    self.rows = self._run(index)
                else:
                    self.rows = nodes.outside_pass(lambda: self._run(index))
                self.index = index
            return self.rows[slot]

        return rows

    def _run(self, index: Tensor) -> dict[int, Tensor]:
        use = self.use
        found: dict[int, list[Tensor]] = {slot: [] for slot in self.slots}
        for example in self.examples[index].tolist():
            masked = [
                None if g is None or layout is None else _only(g, layout, example)
                for g, layout in zip(use.cotangents, use.layouts, strict=True)
            ]
            results = nodes.call(use.node, masked)
            like = next(g for g in masked if g is not None)
            for slot in self.slots:
                value = _of_operand(results[slot], use.operands[slot], like)
                value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
                found[slot].append(value.to(result_dtype(value)))
        return {slot: torch.stack(rows) for slot, rows in found.items()}


def _of_operand(value: Tensor | None, operand: Operand, like: Tensor) -> Tensor:
    if value is None:
        return like.new_zeros(operand.shape)
    if operand.lead:  # the operand lies below an expand along batch dimensions
        value = value.reshape(*operand.lead, *value.shape[1:])
        dims = [d for d, shared in enumerate(operand.shared) if shared]
        value = value.sum(dims, keepdim=True) if dims else value  # without dims: the sum of all
    return value.reshape(operand.shape)


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
