"""What a pass over a planned graph has to do, worked out once per plan.

Owns: `Use`, a site together with its rule and operands, and `Schedule`: what to ask of torch's
pass, which uses are served on its way and which from what it returns.
Does not know: tensors, factors, options.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from math import prod

from pergrad.graph import nodes
from pergrad.graph.layout import NOBODY
from pergrad.graph.plan import Plan
from pergrad.graph.routes import Route
from pergrad.graph.uses import Site
from pergrad.graph.walk import Graph, Slot
from pergrad.ops import AtOnce, Operand, Rule, calls_node, norms_at_once, rule_for


@dataclass(frozen=True, slots=True)
class Use:
    """One place at which parameters meet examples, and who serves it."""

    site: Site
    op: str
    rule: Rule | None
    calls_node: bool  # whether serving it runs the node's own backward
    operands: dict[int, Operand]
    ends: dict[int, Slot]  # where each operand begins to depend on parameters alone
    unruled: str  # the first parameter below, if there is no rule
    at_once: AtOnce | None = None  # its squared norms, if its parameters have no other part in them


@dataclass(frozen=True, slots=True)
class Requests:
    """What to ask of torch's pass, and what happens on its way."""

    wanted: list[Slot]
    streamed: list[Use]  # served when the pass comes by
    returned: list[Use]  # served from what the pass returns
    keep: bool  # whether the pass would free what a vector-Jacobian product still needs


@dataclass(frozen=True, slots=True)
class Schedule:
    """The uses of a plan, and what has to be complete before a parameter's factor is."""

    uses: list[Use]
    waiting: dict[Slot, int]  # how many uses report at each end
    missing: dict[Slot, frozenset[Slot]]  # the ends that each parameter waits for
    alone: dict[Slot, Route]  # ends with one use, whose only parameter has no other
    mixed: frozenset[Slot]
    compiled: bool  # whether a compiled region uses parameters
    quiet: bool  # whether there is a rule for each use, and so nothing to warn of
    pulled: frozenset[int]  # the nodes that vector-Jacobian products may go through
    requests: Requests  # if no block is checkpointed
    held: int  # bytes of what the ops above parameters returned
    somebodys: frozenset[int]  # the sites of which any example has a part in the cotangents
    alike: dict[int, tuple["Schedule", bool]] = field(
        default_factory=dict
    )  # others, see `together`

    def requests_for(self, graph: Graph, plan: Plan, executed: Collection[int] = ()) -> Requests:
        """What to ask of the pass over this very graph; it has to run the nodes `executed`."""
        patient = {
            use.site.node for use in self.uses if nodes.is_checkpointed(graph.nodes[use.site.node])
        }
        patient |= {use.site.node for use in self.uses if use.site.node in executed}
        if not patient:
            return self.requests
        return _requests(graph, plan, self.uses, patient, self.pulled, compiled=self.compiled)


def schedule_for(graph: Graph, plan: Plan) -> Schedule:
    """The schedule of a plan, remembered with it."""
    if plan.schedule is None:
        plan.schedule = _schedule(graph, plan)
    return plan.schedule


def _schedule(graph: Graph, plan: Plan) -> Schedule:
    uses = [_use(graph, plan, site) for site in plan.sites]
    waiting: dict[Slot, int] = {}
    for end in plan.ends.values():
        waiting[end.slot] = waiting.get(end.slot, 0) + 1
    missing: dict[Slot, set[Slot]] = {target: {target} for target in plan.direct}
    for start, ways in plan.routes.items():
        for way in ways:
            missing.setdefault(way.target, set()).add(start)
    alone = {
        start: ways[0]
        for start, ways in plan.routes.items()
        if waiting[start] == 1 and len(ways) == 1 and missing[ways[0].target] == {start}
    }
    uses = [_at_once(graph, use, alone) for use in uses]
    compiled = any(nodes.is_compiled(graph.nodes[site.node]) for site in plan.sites)
    pulled = _pulled(graph, plan)
    return Schedule(
        uses,
        waiting,
        {target: frozenset(starts) for target, starts in missing.items()},
        alone,
        frozenset(mix.child for mix in plan.mixes),
        compiled,
        not compiled and all(use.rule is not None for use in uses),
        pulled,
        _requests(graph, plan, uses, (), pulled, compiled=compiled),
        sum(
            prod(meta.shape) * meta.dtype.itemsize
            for i in range(len(graph.nodes)) if graph.leads[i] and not graph.pure[i]
            for meta in graph.metas(i)
        ),
        frozenset(site.node for site in plan.sites if _somebodys(site)),
    )  # fmt: skip


def _somebodys(site: Site) -> bool:
    return any(
        layout is not None and bool((layout.owner != NOBODY).any()) for layout in site.layouts
    )


def _use(graph: Graph, plan: Plan, site: Site) -> Use:
    op = graph.op(site.node)
    ends = {k: plan.ends[site.node, k] for k in site.slots}
    rule = rule_for(op)
    below = [graph.targets[way.target] for end in ends.values() for way in plan.routes[end.slot]]
    return Use(
        site,
        op,
        rule,
        calls_node(op),
        {k: Operand(end.shape, end.lead, end.shared) for k, end in ends.items()},
        {k: end.slot for k, end in ends.items()},
        "" if rule is not None else below[0],
    )


def _at_once(graph: Graph, use: Use, alone: Mapping[Slot, Route]) -> Use:
    """The same, with the way to its norms that needs no factor, if the plan allows it."""
    ways = [alone.get(end) for end in use.ends.values()]
    # on whose steps lengths stay, whatever the numbers are
    if any(way is None or way.steps is None or way.reads_indices for way in ways):
        return use
    site = use.site
    found = norms_at_once(use.op, graph.nodes[site.node], site.layouts, use.operands, graph.batch)
    return use if found is None else replace(use, at_once=found)


def _requests(
    graph: Graph,
    plan: Plan,
    uses: list[Use],
    patient: Collection[int],
    pulled: frozenset[int],
    *,
    compiled: bool,
) -> Requests:
    wanted: dict[Slot, None] = dict.fromkeys(plan.direct)
    for use in uses:
        node = use.site.node
        if use.calls_node or node in patient:
            # torch computes an operand's gradient, also in a direct call during the pass, only if
            # somebody asked for it. And what a checkpointed op saved is at hand only while the
            # pass is at it.
            wanted.update(dict.fromkeys(graph.edges[node][k] for k in use.site.slots))
    reached = {slot[0] for slot in wanted}
    by_node = {use.site.node: use for use in uses}
    streamed: list[Use] = []
    returned: list[Use] = []
    run: set[int] = set()
    for i in range(len(graph.nodes) - 1, -1, -1):
        # What leads to something wanted is executed, and its saved tensors may be freed: it has to
        # be served on the way. What is merely wanted itself is not executed.
        executed = any(c in reached for c, _ in graph.edges[i] if c >= 0)
        here = by_node.get(i)
        if here is not None and executed:
            streamed.append(here)
        elif here is not None:
            returned.append(here)
            layouts = enumerate(here.site.layouts)
            wanted.update(dict.fromkeys((i, n) for n, layout in layouts if layout is not None))
        if executed or here is not None:
            reached.add(i)
        if executed:
            run.add(i)
    # A compiled region that has run once clears its tensors, unless the graph is kept.
    return Requests(list(wanted), streamed, returned, compiled or bool(run & pulled))


def _pulled(graph: Graph, plan: Plan) -> frozenset[int]:
    ways = [way for ways in plan.routes.values() for way in ways]
    starts = [way.start[0] for way in ways if way.steps is None or way.reads_indices]
    return frozenset(graph.below(starts))
