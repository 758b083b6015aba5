"""Where gradients of several losses meet, and what lies below.

Owns: these places, and for which parameters a backward pass for each example is the cheapest exact
way.
Does not know: how such a pass is run, what is said of it, rules, factors.
"""

from math import prod

from pergrad.engine.places import place_of
from pergrad.graph.plan import Plan
from pergrad.graph.walk import Graph, Slot


def meetings(graph: Graph, plan: Plan) -> set[Slot]:
    """Where gradients of several losses may be added up in something computed from data."""
    # where tokens meet in attention, the graph alone would not say that they are examples
    return {slot for slot in plan.routes if not graph.pure[slot[0]]} | {
        mix.child for mix in plan.mixes
    }


def below_meetings(graph: Graph, plan: Plan) -> tuple[str, ...]:
    """The parameters below places where gradients meet, if the loop is the cheapest way to them.

    From each such place every example's gradient would have to go down to each parameter on its
    own. From one place near the parameters that is little; from several, or from far above, it is
    more than to begin at the losses once for each example. It is remembered with the plan.
    """
    if plan.met is None:
        plan.met = _below_meetings(graph, plan)
    return plan.met


def _below_meetings(graph: Graph, plan: Plan) -> tuple[str, ...]:
    slots = meetings(graph, plan)
    ways = [way for slot in slots for way in plan.routes.get(slot, ()) if way.steps is None]
    if not ways:
        return ()
    sizes = [
        sum(prod(meta.shape) for meta in graph.metas(i)) if leads else 0
        for i, leads in enumerate(graph.leads)
    ]
    below: dict[int, set[int]] = {}
    above: dict[int, set[int]] = {}
    descents, all_of_it = 0, sum(sizes)
    for way in ways:
        start, end = way.start[0], way.target[0]
        if start not in below:
            below[start] = graph.below([start])
        if end not in above:
            above[end] = _above(graph, end)
        descents += sum(sizes[i] for i in below[start] & above[end])
        if 2 * descents >= all_of_it:
            break
    else:
        return ()
    reached = graph.below(slot[0] for slot in slots)
    return tuple(name for (i, _), name in graph.targets.items() if i in reached)


def first_meeting(graph: Graph, plan: Plan) -> str:
    """In words, the op nearest to the losses at which gradients of several meet."""
    first = min(meetings(graph, plan))
    above = max((i for i, below in enumerate(graph.edges) if first in below), default=first[0])
    return f"first at the op `{graph.op(above)}` {place_of(graph, above)}"


def _above(graph: Graph, index: int) -> set[int]:
    """Nodes from which this one is reached, and it."""
    reached = {index}
    for i in range(index - 1, -1, -1):  # consumers come before producers
        if any(child in reached for child in graph.children(i)):
            reached.add(i)
    return reached
