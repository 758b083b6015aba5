"""Several losses that depend on the same rows of data, a part of them at a time.

Owns: parts of the losses in which no two share a row, and the words for them.
Does not know: how a pass over one part is run, rules, hooks.

A model with k outputs for each of R rows has R * k losses. Their gradients meet in the rows, but
those of R losses of different rows do not: k ordinary passes serve them all, where a loop would
take R * k. No part is believed to be one before its own plan says that its losses are apart.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pergrad.engine.meetings import below_meetings, first_meeting, meetings
from pergrad.errors import PergradError
from pergrad.graph import nodes
from pergrad.graph.plan import Plan, by_structure, plan_for
from pergrad.graph.walk import Graph

_LEAST = 2  # losses in a part. Measured: with two, parts take from a quarter to half of the loop
_KNOWN: OrderedDict[object, "Parts | None"] = OrderedDict()
_PLANNED: OrderedDict[object, "list[Apart]"] = OrderedDict()  # without losses and nodes
_MOST_KNOWN = 256


@dataclass(frozen=True, slots=True)
class Parts:
    """`each` losses of different rows make one of `count` parts."""

    count: int
    each: int
    in_turns: bool  # the losses of one row stand side by side: a part is every `count`-th loss

    def slices(self) -> list[slice]:
        """The losses of each part."""
        if self.in_turns:
            return [slice(part, None, self.count) for part in range(self.count)]
        return [slice(part * self.each, (part + 1) * self.each) for part in range(self.count)]

    def row(self) -> slice:
        """The losses of the first row."""
        return slice(0, self.count) if self.in_turns else slice(0, None, self.each)

    @property
    def summed(self) -> str:
        """What makes one loss of those of each row."""
        if self.in_turns:
            return f"losses.view({self.each}, {self.count}).sum(1)"
        return f"losses.view({self.count}, {self.each}).sum(0)"


def parts_of(
    losses: Tensor,
    params: Mapping[str, Tensor],
    graph: Graph,
    plan: Plan,
    check_layout: str,
) -> Parts | None:
    """The fewest parts in which no two losses meet; None if there are none.

    What was found for a graph is remembered, and no more than a guess: `planned` looks again.
    """
    if losses.dim() != 1:
        return None
    if plan.key in _KNOWN:
        return _KNOWN[plan.key]
    found = next(
        (
            parts
            for parts in _candidates(graph, plan)
            if _apart(losses, parts.slices()[0], params, check_layout) is not None
            and _apart(losses, parts.row(), params, check_layout) is None
        ),
        None,
    )
    _remember(_KNOWN, plan.key, found)
    return found


def _remember(known: OrderedDict, key: object, value: object) -> None:
    known[key] = value
    while len(known) > _MOST_KNOWN:
        known.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Apart:
    """Some of the losses, of which no two meet, and what has to be done for them."""

    where: slice
    losses: Tensor
    graph: Graph
    plan: Plan


def planned(
    losses: Tensor,
    params: Mapping[str, Tensor],
    parts: Parts | None,
    check_layout: str,
    graph: Graph,
    plan: Plan,
) -> list[Apart] | None:
    """What has to be done for each part; None if losses of one meet after all."""
    if parts is None:
        return None
    again = known(losses, graph, plan.key, check_layout)
    if again:
        return again
    found: list[Apart] = []
    for where in parts.slices():
        one = _apart(losses, where, params, check_layout)
        if one is None:
            return None
        found.append(one)
    if found and all(_lasts(one, graph) for one in found):
        kept = [Apart(one.where, torch.empty(0), _bare(one.graph), one.plan) for one in found]
        _remember(_PLANNED, plan.key, kept)
    return found or None


def _lasts(part: Apart, graph: Graph) -> bool:
    """Whether an equal graph of all losses has an equal one of the part: its own with a node more,
    and a plan that a measurement has agreed with.
    """
    same = part.graph.nodes[1:] == graph.nodes and graph.root == (0, 0) == part.graph.root
    below = same and part.graph.edges[0] == ((1, 0),)
    return below and part.plan.verified and by_structure(part.plan)


def _bare(graph: Graph) -> Graph:
    """Without what belongs to somebody."""
    return replace(graph, nodes=[], python=[], _metas={}, _names={})


def _again(losses: Tensor, kept: list[Apart], graph: Graph) -> list[Apart]:
    """The parts of a graph that is equal to the one that they are known from."""
    found: list[Apart] = []
    for part in kept:
        with torch.enable_grad():
            some = losses[part.where]
        if nodes.edges(some.grad_fn) != ((graph.nodes[0], 0),):
            return []
        own = replace(part.graph, nodes=[some.grad_fn, *graph.nodes], python=graph.python,
                      _metas={}, _names={})  # fmt: skip
        found.append(Apart(part.where, some, own, part.plan))
    return found


def known(losses: Tensor, graph: Graph, key: object, check_layout: str) -> list[Apart]:
    """What has to be done for each part of a graph that was served so, by its key; [] if none was.

    It need not be found again if no part's plan holds for certain numbers alone: then it follows
    from what the graph is, whatever the plan of all losses may be.
    """
    if check_layout == "always":
        return []
    return _again(losses, _PLANNED.get(key, []), graph)


def _candidates(graph: Graph, plan: Plan) -> list[Parts]:
    """Ways to part the losses, by the sizes of what they meet in, the fewest parts first."""
    batch = graph.batch
    sizes = {size for slot in meetings(graph, plan) for size in graph.shape(slot)}
    fitting = [size for size in sizes if _LEAST <= size < batch and batch % size == 0]
    return [
        Parts(batch // size, size, in_turns)
        for size in sorted(fitting, reverse=True)
        for in_turns in (True, False)
    ]


def _apart(
    losses: Tensor, where: slice, params: Mapping[str, Tensor], check_layout: str
) -> Apart | None:
    """One part, if the gradients of no two of its losses meet."""
    with torch.enable_grad():
        some = losses[where]
    try:
        graph, plan = plan_for(some, params, check_layout)
    except PergradError:  # the whole was planned, so it is the part that cannot be
        return None
    return None if plan.mixes or below_meetings(graph, plan) else Apart(where, some, graph, plan)


def meeting_warning(graph: Graph, plan: Plan, parts: Parts | None) -> str:
    """Why several passes are made though nobody asked for them, and what to do about it."""
    place = first_meeting(graph, plan)
    if parts is None:
        return (
            f"Gradients of several of the {graph.batch} losses meet {place}. They are exact, by "
            f"one backward pass for each loss: {graph.batch} passes. Where the losses depend on "
            "the same rows of data and one number for each row will do, add the row's losses up, "
            "at the price of one pass."
        )
    return (
        f"{parts.count} losses depend on each row of data: their gradients meet {place}. They are "
        f"exact, by {parts.count} backward passes, each for {parts.each} losses of different rows. "
        f"Where one number for each row will do, add its losses up, `{parts.summed}`, at the price "
        "of one pass."
    )


def price_of_meetings(graph: Graph, plan: Plan, parts: Parts | None, *, mixed: bool) -> str:
    """For `explain`: what the passes cost where gradients meet; "" if that is said elsewhere."""
    if not mixed:
        return meeting_warning(graph, plan, parts)
    if parts is None:
        return ""
    return (
        f"Examples interact, {parts.count} for each of {parts.each} rows of data, as it seems: "
        f'with on_mixing="exact" their gradients cost {parts.count} backward passes; those of one '
        f"loss for each row, `{parts.summed}`, cost one."
    )
