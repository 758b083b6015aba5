"""Regions compiled by torch.compile: their backward graph is read like torch's own.

Owns: how ownership moves through a region, and the rule for the parameters that are used in it.
Does not know: single ops of aten (`owners`, `places`, `ends`).
"""

from collections.abc import Iterable

from pergrad.graph import nodes
from pergrad.graph.layout import Layout
from pergrad.graph.ops import Op, Result, Why, declare, owners_of_all
from pergrad.graph.uses import Site
from pergrad.ops.compiled import places as places
from pergrad.ops.compiled.owners import SUMMED
from pergrad.ops.compiled.reading import Reading, reading_of
from pergrad.ops.registry import Served, Situation, rule

__all__ = ["Reading", "reading_of", "unread"]

declare("CompiledFunction")


@owners_of_all("CompiledFunction")
def _compiled(op: Op, outs: list[Layout | None]) -> list[Result]:
    reading = reading_of(op.node, outs, op.examples)
    if isinstance(reading, str):
        return [None if s is None else Why.UNKNOWN for s in op.in_shapes]
    return [
        None if shape is None else _result(reading, slot, shape)
        for slot, shape in enumerate(op.in_shapes)
    ]


def _result(reading: Reading, slot: int, shape: tuple[int, ...]) -> Result:
    result = reading.results[slot]
    state = None if result is None else reading.states[result]
    if isinstance(state, Layout):
        return state if state.shape == shape and reading.why_not(slot) is None else Why.UNKNOWN
    return Why.CONTRACTED if state is SUMMED else Why.UNKNOWN


@rule("CompiledFunction")
def compiled(use: Situation) -> Served:
    """The region's backward as far as the places where it would sum over examples."""
    reading = reading_of(use.node, use.layouts, use.batch)
    use.told.update((slot, f"{use.name} ({why})") for slot, why in _reasons(reading, use.operands))
    if isinstance(reading, str):
        return {}
    slots = [slot for slot in use.operands if reading.why_not(slot) is None]
    use.told.update((slot, f"{use.name}: {reading.ops(slot)}") for slot in slots)
    if not slots:
        return {}
    arguments, _ = nodes.region_arguments(use.node, use.cotangents)
    return reading.factors(reading.values(arguments), slots)


def unread(node: nodes.Node, site: Site, batch: int) -> dict[int, str]:
    """Why there is no factor, by the edges of a region at which there is none."""
    return dict(_reasons(reading_of(node, site.layouts, batch), site.slots))


def _reasons(reading: Reading | str, slots: Iterable[int]) -> list[tuple[int, str]]:
    if isinstance(reading, str):
        return [(slot, reading) for slot in slots]
    return [(slot, why) for slot in slots if (why := reading.why_not(slot)) is not None]
