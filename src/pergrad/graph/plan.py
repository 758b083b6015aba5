"""What has to be done for one graph, found once and remembered for equal graphs.

Owns: `Plan` and its bounded cache.
Does not know: numbers. A plan holds node indices, never nodes or tensors of the user's.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from pergrad.errors import UsageError
from pergrad.graph import routes as ways_down
from pergrad.graph.by_data import ByData
from pergrad.graph.flaws import Suspects, suspects
from pergrad.graph.layout import Layout
from pergrad.graph.measure import measure, stand_beside, verify
from pergrad.graph.ops import traits
from pergrad.graph.routes import Route
from pergrad.graph.uses import Measured, Mix, Site, Uses, find_uses
from pergrad.graph.walk import Graph, Key, Slot, walk


@dataclass(frozen=True, slots=True)
class End:
    """Where the operand of a use begins to depend on parameters alone."""

    slot: Slot
    shape: tuple[int, ...]
    lead: tuple[int, ...] = ()
    shared: tuple[bool, ...] = ()


@dataclass(slots=True)
class Plan:
    """Every use of every requested parameter, and the way from there to the parameter."""

    sites: list[Site]
    ends: dict[tuple[int, int], End]  # (node, input) -> operand
    direct: dict[Slot, Layout]
    routes: dict[Slot, list[Route]]  # by the operand's slot
    mixes: list[Mix]
    known_mixed: frozenset[Slot]
    key: Key
    suspects: Suspects  # where torch's own backward may be wrong
    verified: bool = False  # whether a measurement has agreed
    schedule: Any = None  # what the engine has worked out from it
    met: tuple[str, ...] | None = None  # what the engine serves otherwise, as losses meet above it
    beside: bool | None = None  # whether examples only seem to interact; unknown before it is asked


_CACHE: OrderedDict[Key, Plan] = OrderedDict()
_BY_DATA: ByData[Plan] = ByData()
_BY_MEASURE: "ByData[_Found]" = ByData()
_MIXED: OrderedDict[object, frozenset[Slot]] = OrderedDict()
_VERIFIED: OrderedDict[object, bool] = OrderedDict()
_CACHE_SIZE = 256
_MOST_BYTES = 2**20  # of layouts that were measured for one plan


def clear() -> None:
    """Forget every plan."""
    _CACHE.clear()
    _BY_DATA.clear()
    _BY_MEASURE.clear()
    _MIXED.clear()
    _VERIFIED.clear()


@contextmanager
def nothing_remembered() -> Iterator[None]:
    """What is found within is forgotten: there tensors stand for others and have no numbers."""
    caches: tuple[OrderedDict[Any, Any], ...] = (_CACHE, _MIXED, _VERIFIED)
    before = [cache.copy() for cache in caches]
    try:
        yield
    finally:
        for cache, kept in zip(caches, before, strict=True):
            cache.clear()
            cache.update(kept)


def plan_for(
    losses: Tensor, params: Mapping[str, Tensor], check_layout: str = "once"
) -> tuple[Graph, Plan]:
    """The graph of `losses` and what has to be done for it.

    Layouts follow from the structure of the ops, for any numbers; they are measured where an op's
    structure is not known, and then hold for this batch only. `check_layout` says when the former
    are held against a measurement as well: once per form of graph, always, or never.

    Raises:
        UsageError: check_layout is "never" and a layout would have to be measured.
        UnsupportedError: a re-entrant checkpoint, or a layout that does not hold.
    """
    graph = walk(losses, params)
    return graph, plan_of(graph, losses, check_layout)


def plan_of(
    graph: Graph, losses: Tensor, check_layout: str = "once", key: Key | None = None
) -> Plan:
    """What has to be done for a graph walked from `losses`, of this key; as `plan_for`."""
    key = graph.key() if key is None else key
    plan = _CACHE.get(key)
    if plan is not None:
        _CACHE.move_to_end(plan.key)  # the very one in there: no comparison part by part
    else:
        plan = _BY_DATA.find(graph, key)
    if plan is None:
        # That examples meet somewhere may be remembered: treating them so is exact in any case.
        # That they do not, found by measuring, holds for this batch only.
        mixed = _MIXED.get(key, frozenset())
        measured = _Measurer(losses, check_layout)
        plan = _measured_again(graph, key, mixed, measured)
    if plan is None:
        uses = find_uses(graph, graph.batch, measured, mixed)
        plan = _plan(graph, uses, key)
        if not uses.measured and not uses.read:
            _remember(_CACHE, key, plan)
        else:
            if uses.known_mixed:
                _remember(_MIXED, key, uses.known_mixed)
            if not uses.measured:
                _BY_DATA.add(graph, key, uses.read, plan)
            elif measured.few():
                _BY_MEASURE.add(graph, key, uses.read, _Found(mixed, measured.asked(), plan))
    _verify(losses, graph, plan, check_layout)
    return plan


def by_structure(plan: Plan) -> bool:
    """Whether the plan is that of every equal graph, and not of one with certain numbers in it."""
    return _CACHE.get(plan.key) is plan


def interact(losses: Tensor, graph: Graph, plan: Plan, check_layout: str) -> bool:
    """Whether examples meet in this graph, rather than stand beside what all of them share."""
    if not plan.mixes or check_layout == "never":
        return bool(plan.mixes)
    if plan.beside is None:
        plan.beside = stand_beside(losses, graph, {mix.child for mix in plan.mixes})
    return not plan.beside


def layouts_in(losses: Tensor, graph: Graph, check_layout: str) -> dict[Slot, Layout]:
    """Whose the elements of a cotangent are, wherever in the graph examples are separate.

    Raises:
        UsageError: as in `plan_for`.
    """
    return find_uses(graph, graph.batch, _Measurer(losses, check_layout)).layouts


class _Found(NamedTuple):
    """A plan that holds where the same is measured: all else that it follows from is in the key and
    in the indices that were read.
    """

    mixed: frozenset[Slot]  # what was known beforehand
    measured: Measured
    plan: Plan


class _Measurer:
    """Measures each place once."""

    def __init__(self, losses: Tensor, check_layout: str) -> None:
        self.losses, self.check_layout = losses, check_layout
        self._found: Measured = {}
        self._asked: set[Slot] = set()

    def __call__(self, graph: Graph, slots: list[Slot]) -> Measured:
        """The layouts at these places, as `measure` says."""
        if self.check_layout == "never":
            raise NotMeasuredError(graph, slots)
        self._asked.update(slots)
        return self.ahead(graph, slots)

    def ahead(self, graph: Graph, slots: list[Slot], before: Measured | None = None) -> Measured:
        """The same, where it will probably be asked for, and was found to be as `before`."""
        new = [slot for slot in slots if slot not in self._found]
        if new:
            self._found |= measure(self.losses, graph, new, before)
        return {slot: self._found[slot] for slot in slots}

    def few(self) -> bool:
        """Whether what was found takes little memory."""
        owners = [layout.owner for layout in self._found.values() if layout is not None]
        return sum(owner.nbytes for owner in owners) <= _MOST_BYTES

    def asked(self) -> Measured:
        """All that was asked for."""
        return {slot: self._found[slot] for slot in self._asked}


def _measured_again(
    graph: Graph, key: Key, mixed: frozenset[Slot], measured: _Measurer
) -> Plan | None:
    """The plan of an equal graph with the same indices, if the same is measured in this one."""
    before = _BY_MEASURE.find(graph, key) if measured.check_layout != "never" else None
    if before is None or before.mixed != mixed:
        return None
    for slot, now in measured.ahead(graph, list(before.measured), before.measured).items():
        then = before.measured[slot]
        if now is None or then is None:
            if now is not then:
                return None
        elif not now.same(then):
            return None
    before.plan.beside = None  # which numbers say, too
    return before.plan


class NotMeasuredError(UsageError):
    """check_layout="never", and an op whose layout has to be measured; `place` is where."""

    def __init__(self, graph: Graph, slots: list[Slot]) -> None:
        below = graph.names_below(slots[0][0], 1)
        near = f" near parameter `{below[0]}`" if below else ""
        self.place = f"above `{graph.op(slots[0][0])}`{near}"
        super().__init__(
            f"The op {self.place} does not tell from its structure which rows belong to which "
            'example, and check_layout="never" forbids to measure it. Use check_layout="once".'
        )


def _verify(losses: Tensor, graph: Graph, plan: Plan, check_layout: str) -> None:
    if check_layout == "never" or graph.batch < 2:
        return
    if plan.verified and check_layout == "once":
        return
    form = hash(graph.form())
    if check_layout == "once" and form in _VERIFIED:
        plan.verified = True
        return
    layouts = {
        (site.node, n): layout
        for site in plan.sites
        for n, layout in enumerate(site.layouts)
        if layout is not None
    }
    layouts.update(plan.direct)
    if layouts:
        verify(losses, graph, layouts, lambda: layouts_in(losses, graph, check_layout))
    _remember(_VERIFIED, form, True)
    plan.verified = True


def _remember(cache: OrderedDict, key: object, value: object) -> None:
    cache[key] = value
    while len(cache) > _CACHE_SIZE:
        cache.popitem(last=False)


def _plan(graph: Graph, uses: Uses, key: Key) -> Plan:
    ends: dict[tuple[int, int], End] = {}
    for site in uses.sites:
        for k in site.slots:
            slot = graph.edges[site.node][k]
            end = End(slot, graph.shape(slot))
            if traits(graph.op(site.node)).batched and len(end.shape) == 3:
                expanded = ways_down.expanded_weight(graph, slot)
                if expanded is not None:
                    end = End(expanded.slot, graph.shape(expanded.slot), expanded.lead,
                              expanded.shared)  # fmt: skip
            ends[site.node, k] = end
    routes = {end.slot: ways_down.routes(graph, end.slot) for end in ends.values()}
    return Plan(uses.sites, ends, uses.direct, routes, uses.mixes, uses.known_mixed, key,
                suspects(graph))  # fmt: skip
