"""What is said where losses depend on each other's examples.

Owns: the refusal, its remedies, and what `on_mixing="exact"` costs.
Does not know: how that is computed, rules, factors.
"""

from pergrad.engine.parts import Parts
from pergrad.engine.places import place_of
from pergrad.errors import MixedExamplesError
from pergrad.graph.plan import Plan
from pergrad.graph.uses import Mix
from pergrad.graph.walk import Graph


def refuse(graph: Graph, plan: Plan, parts: Parts | None) -> None:
    """Always, where examples interact; with `parts` at the price of fewer passes.

    Raises:
        MixedExamplesError: they do, or may.
    """
    batch = graph.batch
    mix = next((m for m in plan.mixes if m.sure), plan.mixes[0])
    op = graph.op(mix.parent)
    place = place_of(graph, mix.parent)
    price = f"at about the cost of {batch} backward passes, one for each loss"
    if parts is not None:
        price = (
            f"at about the cost of {parts.count} backward passes, each for {parts.each} losses of "
            "different rows of data"
        )
    tokens = _positions(graph, batch)
    if tokens is not None:
        examples, length = tokens
        remedy = (
            f"There are {batch} losses, as many as {examples} x {length} positions: if they are "
            "losses per token, which depend on all tokens of their sequence, reduce them to one "
            f"for each sequence, `losses.view({examples}, {length}).sum(1)` (then pergrad's "
            "ordinary price), "
        )
    elif parts is not None:
        remedy = (
            f"There seem to be {parts.count} losses for each of {parts.each} rows of data, which "
            f"all depend on their row: reduce them to one for each row, `{parts.summed}` (then "
            "pergrad's ordinary price), "
        )
    elif "batch_norm" in op:
        remedy = "Call `model.eval()` (or `.eval()` on that module), use GroupNorm or LayerNorm, "
    else:
        remedy = "Compute the loss of each example from that example alone, "
    raise MixedExamplesError(
        f"The op `{op}` {place} {_what(graph, mix)}{remedy}"
        'or pass on_mixing="exact" to get the exact gradients of these losses all '
        f"the same, {price}."
    )


def _what(graph: Graph, mix: Mix) -> str:
    """What happens there, no more than is known of it."""
    if mix.sure and not mix.rows:
        return (
            "mixes examples: the loss of one example depends on the others in the batch, so its "
            "gradient cannot be read off its own rows. "
        )
    if mix.sure:
        return (
            "mixes examples: the loss of one example depends on rows of the others too, so its "
            "gradient cannot be read off its own. "
        )
    if mix.product:
        return (
            "combines every example with as many rows as there are examples, all computed from "
            "data. The graph cannot tell whether these are the examples themselves, as in a "
            "contrastive loss, which mixes examples, or something that all of them share, such as "
            "prototypes, which does not. "
        )
    size = graph.shape(mix.child)[0]
    return (
        f"gives several examples a share in the same numbers, computed from data in {size} rows "
        f"where there are {graph.batch} examples. The graph cannot tell whether these are the "
        "examples' own, which mixes examples, or a table that all of them read, which does not. "
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
