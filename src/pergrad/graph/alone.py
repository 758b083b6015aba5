"""Layouts below one op of torch's whose structure nobody has told: measured at its node alone.

Owns: `Alone`, what was found at one node, and whether it holds at another.
Does not know: ops by name, plans.

The cotangents are made up: random numbers, each times its example's power of two. What comes back
follows the examples as the true ones' would, for torch's own ops are linear in the cotangent. So
nothing above has to be run. A user's Function may be anything, and is measured with true numbers.
"""

from collections.abc import Iterable
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from pergrad.graph import nodes
from pergrad.graph.layout import Layout
from pergrad.graph.ops import traits
from pergrad.graph.powers import MANY, UNSEEN, by_powers, hold, layout_of, ones, parts, times
from pergrad.graph.walk import Graph


class Alone:
    """What arrives below an op for cotangents of these layouts, and in nodes like it."""

    def __init__(self, outs: list[Layout | None], below: dict[int, Layout], examples: int) -> None:
        self.outs, self.below, self.examples = outs, below, examples

    @classmethod
    def measured(
        cls, graph: Graph, i: int, outs: list[Layout | None], inputs: Iterable[int], examples: int
    ) -> "Alone | None":
        """The layouts at these inputs of a node, but for those in which examples meet."""
        if not _may_be(graph, i):
            return None
        node = graph.nodes[i]
        run = _Run(node, outs)
        plain = run(ones(examples), list(inputs))
        owners = by_powers(run, plain, examples, narrow=False)
        children = nodes.edges(node)
        below: dict[int, Layout] = {}
        for k, owner in owners.items():
            child, number = children[k]
            if bool((owner == MANY).any()) or bool((owner == UNSEEN).any()):
                continue
            layout = layout_of(nodes.metas(child)[number].shape, owner, examples)
            if layout is not None:
                below[k] = layout
        return cls(outs, below, examples) if below else None

    def holds(self, graph: Graph, i: int) -> bool:
        """Whether it does at the same place in an equal graph."""
        if not _may_be(graph, i):
            return False
        run = _Run(graph.nodes[i], self.outs)
        plain = run(ones(self.examples), list(self.below))
        return hold(run, plain, self.below, self.examples)

    def nbytes(self) -> int:
        """The memory that it takes."""
        return sum(layout.owner.nbytes for layout in self.below.values())


class _Run:
    """One node's backward for seeds of the examples: as `powers` calls it."""

    def __init__(self, node: nodes.Node, outs: list[Layout | None]) -> None:
        self.node, self.outs = node, outs
        self.random = [
            None if layout is None else _random(node, n) for n, layout in enumerate(outs)
        ]

    def __call__(self, seeds: Tensor, inputs: list[int]) -> dict[int, Tensor | None]:
        cotangents = [
            None if r is None or layout is None else r * times(seeds, layout, nobody=0.0).to(r)
            for r, layout in zip(self.random, self.outs, strict=True)
        ]
        with torch.no_grad():
            found = nodes.outside_pass(lambda: nodes.call(self.node, cotangents))
        return {k: parts(found[k]) for k in inputs}


def _may_be(graph: Graph, i: int) -> bool:
    """Whether the op is torch's own, its cotangents real and not too narrow, and all at hand.

    What a checkpointed block has to compute again a pass reads once; and of an op that runs another
    nobody can tell whether it is in such a block.
    """
    return (
        nodes.is_torchs(graph.nodes[i])
        and all(meta.dtype in _WIDE for meta in graph.metas(i))
        and not nodes.is_checkpointed(graph.nodes[i])
        and not (traits(graph.op(i)).hides_saved and graph.is_checkpointed())
    )


_WIDE = (torch.float32, torch.float64, torch.bfloat16)
_PRIME = 65_537  # random numbers enough: no row of a model's is as long, or a part of it


@lru_cache(maxsize=4)
def _numbers(dtype: torch.dtype) -> Tensor:
    """Numbers between 1 and 2 of either sign."""
    generator = torch.Generator().manual_seed(24)
    values = torch.rand(_PRIME, generator=generator, dtype=torch.float64, device="cpu") + 1.0
    signs = torch.randint(0, 2, (_PRIME,), generator=generator, device="cpu") * 2.0 - 1.0
    return (values * signs).to(dtype)


def _random(node: nodes.Node, number: int) -> Tensor:
    """Random numbers like the cotangent at one output of the node."""
    meta = nodes.metas(node)[number]
    size = prod(meta.shape)
    values = _numbers(meta.dtype)
    if size > _PRIME:
        values = values.repeat(-(-size // _PRIME))
    return values[:size].reshape(meta.shape).to(meta.device)
