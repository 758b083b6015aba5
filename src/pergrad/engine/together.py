"""Parts of the losses whose cotangents are served at once, while the last one's pass comes by.

Owns: which parts can be, how many at a time, and `Together`, the pass that serves them.
Does not know: torch's pass, how parts are found, options.

Parts of the losses share all of their graph but its beginning. A pass for each is needed, for its
cotangents; but to serve a use is more work for Python than for the processor where a model is
small, and one call of a rule can serve it for all parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from pergrad.engine.parts import Apart
from pergrad.engine.pass_ import Pass, direct_factor, some_alive
from pergrad.engine.schedule import Use, schedule_for
from pergrad.factors import Beside, Factor, Placed
from pergrad.graph import nodes
from pergrad.graph.flaws import look
from pergrad.graph.uses import Site
from pergrad.graph.walk import Slot
from pergrad.ops import Situation
from pergrad.ops.fallback import fallback
from pergrad.ops.stacking import stacked

Cotangents = dict[Slot, Tensor | None]


def groups(parts: Sequence[Apart], room: int) -> list[list[Apart]]:
    """Parts that are served together, in their order: those alike whose cotangents fit into `room`
    bytes, three times.
    """
    found: list[list[Apart]] = []
    # a pass has to compute again, or may clear, what such nodes need
    apart = any(
        nodes.is_checkpointed(part.graph.nodes[site.node])
        or nodes.is_compiled(part.graph.nodes[site.node])
        for part in parts[:1]
        for site in part.plan.sites
    )
    for part in parts:
        most = 0 if apart else room // max(1, 3 * _bytes(part))
        if found and len(found[-1]) < most and _alike(found[-1][0], part):
            found[-1].append(part)
        else:
            found.append([part])
    return found


def wanted(part: Apart) -> list[Slot]:
    """Where there are cotangents that have to be served."""
    somebodys = schedule_for(part.graph, part.plan).somebodys
    slots = [
        (site.node, n)
        for site in part.plan.sites if site.node in somebodys
        for n, layout in enumerate(site.layouts) if layout is not None
    ]  # fmt: skip
    return [*slots, *part.plan.direct]


def _bytes(part: Apart) -> int:
    metas = (part.graph.metas(i)[n] for i, n in wanted(part))
    return sum(prod(meta.shape) * meta.dtype.itemsize for meta in metas)


def _alike(one: Apart, two: Apart) -> bool:
    """Whether a use of one is one of the other, node by node, and leads to the same parameters."""
    if one.graph.nodes[1:] != two.graph.nodes[1:]:
        return False
    first, other = (schedule_for(part.graph, part.plan) for part in (one, two))
    known = first.alike.get(id(other))
    if known is None:  # with the other, so that its number becomes no one else's
        known = first.alike[id(other)] = other, _same_uses(one, two)
    return known[1]


def _same_uses(one: Apart, two: Apart) -> bool:
    a, b = one.plan, two.plan
    return (
        one.graph.batch == two.graph.batch
        and one.graph.edges == two.graph.edges
        and one.graph.targets == two.graph.targets
        and [(s.node, s.slots, len(s.layouts)) for s in a.sites]
        == [(s.node, s.slots, len(s.layouts)) for s in b.sites]
        and all(site.node for site in a.sites)  # the first node is not the same
        and a.ends == b.ends
        and a.routes == b.routes
        and a.direct.keys() == b.direct.keys()
    )


@dataclass(slots=True)
class Together(Pass):
    """The pass of the last part, which serves those before it too.

    Example b of part j is example j * batch + b, of as many as there are in all parts.
    """

    of: list[Apart] = field(default_factory=list)  # all parts
    earlier: list[Cotangents] = field(default_factory=list)  # of all but the last
    _sites: list[dict[int, Site]] = field(default_factory=list)  # where somebody has a part

    def __post_init__(self) -> None:
        Pass.__post_init__(self)  # a class with slots is another one than `super()` means
        for part in self.of:
            somebodys = schedule_for(part.graph, part.plan).somebodys
            sites = (site for site in part.plan.sites if site.node in somebodys)
            self._sites.append({site.node: site for site in sites})

    def serve(self, use: Use, cotangents: list[Tensor | None]) -> None:
        """Factors of every operand of one use, for all parts."""
        node = use.site.node
        lists = [
            [part.pop((node, n), None) for n in range(len(use.site.layouts))]
            for part in self.earlier
        ]
        lists.append(cotangents)
        if node in self.doubted:
            for several in lists:
                look(self.graph, node, several)
        alive = {
            j: several
            for j, several in enumerate(lists)
            if node in self._sites[j] and some_alive(several)
        }
        situations = {
            j: Situation(
                self.graph.nodes[node], use.op, self.batch, several,
                self._sites[j][node].layouts, use.operands,
            )
            for j, several in alive.items()
        }  # fmt: skip
        found: dict[int, list[Factor]] = {k: [] for k in use.site.slots}
        rest = self._by_rule(use, situations, found)
        for j, slots in rest.items():
            others = fallback(situations[j], slots, wanted=use.calls_node)
            for k, factor in others.items():
                self._add(found[k], factor, [j])
        for k, factors in found.items():
            self.report(use, k, _beside(factors), "rule", use.op)

    def _by_rule(
        self, use: Use, situations: dict[int, Situation], found: dict[int, list[Factor]]
    ) -> dict[int, list[int]]:
        """What the rule serves; returned are the operands of each part that are left."""
        if use.rule is None:
            return {j: list(use.site.slots) for j in situations}
        if len(situations) > 1:
            every = stacked(list(situations.values()))
            served = {} if every is None else use.rule(every)
            if all(k in served for k in use.site.slots):
                for k, factor in served.items():
                    self._add(found[k], factor, list(situations))
                return {}
        rest: dict[int, list[int]] = {}
        for j, situation in situations.items():
            served = use.rule(situation)
            for k, factor in served.items():
                self._add(found[k], factor, [j])
            left = [k for k in use.site.slots if k not in served]
            if left:
                rest[j] = left
        return rest

    def _add(self, found: list[Factor], factor: Factor | None, parts: list[int]) -> None:
        """The factor of some parts' examples, as one of all."""
        if factor is None:
            return
        if len(parts) < len(self.of):
            first = torch.tensor(parts, device="cpu")[:, None] * self.batch
            index = (first + torch.arange(self.batch, device="cpu")).reshape(-1)
            factor = Placed(factor, index, self.batch * len(self.of))
        found.append(factor)

    def serve_direct(self, target: Slot, g: Tensor | None) -> None:
        """A parameter whose own gradient separates by example, in each part."""
        found: list[Factor] = []
        values = [*(part.pop(target, None) for part in self.earlier), g]
        for j, (part, value) in enumerate(zip(self.of, values, strict=True)):
            layout = part.plan.direct[target]
            self._add(found, direct_factor(value, layout, self.batch), [j])
        self.report_direct(target, _beside(found))


def _beside(factors: list[Factor]) -> Factor | None:
    """Of parts no two of which have an example in common."""
    if not factors:
        return None
    return factors[0] if len(factors) == 1 else Beside(factors)
