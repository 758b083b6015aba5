"""Uses of parameters, one after the other, become a factor for every parameter.

Owns: `Pass`, the state of one backward pass: rule or fallback for each use, what waits for other
uses, routes down to the parameters, and early release of what has been told.
Does not know: torch's pass, options, what a caller makes of the factors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from pergrad.engine.late_norms import in_range
from pergrad.engine.schedule import Schedule, Use
from pergrad.engine.user_state import Held
from pergrad.errors import UnsupportedError
from pergrad.factors import Embedded, Factor, Pulled, Sum, mapped
from pergrad.graph import routes
from pergrad.graph.flaws import doubtful, look
from pergrad.graph.layout import Layout, describe
from pergrad.graph.ops import Step
from pergrad.graph.plan import Plan
from pergrad.graph.walk import Graph, Slot
from pergrad.ops import AtOnce, Situation
from pergrad.ops.fallback import direct, fallback

Emit = Callable[[str, Factor], None]
Squares = Callable[[str, Tensor], None]  # is told the squared norms (B,) of a parameter


@dataclass(slots=True)
class Record:
    """How one operand was served, for `explain`."""

    parameter: str
    op: str
    how: str
    layout: str
    factor: Factor | None


@dataclass(slots=True)
class Explained:
    """What `explain` tells of one call."""

    records: list[Record] = field(default_factory=list)
    price: str = ""  # where gradients of several losses meet


@dataclass(slots=True)
class Pass:
    """The state of one backward pass."""

    graph: Graph
    plan: Plan
    schedule: Schedule
    batch: int
    emit: Emit
    create_graph: bool
    records: list[Record] | None
    waiting: dict[Slot, int] = field(default_factory=dict)  # uses that have not reported, by end
    parts: dict[Slot, list[Held]] = field(default_factory=dict)
    missing: dict[Slot, set[Slot]] = field(default_factory=dict)  # ends, by parameter
    found: dict[Slot, list[Held]] = field(default_factory=dict)
    doubted: frozenset[int] = field(init=False)  # where torch's own backward may be wrong
    squares: Squares | None = None  # where squared norms are all that is wanted

    def __post_init__(self) -> None:
        self.doubted = doubtful(self.graph, self.plan.suspects)
        self.waiting = dict(self.schedule.waiting)
        self.missing = {target: set(ends) for target, ends in self.schedule.missing.items()}

    def serve(self, use: Use, cotangents: list[Tensor | None]) -> None:
        """Factors of every operand of one use."""
        site = use.site
        if site.node in self.doubted:
            look(self.graph, site.node, cotangents)
        if self.squares is not None and use.at_once is not None:
            found = _at_once(use.at_once, self.graph.nodes[site.node], cotangents[0])
            if found is not None:
                self._tell(use, found, self.squares)
                return
        alive = some_alive(cotangents)
        situation = Situation(
            self.graph.nodes[site.node],
            use.op,
            self.batch,
            cotangents,
            site.layouts,
            use.operands,
        )
        served = use.rule(situation) if use.rule is not None and alive else {}
        if len(served) < len(site.slots):
            rest = [k for k in site.slots if k not in served]
            others: dict[int, Factor | None] = dict.fromkeys(rest)
            if rest and alive:
                others = fallback(situation, rest, wanted=use.calls_node)
        for k in site.slots:
            if k in served:
                self.report(use, k, served[k], "rule", situation.told.get(k, use.op))
            else:
                # without an element no backward of the op is run: the rule's zeros
                how = "fallback" if use.rule is None or alive else "rule"
                self.report(use, k, others[k], how, situation.told.get(k, use.op))

    def _tell(self, use: Use, found: dict[int, Tensor], tell: Squares) -> None:
        """The squared norms of all operands of a use, which have no other."""
        for k, squares in found.items():
            end = use.ends[k]
            target = self.schedule.alone[end].target
            self.waiting[end] -= 1
            self.missing[target].discard(end)
            tell(self.graph.targets[target], squares)

    def report(self, use: Use, k: int, factor: Factor | None, how: str, op: str) -> None:
        """How one operand of a use was served, and what came of it."""
        end = use.ends[k]
        if self.records is not None:
            if end in self.schedule.mixed:
                how = "mixed"
            layout = next(layout for layout in use.site.layouts if layout is not None)
            for way in self.plan.routes[end]:
                name = self.graph.targets[way.target]
                self.records.append(Record(name, op, how, describe(layout), factor))
        self.waiting[end] -= 1
        alone = self.schedule.alone.get(end)
        if alone is not None:
            self.missing[alone.target].discard(end)
            if factor is not None:
                self.emit(self.graph.targets[alone.target], self._route(alone, factor).settled())
            return
        if self.waiting[end] > 0:
            if factor is not None:
                # What the node saved is at hand now, and may be gone when the others have reported.
                self.parts.setdefault(end, []).append(Held(factor.materialized()))
            return
        before = self.parts.pop(end, None)
        if before is not None:
            name = self.graph.targets[self.plan.routes[end][0].target]
            factor = _total(name, before if factor is None else [*before, Held(factor)])
        self._descend(end, factor)

    def _descend(self, start: Slot, factor: Factor | None) -> None:
        """From the operand down to each parameter below it."""
        for way in self.plan.routes[start]:
            if factor is not None:
                part = self._route(way, factor)
                if self.missing[way.target] != {start}:
                    part = part.materialized()
                self.found.setdefault(way.target, []).append(Held(part))
            self._arrived(way.target, start)

    def _route(self, way: routes.Route, factor: Factor) -> Factor:
        if way.steps == ():
            return factor
        graph = self.graph
        ways = routes.settled(graph, way)
        if ways is None:
            function = routes.pull(graph, way.start, way.target, create_graph=self.create_graph)
            return Pulled(factor.settled(), function, graph.shape(way.target))
        steps: list[Step] = []
        for step in ways:
            if step[0] == "embed":
                _, wide, dim, start = step
                size = list(wide)
                inner = mapped(factor, tuple(steps)) if steps else factor
                size[dim] = prod(inner.shape) // max(prod(wide) // max(wide[dim], 1), 1)
                inner = mapped(inner, (("view", tuple(size)),))
                factor, steps = Embedded(inner, wide, (dim, start, start + size[dim])), []
            else:
                steps.append(step)
        return mapped(factor, tuple(steps)) if steps else factor

    def serve_direct(self, target: Slot, g: Tensor | None) -> None:
        """A parameter whose own gradient separates by example."""
        layout = self.plan.direct[target]
        self.report_direct(target, direct_factor(g, layout, self.batch))

    def passed_by(self) -> frozenset[int]:
        """The doubted nodes at which no parameter is served."""
        if not self.doubted:
            return self.doubted
        return self.doubted - {use.site.node for use in self.schedule.uses}

    def report_direct(self, target: Slot, factor: Factor | None) -> None:
        """What a parameter's own gradient is by example."""
        layout = self.plan.direct[target]
        if self.records is not None:
            name = self.graph.targets[target]
            self.records.append(Record(name, "leaf", "rule", describe(layout), factor))
        if factor is not None:
            self.found.setdefault(target, []).append(Held(factor))
        self._arrived(target, target)

    def _arrived(self, target: Slot, start: Slot) -> None:
        self.missing[target].discard(start)
        if not self.missing[target]:
            name = self.graph.targets[target]
            factor = _total(name, self.found.pop(target, []))
            if factor is not None:
                self.emit(name, factor.settled())

    def check_complete(self) -> None:
        """No number without every use of every parameter in it."""
        left = [target for target, starts in self.missing.items() if starts]
        if left:
            names = ", ".join(f"`{self.graph.targets[target]}`" for target in left[:5])
            raise UnsupportedError(
                f"The backward pass did not come by every use of {names}, so its gradients would "
                "be incomplete and no number is returned. This is a defect of pergrad; please "
                "report it with this model."
            )


def _at_once(norms: AtOnce, node: Any, g: Tensor | None) -> dict[int, Tensor] | None:
    """Squared norms as they are; None where factors are needed, to take some of them again."""
    found = None if g is None else norms(node, g)
    return found if found is not None and all(map(in_range, found.values())) else None


def direct_factor(g: Tensor | None, layout: Layout, batch: int) -> Factor | None:
    """That of a parameter's own gradient, whose elements belong to examples."""
    if g is not None and g.layout is not torch.strided:
        g = g.to_dense()
    return None if g is None else direct(g, layout, batch)


def some_alive(cotangents: list[Tensor | None]) -> bool:
    """Whether there is an element, else all is zero. Sparse ones become dense."""
    alive = False
    for n, g in enumerate(cotangents):
        if g is not None:
            if g.layout is not torch.strided:
                cotangents[n] = g = g.to_dense()
            alive = alive or g.numel() > 0
    return alive


def _total(name: str, parts: list[Held]) -> Factor | None:
    if not parts:
        return None
    factors = [part.factor(name) for part in parts]
    return factors[0] if len(factors) == 1 else Sum(factors)
