"""Plans that hold for certain indices alone, found again where the indices are the same.

Owns: `ByData`, copies of the indices that layouts were derived from, and the comparison.
Does not know: how layouts follow from indices.

A plan is taken for a graph only if every number that was read for it is as it was. So batches whose
masks, lengths or routes differ have a plan each, though their graphs look the same.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pergrad.graph import nodes
from pergrad.graph.alone import Alone
from pergrad.graph.ops import saved
from pergrad.graph.uses import Read
from pergrad.graph.walk import Graph

_Plan = TypeVar("_Plan")
_GRAPHS, _EACH = 16, 4  # how many graphs are remembered, and plans for each
_MOST_BYTES = 2**20  # of indices; what follows from them takes some times more


class ByData(Generic[_Plan]):
    """Plans by the graph's key, and by the indices that were read for them."""

    def __init__(self) -> None:
        self._plans: OrderedDict[Hashable, list[tuple[list[Read], _Plan]]] = OrderedDict()

    def clear(self) -> None:
        """Forget every plan."""
        self._plans.clear()

    def find(self, graph: Graph, key: Hashable) -> _Plan | None:
        """The plan of an equal graph with the same indices."""
        known = self._plans.get(key)
        if known is None:
            return None
        self._plans.move_to_end(key)
        seen: dict[tuple[int, str | None], Any] = {}
        for reads, plan in known:
            for node, field, value in reads:
                if field is None:
                    if not value.holds(graph, node):
                        break
                    continue
                if (node, field) not in seen:
                    if not nodes.saved_plainly(graph.nodes[node], field):
                        return None  # somebody's function would be called to read it
                    seen[node, field] = saved(graph.op(node), graph.nodes[node], field)
                if not _same(seen[node, field], value):
                    break
            else:
                return plan
        return None

    def add(self, graph: Graph, key: Hashable, reads: Sequence[Read], plan: _Plan) -> None:
        """Remember a plan, if its indices are few and cost nothing to read again."""
        if sum(_bytes(value) for _, _, value in reads) > _MOST_BYTES:
            return
        if not all(
            field is None or nodes.saved_plainly(graph.nodes[node], field)
            for node, field, _ in reads
        ):
            return
        kept = [Read(node, field, _copy(value)) for node, field, value in reads]
        known = self._plans.setdefault(key, [])
        known.insert(0, (kept, plan))
        del known[_EACH:]
        self._plans.move_to_end(key)
        while len(self._plans) > _GRAPHS:
            self._plans.popitem(last=False)


def _bytes(value: Any) -> int:
    if isinstance(value, Alone):
        return value.nbytes()
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def _copy(value: Any) -> Any:
    """Memory that nobody else writes to."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return tuple(map(_copy, value)) if isinstance(value, (tuple, list)) else value


def _same(now: Any, kept: Any) -> bool:
    """Whether what is read is what was kept, in every number."""
    if isinstance(kept, Tensor):
        return (
            isinstance(now, Tensor)
            and now.dtype == kept.dtype
            and now.shape == kept.shape
            and torch.equal(now.detach().cpu(), kept)
        )
    if isinstance(kept, tuple):
        return (
            isinstance(now, (tuple, list)) and len(now) == len(kept) and all(map(_same, now, kept))
        )
    return now is None if kept is None else bool(now == kept)
