"""What becomes of losses in which examples interact.

Owns: the refusal and its remedies, what `on_mixing="exact"` costs, and for which parameters a
backward pass for each example is the cheapest exact way.
Does not know: how such a pass is run, rules, factors.
"""

from math import prod

from torch import Tensor

from pergrad.engine.places import place_of
from pergrad.errors import MixedExamplesError
from pergrad.graph.plan import Plan, interact
from pergrad.graph.walk import Graph


def refuse(losses: Tensor, graph: Graph, plan: Plan, check_layout: str) -> None:
    """Nothing, unless examples interact.

    Raises:
        MixedExamplesError: they do, or may.
    """
    if not interact(losses, graph, plan, check_layout):
        return
    batch = graph.batch
    mix = next((m for m in plan.mixes if m.sure), plan.mixes[0])
    op = graph.op(mix.parent)
    place = place_of(graph, mix.parent)
    price = f"at about the cost of {batch} backward passes, one for each loss"
    tokens = _positions(graph, batch)
    if tokens is not None:
        examples, length = tokens
        remedy = (
            f"There are {batch} losses, as many as {examples} x {length} positions: if they are "
            "losses per token, which depend on all tokens of their sequence, reduce them to one "
            f"for each sequence, `losses.view({examples}, {length}).sum(1)` (then pergrad's "
            "ordinary price), "
        )
    elif "batch_norm" in op:
        remedy = "Call `model.eval()` (or `.eval()` on that module), use GroupNorm or LayerNorm, "
    else:
        remedy = "Compute the loss of each example from that example alone, "
    what = (
        f"The op `{op}` {place} mixes examples: the loss of one example depends on the others in "
        "the batch, so its gradient cannot be read off its own rows. "
        if mix.sure
        else f"The op `{op}` {place} combines every example with as many rows as there are "
        "examples, all computed from data. The graph cannot tell whether these are the examples "
        "themselves, as in a contrastive loss, which mixes examples, or something that all of them "
        "share, such as prototypes, which does not. "
    )
    raise MixedExamplesError(
        f'{what}{remedy}or pass on_mixing="exact" to get the exact gradients of these losses all '
        f"the same, {price}."
    )


def _positions(graph: Graph, batch: int) -> tuple[int, int] | None:
    """(sequences, positions), if a tensor of the model has one position for each loss."""
    shapes = [
        meta.shape for i in range(len(graph.nodes)) if graph.leads[i] for meta in graph.metas(i)
    ]
    for shape in shapes:
        if len(shape) >= 3 and shape[0] * shape[1] == batch and min(shape[:2]) > 1:
            return shape[0], shape[1]
    return None


def below_meetings(losses: Tensor, graph: Graph, plan: Plan, check_layout: str) -> tuple[str, ...]:
    """The parameters below places where examples meet, if the loop is the cheapest way to them.

    From each such place every example's gradient would have to go down to each parameter on its
    own. From one place near the parameters that is little; from several, or from far above, it is
    more than to begin at the losses once for each example.
    """
    if not plan.mixes or not _certain(losses, graph, plan, check_layout):
        return ()
    sizes = [
        sum(prod(meta.shape) for meta in graph.metas(i)) if leads else 0
        for i, leads in enumerate(graph.leads)
    ]
    # where tokens meet in attention, the graph alone would not say that they are examples
    meetings = {slot for slot in plan.routes if not graph.pure[slot[0]]}
    meetings |= {mix.child for mix in plan.mixes}
    ways = [way for slot in meetings for way in plan.routes.get(slot, ()) if way.steps is None]
    descents = sum(
        sum(sizes[i] for i in graph.below([way.start[0]]) & _above(graph, way.target[0]))
        for way in ways
    )
    if 2 * descents < sum(sizes):
        return ()
    reached = graph.below(slot[0] for slot in meetings)
    return tuple(name for (i, _), name in graph.targets.items() if i in reached)


def _certain(losses: Tensor, graph: Graph, plan: Plan, check_layout: str) -> bool:
    return any(mix.sure for mix in plan.mixes) or interact(losses, graph, plan, check_layout)


def _above(graph: Graph, index: int) -> set[int]:
    """Nodes from which this one is reached, and it."""
    reached = {index}
    for i in range(index - 1, -1, -1):  # consumers come before producers
        if any(child in reached for child in graph.children(i)):
            reached.add(i)
    return reached
